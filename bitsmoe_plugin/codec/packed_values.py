"""Values of a packed layer, checked before any kernel sees them.

The SHA-256 of a manifest tells damage, not intent: whoever alters a checkpoint can write the hash of what he
altered. So everything that kernels rely on is checked here as well. They find rows by offsets that follow
from the row codes (``layout``), which a layer's sizes bound: a file holds neither row indices nor offsets
that could be out of range or stand twice. Payload words need no check, every code has a value; only with the
grid "tiled" can a row of 16 bits hold NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import CheckpointError

LARGEST_OCTAVE = 64.0
"""Row scales are within 2**-64 .. 2**64; what is quantized has them within 2**-60 .. 2**60."""
_CHUNK = 2**22


def check_sizes(name: str, spec: PackedSpec, packed: PackedExperts) -> None:
    """Refuse tensors that do not fit the spec, whatever their values.

    Args:
        name: of the layer, for errors.

    Raises:
        CheckpointError: naming the tensor and both values.
    """
    found = dict(packed.tensors())
    for buffer, (dtype, shape) in spec.tensors().items():
        tensor = found.get(buffer)
        if tensor is None or tensor.is_meta or (tensor.numel() and not tensor.data_ptr()):
            raise CheckpointError(f"{name}.{buffer} is missing from the checkpoint")
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name}.{buffer} is {tensor.dtype} {tuple(tensor.shape)}, but the config asks for "
                f"{dtype} {shape}; the checkpoint was altered or belongs to another config"
            )


def check_meaning(name: str, spec: PackedSpec, given: str | None) -> None:
    """Refuse tensors of another layer whose numbers stand for something else.

    Args:
        name: of the layer, for errors.
        given: ``meaning`` of the spec of the other layer; None where it is not known.

    Raises:
        CheckpointError: naming both.
    """
    own = spec.meaning()
    if given not in (None, own):
        raise CheckpointError(
            f"{name} cannot be loaded: the tensors are packed with {given}, this layer with {own}. Load them "
            "into a model that was quantized alike"
        )


def check_packed(name: str, spec: PackedSpec, packed: PackedExperts) -> None:
    """Refuse a layer whose values contradict each other or are not finite.

    Args:
        name: of the layer, for errors.
        packed: dtypes and shapes as ``spec`` says.

    Raises:
        CheckpointError: naming the tensor.
    """
    spec.check_rows(name, packed.row_codes)
    if spec.is_tiled:
        _check_tiled(name, spec, packed)
    else:
        _check_scale_grid(f"{name}.bitsmoe_scale_grid", packed.scale_grid)
    dense = spec.basis_bits == 16
    halves = ("input_basis", "output_basis") if dense else ("input_scales", "output_scales")
    for buffer in halves:
        _check_finite(f"{name}.bitsmoe_{buffer}", getattr(packed, buffer), torch.float16)
        if spec.is_tiled and not dense:
            _check_products(f"{name}.bitsmoe_{buffer}", getattr(packed, buffer), 2 ** (spec.basis_bits - 1))
    for buffer in ("input_bias", "output_bias", "kept_input", "kept_output"):
        tensor = getattr(packed, buffer)
        if tensor is not None:
            _check_finite(f"{name}.bitsmoe_{buffer}", tensor, layout.ORIGINAL_DTYPES[spec.original_dtype])


def _check_products(name: str, bits: Tensor, largest_code: int) -> None:
    """The grid "tiled" rounds code times scale to float16, which must not overflow."""
    largest = float(bits.view(torch.float16).abs().max()) if bits.numel() else 0.0
    if largest * largest_code > torch.finfo(torch.float16).max:
        raise CheckpointError(f"{name} holds {largest:g}, with which codes are beyond float16")


def _check_finite(name: str, bits: Tensor, dtype: torch.dtype) -> None:
    """Of floats stored as integers; in pieces, because kept experts can be large."""
    for piece in bits.contiguous().view(-1).split(_CHUNK):
        if not bool(piece.view(dtype).isfinite().all()):
            raise CheckpointError(f"{name} holds NaN or infinity; the checkpoint was altered")


def _check_scale_grid(name: str, stored: Tensor) -> None:
    _check_finite(name, stored, torch.float16)
    low, step = stored.view(torch.float16).float().unbind(1)
    high = low + (SCALE_LEVELS - 1) * step
    if bool(step.min() < 0) or float(low.min()) < -LARGEST_OCTAVE or float(high.max()) > LARGEST_OCTAVE:
        raise CheckpointError(
            f"{name} describes row scales from 2**{float(low.min()):g} to 2**{float(high.max()):g}, in steps "
            f"down to {float(step.min()):g}; they rise within 2**-{LARGEST_OCTAVE:g} .. 2**{LARGEST_OCTAVE:g}"
        )


def _check_tiled(name: str, spec: PackedSpec, packed: PackedExperts) -> None:
    assert packed.tile_scales is not None
    assert packed.row_gains is not None
    _check_finite(f"{name}.bitsmoe_tile_scales", packed.tile_scales, torch.float16)
    _check_finite(f"{name}.bitsmoe_row_gains", packed.row_gains, torch.float16)
    if bool((packed.row_codes % SCALE_LEVELS).any()):
        raise CheckpointError(f"{name}.bitsmoe_row_codes holds scale codes, which a tiled layer has not")
    if 16 not in spec.widths:
        return
    counts = (layout.row_widths(packed.row_codes, spec.widths) == 16).sum(-1)
    starts = torch.tensor(layout.index_rows(packed.row_codes, spec.widths, spec.shape).starts, device="cpu")
    for factor, expert in counts.nonzero().tolist():  # rows of 16 bits are the first of their expert
        start, words = int(starts[factor, expert]), int(counts[factor, expert]) * spec.shape.blocks * 16
        _check_finite(f"{name}.bitsmoe_payload", packed.payload[start : start + words], torch.float16)
