"""Linear layers outside the experts in the integer program that chooses the experts' rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitsmoe_plugin.errors import ConfigError


def as_unit(costs: Sequence[float], sizes: Sequence[int], widths: int) -> tuple[np.ndarray, np.ndarray]:
    """A block of one unit for ``allocate``, beside blocks of rows of so many ``widths``.

    Args:
        costs: output error at each candidate, in the unit of rows' costs.
        sizes: stored bits at each, rising.

    Returns:
        ``[1, widths]`` costs, infinite where there is no candidate, and ``[widths]`` rising sizes.

    Raises:
        ConfigError: rows have fewer widths than there are candidates.
    """
    spare = widths - len(costs)
    if spare < 0:
        raise ConfigError(
            f"BitsMoEConfig: size chooses among {len(costs)} widths of linear layers, so widths must have as "
            "many"
        )
    table = np.array([[*costs, *[np.inf] * spare]])
    return table, np.array([*sizes, *(sizes[-1] + 1 + i for i in range(spare))], dtype=np.int64)
