"""The counted budget of a model: what is stored whatever is allocated, and what rows may spend."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import LayerShape, row_sizes
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import QuantizationError


@dataclass(frozen=True)
class Floor:
    """The least that can be stored for the experts of a model.

    Attributes:
        fixed: stored bits that no allocation changes, by part.
        narrowest: payload bits with all rows at the narrowest width.
        counted: bits of ``fixed`` that count against the budget (without bases if ``factor_bits`` is given).
        weights: expert weights of the unquantized model.
    """

    fixed: dict[str, int]
    narrowest: int
    counted: int
    weights: int

    @property
    def bits(self) -> float:
        """Smallest reachable ``bits`` (or ``factor_bits``, if that is given)."""
        return (self.counted + self.narrowest) / self.weights


@dataclass(frozen=True)
class Budget:
    """Attributes:
    payload_bits: what the allocation may spend on rows, over all layers.
    narrowest: the least of it that rows take.
    fixed: stored bits of the whole model that no allocation changes, by part.
    weights: expert weights of the unquantized model.
    """

    payload_bits: int
    narrowest: int
    fixed: dict[str, int]
    weights: int


def find_floor(shapes: list[LayerShape], config: BitsMoEConfig, biases: int = 0) -> Floor:
    """The least that layers of these shapes take.

    Args:
        biases: bits of their biases, which are stored as they are.

    Raises:
        QuantizationError: the bases do not fit their groups.
    """
    fixed: Counter[str] = Counter(biases=biases)
    narrowest = 0
    for shape in shapes:
        if config.basis_bits < 16 and shape.hidden_size % config.basis_group_size:
            raise QuantizationError(
                f"basis_group_size={config.basis_group_size} does not divide hidden_size="
                f"{shape.hidden_size}; use 16, 32, 64, 128 or 256 such that it does"
            )
        fixed.update(layout.fixed_bits(shape, config.basis_bits, config.basis_group_size, config.input_bases))
        narrowest += (
            len(shape.factors) * shape.num_experts * shape.rank * min(row_sizes(shape, config.widths))
        )
    counted = sum(fixed.values()) - (0 if config.factor_bits is None else fixed["bases"])
    return Floor(dict(fixed), narrowest, counted, sum(shape.weights for shape in shapes))


def plan_budget(shapes: list[LayerShape], config: BitsMoEConfig, biases: int = 0) -> Budget:
    """Split the counted budget into what is fixed and what rows may use.

    Args:
        biases: see ``find_floor``.

    Raises:
        QuantizationError: the budget cannot be met, or the bases do not fit their groups.
    """
    floor = find_floor(shapes, config, biases)
    option, bits = "bits", float(config.bits)
    if config.factor_bits is not None:
        option, bits = "factor_bits", float(config.factor_bits)
    payload = int(bits * floor.weights) - floor.counted
    if payload < floor.narrowest:
        raise QuantizationError(
            f"{option}={bits:g} cannot be met: the smallest reachable is {floor.bits:.4f} bits per weight, "
            f"of which bases, row codes, scale grids and biases take {floor.counted / floor.weights:.4f} "
            "(smaller with basis_bits=4 and a larger basis_group_size) and the narrowest rows the rest"
        )
    return Budget(payload, floor.narrowest, floor.fixed, floor.weights)


def reserve(budget: Budget, part: str, bits: int) -> Budget:
    """The budget without ``bits`` that are stored as they were.

    Raises:
        QuantizationError: there are fewer.
    """
    left = budget.payload_bits - budget.narrowest
    if bits > left:
        raise QuantizationError(
            f"{part} take {bits / budget.weights:.4f} bits per weight in their original precision, of "
            f"{left / budget.weights:.4f} that are left beside the narrowest rows; raise bits, or keep "
            "fewer experts (super_experts)"
        )
    return replace(budget, payload_bits=budget.payload_bits - bits, fixed={**budget.fixed, part: bits})
