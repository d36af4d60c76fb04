"""Packed layers of given sizes with random content: any codes are valid, so no quantization is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS
from bitsmoe_plugin.codec.spec import PackedSpec


def random_layer(
    shape: LayerShape,
    *,
    widths: tuple[int, ...],
    shares: Sequence[float],
    basis_bits: int = 4,
    basis_group_size: int = 32,
    input_bases: int = 1,
    grid: str = "trellis",
    seed: int = 0,
) -> tuple[PackedSpec, PackedExperts]:
    """A packed layer whose outputs are of the order of its inputs.

    Args:
        shares: of each width among the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    e, r, h = shape.num_experts, shape.rank, shape.hidden_size

    def random_bits(*size: int) -> Tensor:
        low, high = -(2**31), 2**31
        return torch.randint(low, high, size, generator=generator, dtype=torch.int64).to(torch.int32)

    def halves(size: tuple[int, ...], positive: bool) -> Tensor:
        values = torch.randn(size, generator=generator) * h**-0.5
        return (values.abs() if positive else values).half().view(torch.int16)

    rows = torch.multinomial(
        torch.tensor(shares, dtype=torch.float), 3 * e * r, replacement=True, generator=generator
    )
    codes = torch.randint(SCALE_LEVELS, (3 * e * r,), generator=generator)
    row_codes = (rows * SCALE_LEVELS + codes).to(torch.uint8).view(3, e, r)
    words = layout.index_rows(row_codes, widths, shape).words
    spec = PackedSpec(
        shape=shape,
        widths=widths,
        basis_bits=basis_bits,
        basis_group_size=basis_group_size,
        input_bases=input_bases,
        payload_words=words,
        grid=grid,
    )
    low = -2 - 4 * torch.rand((3, r), generator=generator)
    step = torch.rand((3, r), generator=generator) * 0.1
    tensors = {
        "bitsmoe_row_codes": row_codes,
        "bitsmoe_scale_grid": torch.stack([low, step], 1).half().view(torch.int16),
        "bitsmoe_payload": random_bits(words),
    }
    for name, (dtype, size) in spec.tensors().items():
        if name not in tensors:
            positive = name.endswith("_scales")
            tensors[name] = halves(size, positive) if dtype == torch.int16 else random_bits(*size)
    return spec, PackedExperts(**{name.removeprefix("bitsmoe_"): t for name, t in tensors.items()})


def shares_at(bits: float, widths: Sequence[int]) -> list[float]:
    """Shares of widths among rows with a given mean, spread as an allocation spreads them.

    Args:
        bits: mean width, within the widths.

    Returns:
        shares proportional to exp(-(width - centre)^2 / 2): on the bundled model at 2 bits allocations
        have a standard deviation of about one bit.
    """
    table = torch.tensor(widths, dtype=torch.double)
    low, high = min(widths) - 40.0, max(widths) + 40.0
    for _ in range(100):  # the mean rises with the centre
        centre = (low + high) / 2
        shares = torch.softmax(-((table - centre) ** 2) / 2, 0)
        low, high = (centre, high) if float(shares @ table) < bits else (low, centre)
    return shares.tolist()
