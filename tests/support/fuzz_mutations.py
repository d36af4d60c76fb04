"""Small packed checkpoints, and ways to alter them that know the format; for ``fuzz_checkpoint``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.checkpoint.manifest import layer_manifest, tensor_digest
from bitsmoe_plugin.checkpoint.other_tensors import record
from bitsmoe_plugin.codec import layout
from bitsmoe_plugin.codec.layout import LayerShape, PackedExperts
from bitsmoe_plugin.codec.scale_grid import SCALE_LEVELS
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.models.files import INDEX

FILE = "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"

NASTY: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 5, 7, 16, 31, 33, 255, 2**15, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**40),
    *(0.0, -0.5, 2.5, 1e308, float("nan"), float("inf"), float("-inf")),
    *(True, False, None, "", "0", "2", "bitsmoe", "../x", "/etc/passwd", "\x00", "\u202e", "x" * 3000),
    *([], [0], [1, 1], [-1], [2**70], ["a"], [[[[]]]], {}, {"a": 1}, {"": {}}, [None], [True], [0, 1, 2, 3]),
    *("trellis", "uniform", "tiled", "float16", "float32", "bfloat16", "int8"),
)


@dataclass(frozen=True)
class Base:
    """A sound checkpoint: config.json as a dict, tensors by name."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def _values(buffer: str, shape: tuple[int, ...], dtype: torch.dtype, spec: PackedSpec) -> torch.Tensor:
    if dtype == torch.int16 and buffer != "bitsmoe_scale_grid":
        original = (
            layout.ORIGINAL_DTYPES[spec.original_dtype] if "kept" in buffer or "bias" in buffer else None
        )
        return (torch.rand(shape) + 0.1).to(original or torch.float16).view(torch.int16)
    if buffer == "bitsmoe_scale_grid":
        grid = torch.full(shape, 0.25).half()
        if grid.numel():
            grid[:, 0] = -8.0
        return grid.view(torch.int16)
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def _layer(
    spec_of: Callable[[int, int], PackedSpec], widths: tuple[int, ...], shape: LayerShape
) -> PackedExperts:
    first = spec_of(0, 0)
    codes = torch.randint(len(widths), (3, shape.num_experts, shape.rank)) * SCALE_LEVELS
    codes[:, list(first.kept)] = 0
    if not first.is_tiled:
        codes += torch.randint(SCALE_LEVELS, codes.shape)
    index = layout.index_rows(codes.to(torch.uint8), widths, shape)
    spec = spec_of(index.words, index.rows if first.is_tiled else 0)
    tensors = {
        buffer: _values(buffer, size, dtype, spec)
        for buffer, (dtype, size) in spec.tensors().items()
        if buffer != "bitsmoe_row_codes"
    }
    if first.is_tiled and 16 in widths:  # rows of float16 bits
        tensors["bitsmoe_payload"] &= 0x3FFF3FFF
    return PackedExperts(
        row_codes=codes.to(torch.uint8),
        **{name.removeprefix("bitsmoe_"): tensor for name, tensor in tensors.items()},
    )


def _base(grid: str, hidden: int, kept: tuple[int, ...], has_bias: bool, **options: Any) -> Base:
    widths, shape = (0, 1, 2, 4, 16), LayerShape(3, hidden, 40)
    name = "model.layers.{}.mlp.experts"
    config = BitsMoEConfig(widths=widths, **options)
    sizes, tensors = _model(hidden, shape)
    layers = {}
    for layer in range(2):

        def spec_of(words: int, rows: int) -> PackedSpec:
            return PackedSpec(
                shape,
                widths,
                config.basis_bits,
                config.basis_group_size,
                config.input_bases,
                words,
                grid,
                has_bias,
                kept,
                "bfloat16",
                rows,
            )

        packed = _layer(spec_of, widths, shape)
        layers[name.format(layer)] = layer_manifest(shape, packed, torch.bfloat16, kept)
        tensors |= {f"{name.format(layer)}.{buffer}": tensor for buffer, tensor in packed.tensors()}
    stored = {**config.to_dict(), "grid": grid, "layers": layers, "other_tensors": record(tensors)}
    return Base({**sizes, "quantization_config": stored}, tensors)


def _model(hidden: int, shape: LayerShape) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and tensors of a model of two layers, without its experts."""
    config = Qwen3MoeConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=32,
        moe_intermediate_size=shape.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=shape.num_experts,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="float32",
    )
    tensors = AutoModelForCausalLM.from_config(config).state_dict()
    return config.to_diff_dict(), {n: t.clone() for n, t in tensors.items() if ".experts." not in n}


def bases() -> list[Base]:
    """Of every grid, with and without biases, kept experts and dense bases."""
    torch.manual_seed(0)
    return [
        _base("trellis", 32, (1,), True, basis_bits=4),
        _base("uniform", 32, (), False, basis_bits=16, joint_basis=False),
        _base("uniform", 64, (0, 2), False, basis_bits=8),
        _base("tiled", 128, (), False, basis_bits=8, basis_group_size=128),
        _base("tiled", 32, (2,), False, basis_bits=16, basis_group_size=128),
    ]


@dataclass
class Input:
    """A checkpoint that is being altered."""

    config: bytes
    files: dict[str, bytes]
    links: dict[str, str]


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(header: dict[str, Any] | str, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def _damage(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> bytes:
    """A few bits or bytes changed between two places."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(low, high or len(changed))
        changed[place] = rng.choice((changed[place] ^ (1 << rng.randrange(8)), rng.randrange(256), 0, 255))
    return bytes(changed)


_DTYPES = (
    "U8",
    "I8",
    "I16",
    "U16",
    "I32",
    "I64",
    "F16",
    "BF16",
    "F32",
    "F64",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "",
)


def _index_text(places: dict[str, Any]) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()


class Mutations:
    """Alters checkpoints by random numbers.

    Attributes:
        bases: sound checkpoints.
        kinds: name -> what alters an input, given random numbers and the number of its base.
    """

    def __init__(self) -> None:
        self.bases = bases()
        self.saved = [save(base.tensors, {"format": "pt"}) for base in self.bases]
        self.kinds: dict[str, Callable[[random.Random, int, Input], None]] = {
            "header bytes": self._header_bytes,
            "header entry": self._header_entry,
            "header offsets": self._header_offsets,
            "header text": self._header_text,
            "length": self._length,
            "cut or grown": self._cut,
            "data, hash as it was": self._data,
            "values, hash fixed": self._tensor_values,
            "shapes, hash fixed": self._tensor_shapes,
            "config bytes": self._config_bytes,
            "options": self._options,
            "manifest": self._manifest,
            "model sizes": self._sizes,
            "index": self._index,
            "shards and links": self._shards,
        }

    def input(self, number: int) -> tuple[str, Input]:
        """Kind and files of an input, the same at every call."""
        rng = random.Random(number)
        base = number % len(self.bases)
        kind = rng.choice(list(self.kinds))
        made = self.unaltered(base)
        self.kinds[kind](rng, base, made)
        return kind, made

    def unaltered(self, base: int) -> Input:
        """Files of a base."""
        return Input(json.dumps(self.bases[base].config).encode(), {FILE: self.saved[base]}, {})

    def _header_bytes(self, rng: random.Random, base: int, made: Input) -> None:
        data = made.files[FILE]
        made.files[FILE] = _damage(data, rng, 8, 8 + int.from_bytes(data[:8], "little"))

    def _header_entry(self, rng: random.Random, base: int, made: Input) -> None:
        header, body = _split(made.files[FILE])
        name = rng.choice([n for n in header if n != "__metadata__"])
        entry = header[name]
        change = rng.randrange(7)
        if change == 0:
            entry["dtype"] = rng.choice((*_DTYPES, *NASTY))
        elif change == 1:
            entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [2**32, 2**32], *NASTY))
        elif change == 2:
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(NASTY)
        elif change == 3:
            del header[name]
        elif change == 4:
            header[name + rng.choice(("x", ".bitsmoe_payload", "\x00", "\u202e"))] = header.pop(name)
        elif change == 5:
            header[name] = rng.choice(NASTY)
        else:
            other = rng.choice([n for n in header if n not in (name, "__metadata__")])
            header[name], header[other] = header[other], header[name]
        made.files[FILE] = _join(header, body)

    def _header_offsets(self, rng: random.Random, base: int, made: Input) -> None:
        header, body = _split(made.files[FILE])
        names = [n for n in header if n != "__metadata__"]
        first, second = rng.choice(names), rng.choice(names)
        offsets = header[first]["data_offsets"]
        change = rng.randrange(5)
        if change == 0:
            header[first]["data_offsets"] = list(header[second]["data_offsets"])
        elif change == 1:
            offsets[rng.randrange(2)] = rng.choice(NASTY)
        elif change == 2:
            offsets[rng.randrange(2)] += rng.choice((-4, -1, 1, 4, 64))
        elif change == 3:
            header[first]["data_offsets"] = offsets[::-1]
        else:
            gap = rng.choice((1, 8, 4096))
            for name in names:
                if header[name]["data_offsets"][0] >= offsets[1]:
                    header[name]["data_offsets"] = [n + gap for n in header[name]["data_offsets"]]
            body = body[: offsets[1]] + bytes(gap) + body[offsets[1] :]
        made.files[FILE] = _join(header, body)

    def _header_text(self, rng: random.Random, base: int, made: Input) -> None:
        header, body = _split(made.files[FILE])
        text = json.dumps(header)
        name = rng.choice([n for n in header if n != "__metadata__"])
        twice = f'{{"{name}": {json.dumps(header[name])}, {text[1:]}'
        nested = "[" * 100_000
        texts = (twice, nested, "", "{}", "[]", "null", "\ud800", text[:-1], text + "}", text + " " * 64)
        made.files[FILE] = _join(rng.choice(texts), body)

    def _length(self, rng: random.Random, base: int, made: Input) -> None:
        data = made.files[FILE]
        length = int.from_bytes(data[:8], "little")
        lengths = (0, 1, 2**31, 2**63, 2**64 - 1, 10**8, len(data), len(data) - 8, length - 1, length + 1)
        made.files[FILE] = rng.choice(lengths).to_bytes(8, "little") + data[8:]

    def _cut(self, rng: random.Random, base: int, made: Input) -> None:
        data = made.files[FILE]
        cut = data[: rng.randrange(len(data))]
        made.files[FILE] = rng.choice((cut, cut, data + bytes(rng.choice((1, 8, 4096))), b"", data * 2))

    def _data(self, rng: random.Random, base: int, made: Input) -> None:
        data = made.files[FILE]
        made.files[FILE] = _damage(data, rng, 8 + int.from_bytes(data[:8], "little"))

    def _rewritten(self, base: int, made: Input, tensors: dict[str, torch.Tensor], layer: str) -> None:
        """Write the tensors with the hashes that they have."""
        config = json.loads(json.dumps(self.bases[base].config))
        entry = config["quantization_config"]["layers"][layer]
        packed = {
            name.removeprefix(f"{layer}.bitsmoe_"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{layer}.bitsmoe_")
        }
        entry["sha256"] = tensor_digest(PackedExperts(**packed))
        entry["payload_words"] = packed["payload"].numel()
        if "row_gains" in packed:
            entry["stored_rows"] = packed["row_gains"].numel()
        made.config = json.dumps(config).encode()
        made.files[FILE] = save(tensors, {"format": "pt"})

    def _chosen(self, rng: random.Random, base: int) -> tuple[dict[str, torch.Tensor], str, str]:
        tensors = dict(self.bases[base].tensors)
        layer = f"model.layers.{rng.randrange(2)}.mlp.experts"
        names = [n for n in tensors if n.startswith(f"{layer}.bitsmoe_") and tensors[n].numel()]
        return tensors, layer, rng.choice(names)

    def _tensor_values(self, rng: random.Random, base: int, made: Input) -> None:
        tensors, layer, name = self._chosen(rng, base)
        tensor = tensors[name] = tensors[name].clone()
        flat, bits = tensor.view(-1), 8 * tensor.element_size()
        for _ in range(rng.choice((1, 1, 3, 20))):
            value = rng.choice((0, 255, 0x7C00, 0x7E00, 0xFC00, 0x7BFF, 0xFFFF, 0x7F80, rng.getrandbits(32)))
            value %= 2**bits
            signed = bits > 8 and value >= 2 ** (bits - 1)
            flat[rng.randrange(len(flat))] = value - 2**bits if signed else value
        if rng.random() < 0.1:
            flat[:] = flat[rng.randrange(len(flat))].clone()
        self._rewritten(base, made, tensors, layer)

    def _tensor_shapes(self, rng: random.Random, base: int, made: Input) -> None:
        tensors, layer, name = self._chosen(rng, base)
        tensor = tensors[name]
        tensors[name] = rng.choice(
            (
                tensor[: len(tensor) // 2].clone(),
                torch.cat([tensor, tensor]),
                tensor.float(),
                tensor.to(torch.int64),
                tensor.flatten().clone(),
                tensor[None].clone(),
                tensor[:0].clone(),
            )
        )
        self._rewritten(base, made, tensors, layer)

    def _config_bytes(self, rng: random.Random, base: int, made: Input) -> None:
        made.config = rng.choice(
            (
                _damage(made.config, rng),
                _damage(made.config, rng),
                made.config[: rng.randrange(len(made.config))],
                made.config.replace(b"{", b'{"hidden_size": 7, ', 1),
                b'{"a": ' * 50_000,
                b"[" * 100_000,
                b"\xff\xfe" + made.config,
                json.dumps(rng.choice(NASTY)).encode(),
                b'{"quantization_config": ' + json.dumps(rng.choice(NASTY)).encode() + b"}",
                made.config.replace(b"32", b"9" * rng.choice((20, 5000)), 1),
            )
        )

    def _with(self, made: Input, change: Callable[[dict[str, Any]], None]) -> None:
        config = json.loads(made.config)
        change(config)
        made.config = json.dumps(config).encode()

    def _options(self, rng: random.Random, base: int, made: Input) -> None:
        def change(config: dict[str, Any]) -> None:
            stored = config["quantization_config"]
            key = rng.choice((*stored, "new_option"))
            if rng.random() < 0.1:
                del stored[rng.choice(list(stored))]
            else:
                stored[key] = rng.choice(NASTY)

        self._with(made, change)

    def _manifest(self, rng: random.Random, base: int, made: Input) -> None:
        def change(config: dict[str, Any]) -> None:
            layers = config["quantization_config"]["layers"]
            name = rng.choice(list(layers))
            keys = (*layers[name], "kept_experts", "has_bias", "original_dtype", "stored_rows", "report")
            match rng.randrange(6):
                case 0:
                    del layers[name]
                case 1:
                    layers[name] = rng.choice(NASTY)
                case 2:
                    layers[rng.choice(("", "x", "model.layers.7.mlp.experts", name + ".a"))] = layers[name]
                case _:
                    layers[name][rng.choice(keys)] = rng.choice(NASTY)

        self._with(made, change)

    def _sizes(self, rng: random.Random, base: int, made: Input) -> None:
        def change(config: dict[str, Any]) -> None:
            keys = [key for key in config if key != "quantization_config"]
            config[rng.choice((*keys, "text_config", "num_local_experts"))] = rng.choice(NASTY)

        self._with(made, change)

    def _index(self, rng: random.Random, base: int, made: Input) -> None:
        made.files[SHARD] = made.files.pop(FILE)  # loaders look at no index where there is a FILE
        places: dict[str, Any] = dict.fromkeys(self.bases[base].tensors, SHARD)
        name = rng.choice(list(places))
        tricks = ("/etc/passwd", "config.json", "..", "C:\\x.safetensors", "pytorch_model.bin")
        paths = tuple(folder + SHARD for folder in ("../", "./", "a/../", "//"))
        match rng.randrange(5):
            case 0:
                places[name] = rng.choice((*tricks, *paths, *NASTY))
            case 1:
                del places[name]
            case 2:
                places["model.more"] = SHARD
            case 3:
                pass
            case _:
                made.files[INDEX] = _damage(_index_text(places), rng)
                return
        whole: Any = rng.choice((None,) * 8 + NASTY)
        made.files[INDEX] = _index_text(places) if whole is None else json.dumps(whole).encode()

    def _shards(self, rng: random.Random, base: int, made: Input) -> None:
        tensors = self.bases[base].tensors
        names = sorted(tensors)
        cut = rng.randrange(1, len(names))
        parts = [{n: tensors[n] for n in names[:cut]}, {n: tensors[n] for n in names[cut:]}]
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        made.files = {}
        match rng.randrange(5):
            case 0:
                parts[1][names[0]] = tensors[names[0]]
            case 1:
                del parts[0][names[rng.randrange(cut)]]
            case 2:
                made.links[files[0]] = rng.choice(
                    (f"../{FILE}", "/etc/hostname", files[0], "/dev/zero", "..")
                )
            case 3:
                places[names[0]] = files[1]
        if rng.random() < 0.5:
            made.files[INDEX] = _index_text(places)
        for file, part in zip(files, parts, strict=True):
            if file not in made.links:
                made.files[file] = save(part, {"format": "pt"})
