"""Options of tuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bitsmoe_plugin.base.option_checks import check_number, fail

if TYPE_CHECKING:  # the command line's help reads this file, and should load no library
    from bitsmoe_plugin.config import BitsMoEConfig

LEARNABLE = ("bases", "rows", "codes", "norms", "routers")
"""What tuning can move: scales of the shared bases, scale codes of rows, codes of their values, weights of
norms and of routers."""

WAYS = {
    "layers": "layer by layer",
    "model": "through the whole model",
    "both": "layer by layer, then through the whole model",
}
"""Ways of tuning, in words."""
THROUGH = ("auto", *WAYS)
"""Values of ``TuningSettings.through``."""


@dataclass(frozen=True)
class TuningSettings:
    """Attributes:
    epochs: how often all blocks are seen, 1 to 1000.
    learning_rate: largest change of the logarithm of a scale per step, about; falls to 0. 1e-6 to 1.
    batch_size: blocks per step.
    held_out: share of the blocks that are only measured on: what was learnt until the epoch that is best
        there is taken. Above 0, at most 0.5.
    seed: of the order of the blocks.
    learn: of ``LEARNABLE``. All keep their dtypes and sizes. Norms and routers are not experts' own, and move
        a tenth as fast. Codes take 40 bytes of memory per weight of the experts that are tuned at a time, and
        need much text: they learn by heart what there is little of.

    through: "layers": one decoder layer after the other, with that layer's experts alone in memory. "model":
        through the whole model, which is in memory with the original. "both": one after the other. "auto":
        "both" if there is memory for it, or else "layers".
    layers_at_once: decoder layers that are tuned together by "layers"; that many layers' hidden states wait
        for gradients.

    Raises:
        ConfigError: naming the setting, its value and what is allowed.
    """

    epochs: int = 2
    learning_rate: float = 2e-3
    batch_size: int = 2
    held_out: float = 0.0625
    seed: int = 0
    learn: tuple[str, ...] = ("bases", "rows")
    through: str = "auto"
    layers_at_once: int = 1

    @classmethod
    def of(cls, config: BitsMoEConfig) -> TuningSettings:
        """How a model that ``config`` quantizes is tuned in the same call (its option ``tune``)."""
        default = cls()
        return cls(
            epochs=config.tune,
            learn=("rows",) if config.basis_bits == 16 else default.learn,
            held_out=config.held_out or default.held_out,
            seed=config.seed,
            through=config.tune_through,
        )

    def __post_init__(self) -> None:
        check = partial(check_number, owner="TuningSettings")
        check("epochs", self.epochs, 1, 1000, whole=True)
        known = isinstance(self.learn, tuple) and all(name in LEARNABLE for name in self.learn)
        if not known or not self.learn or len(set(self.learn)) < len(self.learn):
            fail("learn", self.learn, f"some of {', '.join(LEARNABLE)}, each once", owner="TuningSettings")
        check("learning_rate", self.learning_rate, 1e-6, 1)
        check("batch_size", self.batch_size, 1, 10**6, whole=True)
        check("held_out", self.held_out, 1e-6, 0.5)
        if self.through not in THROUGH:
            fail("through", self.through, f"one of {', '.join(THROUGH)}", owner="TuningSettings")
        check("layers_at_once", self.layers_at_once, 1, 1000, whole=True)
        check("seed", self.seed, 0, 2**63 - 1, whole=True)
