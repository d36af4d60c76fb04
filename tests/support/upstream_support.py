"""A writer of the method authors' checkpoint format, bit by bit from the text of
``bitsmoe_plugin.commands.import_upstream``.

It shares no code with the converter: plain numbers in, tensors out. ``decode_value`` reads single values back
by the address arithmetic of the authors' kernels, to judge the writer.
"""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TAGS = {"qwen3_moe": "qwen3moe", "qwen3_next": "qwen3next", "deepseek_v2": "deepseekv2"}


@dataclass
class Row:
    """One stored row: ``q`` are whole numbers, at 16 bits float16 values."""

    rank: int
    bits: int
    q: list[Any]
    scales: list[float]
    gain: float

    def values(self) -> list[float]:
        """What the row stands for: float16(q * scale) * gain."""
        with np.errstate(over="ignore"):
            products = [
                np.float16(np.float32(q) * np.float32(self.scales[i // 128])) for i, q in enumerate(self.q)
            ]
        return [float(np.float32(product) * np.float32(np.float16(self.gain))) for product in products]


def half(value: float) -> float:
    """Nearest float16."""
    return float(np.float16(value))


def random_row(rng: random.Random, rank: int, bits: int, size: int, extreme: bool = False) -> Row:
    """A row of random numbers; ``extreme`` takes the ends of every range, and ties of rounding."""
    tiles = -(-size // 128)
    if bits == 16:
        ends = [0.0, -0.0, 65504.0, -65504.0, 2.0**-24, 1.0]
        q: list[Any] = [rng.choice(ends) if extreme else half(rng.gauss(0, 1)) for _ in range(size)]
        return Row(rank, bits, q, [1.0] * tiles, half(rng.gauss(0, 1)))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    allowed = [-1, 1] if bits == 1 else [low, high] if extreme else list(range(low, high + 1))
    # At 2049/2048 times an odd number, float16 has to break ties.
    ends = [0.0, 2.0**-24, 2.0**-14, 1 + 2.0**-10, 65504.0 / 2 ** (bits - 1)]
    scales = [half(rng.choice(ends)) if extreme else half(abs(rng.gauss(0, 0.1))) for _ in range(tiles)]
    gain = half(rng.choice([0.0, 2.0**-24, 65504.0]) if extreme else abs(rng.gauss(0, 1)))
    return Row(rank, bits, [rng.choice(allowed) for _ in range(size)], scales, gain)


def encode_projection(rows: list[Row], size: int, rank: int, prefix: str) -> dict[str, Tensor]:
    """All buffers of a projection, names ``<prefix>_<buffer>``; rows of width 0 are left out."""
    payload, ranks, tiles, slabs, scales, gains, segments = [], [], [], [], [], [], []
    for bits in (16, 8, 6, 4, 3, 2, 1):
        chosen = [row for row in rows if row.bits == bits]
        if chosen:
            segments.append([bits, len(ranks), len(ranks) + len(chosen)])
        for first in range(0, len(chosen), 64):
            slab = chosen[first : first + 64]
            slabs.append([bits, len(slab), len(ranks), len(tiles)])
            for start in range(0, size, 128):
                tiles.append([len(payload), len(scales), min(128, size - start)])
                payload += _tile(slab, bits, start, size)
                scales += [row.scales[start // 128] for row in slab]
            ranks += [row.rank for row in slab]
            gains += [row.gain for row in slab]
    found = {
        "payload_buffer": torch.tensor(payload, dtype=torch.int64).to(torch.uint32),
        "rank_idx_buffer": torch.tensor(ranks, dtype=torch.int32),
        "tile_meta_buffer": torch.tensor(tiles, dtype=torch.int32),
        "slab_meta_buffer": torch.tensor(slabs, dtype=torch.int32),
        "scale_buffer": torch.tensor(scales, dtype=torch.float16),
        "s_buffer": torch.tensor(gains, dtype=torch.float16),
        "segments": torch.tensor(segments, dtype=torch.int32),
        "original_indices": torch.tensor(ranks, dtype=torch.int32),
        "original_rank": torch.tensor(rank, dtype=torch.int32),
        "groupsize": torch.tensor(128, dtype=torch.int16),
    }
    if not ranks:
        found["tile_meta_buffer"] = found["slab_meta_buffer"] = torch.empty((0, 0), dtype=torch.int16)
    return {f"{prefix}_{buffer}": tensor for buffer, tensor in found.items()}


def _tile(slab: list[Row], bits: int, start: int, size: int) -> list[int]:
    words = []
    for stage in range(0, len(slab), 16):
        for group in range(start, start + 128, 32):
            for row in slab[stage : stage + 16]:
                words += _words(row.q[group : min(group + 32, size)] if group < size else [], bits)
    return words


def _words(q: list[Any], bits: int) -> list[int]:
    """32 values, filled up with zeros, as bit planes; at 16 bits as pairs."""
    q = q + [0] * (32 - len(q))
    if bits == 16:
        return [struct.unpack("<I", struct.pack("<ee", *q[i : i + 2]))[0] for i in range(0, 32, 2)]
    codes = [(v + 1) // 2 if bits == 1 else v + 2 ** (bits - 1) for v in q]
    return [sum((code >> plane & 1) << i for i, code in enumerate(codes)) for plane in range(bits)]


def decode_value(buffers: dict[str, Tensor], prefix: str, row: int, neuron: int) -> float:
    """Value of a stored row by the kernels' arithmetic: address of its words from the metadata."""
    get = {name.removeprefix(f"{prefix}_"): tensor for name, tensor in buffers.items()}
    slab = next(s for s in get["slab_meta_buffer"].tolist() if s[2] <= row < s[2] + s[1])
    bits, count, first, tile = slab
    word, scale, _ = get["tile_meta_buffer"][tile + neuron // 128].tolist()
    local, lane = row - first, neuron % 32
    stage = local // 16
    in_stage = min(16, count - 16 * stage)
    word += stage * 64 * bits + neuron % 128 // 32 * in_stage * bits + local % 16 * bits
    payload = get["payload_buffer"].to(torch.int64)
    gain = np.float32(get["s_buffer"][row].item())
    if bits == 16:
        code = int(payload[word + lane // 2]) >> 16 * (lane % 2) & 0xFFFF
        return float(np.float32(struct.unpack("<e", struct.pack("<H", code))[0]) * gain)
    u = sum((int(payload[word + plane]) >> lane & 1) << plane for plane in range(bits))
    q = 2 * u - 1 if bits == 1 else u - 2 ** (bits - 1)
    product = np.float32(q) * np.float32(get["scale_buffer"][scale + local].item())
    return float(np.float32(np.float16(product)) * gain)


def encode_marlin(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """``[K, N]`` uint8 and ``[K / 128, N]`` float16 in the layout of the Marlin kernel.

    After Marlin's description: tiles of 16 by 16 side by side, the 1024 values of four tiles in the order of
    the threads that use them (thread t holds columns t / 4 and t / 4 + 8, rows 2 (t mod 4) + 0, 1, 8, 9).
    """
    k, n = codes.shape
    order = []
    for thread in range(32):
        fragment = [
            16 * row + thread // 4 + 8 * block
            for block in (0, 1)
            for row in (2 * (thread % 4) + step for step in (0, 1, 8, 9))
        ]
        order += [position + 256 * tile for tile in range(4) for position in fragment]
    order = [order[i + j] for i in range(0, 1024, 4) for j in (0, 2, 1, 3)]
    tiled = codes.reshape(k // 16, 16, n // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)[:, order]
    words = tiled.contiguous().view(torch.int32).view(k // 16, 4 * n)
    several = [i + 8 * j for i in range(8) for j in range(8)]
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    columns = single if k == 128 else several
    return words, scales.reshape(-1, len(columns))[:, columns].reshape(-1, n).contiguous()


@dataclass
class UpstreamLayer:
    """One layer in the authors' format, and what it stands for.

    Attributes:
        tensors: without the layer's prefix.
        rows: ``[factor][expert]`` -> its rows, None if the expert is not packed.
        bases: of gate, up ``[r, H]`` and down ``[H, r]``, float32.
        dense: expert -> gate, up, down of those that are not packed.
    """

    tensors: dict[str, Tensor]
    rows: list[list[list[Row] | None]]
    bases: list[Tensor]
    dense: dict[int, list[Tensor]]

    def weights(self, factor: int, expert: int, size: int) -> Tensor:
        """Dense ``[I, H]`` of gate and up, ``[H, I]`` of down, float32."""
        if expert in self.dense:
            return self.dense[expert][factor].float()
        dense = torch.zeros(self.bases[factor].shape[factor == 2], size, dtype=torch.float64)
        for row in self.rows[factor][expert]:
            dense[row.rank] = torch.tensor(row.values(), dtype=torch.float64)
        basis = self.bases[factor].double()
        return (basis @ dense if factor == 2 else dense.T @ basis).float()


def random_upstream_layer(
    rng: random.Random, experts: int, hidden: int, size: int, ranks: tuple[int, int, int], *,
    basis_bits: int = 16, widths: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8, 16), dense: tuple[int, ...] = (),
) -> UpstreamLayer:  # fmt: skip
    """A layer of random rows; weights have about the size of those of a real model."""
    tensors: dict[str, Tensor] = {}
    rows: list[list[list[Row] | None]] = []
    bases = []
    for name, rank in zip(("shared_vh_gate_proj", "shared_vh_up_proj", "shared_u_down"), ranks, strict=True):
        shape = (hidden, rank) if name == "shared_u_down" else (rank, hidden)
        given, basis = random_basis(shape, basis_bits)
        tensors |= {f"{name}{part}": tensor for part, tensor in given.items()}
        bases.append(basis)
    for factor, prefix in enumerate(("gate", "up", "down")):
        rows.append([])
        for expert in range(experts):
            if expert in dense:
                rows[-1].append(None)
                continue
            # In falling order, which no reader may rely on.
            chosen = [(rank, rng.choice(widths)) for rank in reversed(range(ranks[factor]))]
            own = [random_row(rng, rank, bits, size) for rank, bits in chosen if bits]
            rows[-1].append(own)
            buffers = encode_projection(own, size, ranks[factor], prefix)
            tensors |= {f"experts.{expert}.{buffer}": tensor for buffer, tensor in buffers.items()}
    unpacked = {
        expert: [torch.randn(shape).half() / 8 for shape in ((size, hidden), (size, hidden), (hidden, size))]
        for expert in dense
    }
    for expert, weights in unpacked.items():
        names = (f"experts.{expert}.{factor}_proj.weight" for factor in ("gate", "up", "down"))
        tensors |= dict(zip(names, weights, strict=True))
    return UpstreamLayer(tensors, rows, bases, unpacked)


def random_basis(shape: tuple[int, int], bits: int) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors by suffix, and the basis ``shape`` float32 that they stand for."""
    if bits == 16:
        basis = (torch.randn(shape) / shape[1] ** 0.5).half()
        return {"": basis}, basis.float()
    codes = torch.randint(256, shape, dtype=torch.uint8)
    scales = (torch.rand(shape[0], shape[1] // 128) / 64 / shape[1] ** 0.5).half()
    words, stored = encode_marlin(codes.T.contiguous(), scales.T.contiguous())
    products = (codes.float() - 128).view(shape[0], -1, 128) * scales.float()[:, :, None]
    return {"_qweight": words, "_scales": stored}, products.half().float().view(shape)


def write_upstream(directory: Path, model: Any, layers: dict[str, UpstreamLayer]) -> Path:
    """Save a model as the authors do: in place of the experts, the tensors of ``layers`` by moe path."""
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".experts." not in name}
    for moe, layer in layers.items():
        tensors |= {f"{moe}.{name}": tensor.contiguous().clone() for name, tensor in layer.tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"bitsmoe": True, "bitsmoe_model_type": TAGS[config["model_type"]]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@torch.no_grad()
def fill_dense(model: Any, layers: dict[str, UpstreamLayer]) -> Any:
    """Give a model the weights that the layers stand for."""
    for moe, layer in layers.items():
        experts = model.get_submodule(f"{moe}.experts")
        size = experts.down_proj.shape[2]
        for expert in range(len(experts.down_proj)):
            gate, up, down = (layer.weights(factor, expert, size) for factor in range(3))
            experts.gate_up_proj[expert] = torch.cat([gate, up])
            experts.down_proj[expert] = down
    return model
