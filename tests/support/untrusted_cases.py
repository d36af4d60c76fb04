"""A packed checkpoint, and everything that others may have done to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.checkpoint.manifest import tensor_digest
from bitsmoe_plugin.codec.layout import PackedExperts

LAYER = "model.layers.1.mlp.experts"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def sound(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint of a few thousand weights, one expert of it kept."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_model("qwen3_moe").save_pretrained(folder / "dense")
    tokens = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    config = BitsMoEConfig(
        bits=8,
        dataset=tokens.tolist(),
        sequence_length=16,
        method="paper-v2",
        basis_bits=4,
        basis_group_size=16,
        super_experts={LAYER: [1]},
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    model.save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """One to be altered."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def _header(folder: Path, change: Callable[[dict[str, Any]], Any], body: bytes = b"") -> None:
    data = (folder / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = (change(header) or json.dumps(header)).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + body)


def tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Alter tensors, and write the hashes and fingerprints that they have now."""
    from bitsmoe_plugin.checkpoint.other_tensors import record

    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    prefix = f"{LAYER}.bitsmoe_"
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    def fix(values: dict[str, Any]) -> None:
        values["quantization_config"]["layers"][LAYER]["sha256"] = tensor_digest(PackedExperts(**found))
        values["quantization_config"]["other_tensors"] = record(tensors)

    edit(folder, fix)


def _set(buffer: str, value: int, place: int = 0) -> Callable[[Path], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{LAYER}.bitsmoe_{buffer}"].flatten()[place] = value

    return lambda folder: tensors(folder, change)


def _option(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda v: v["quantization_config"].update({key: value}))


def _size(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit(
        folder, lambda v: v["quantization_config"]["layers"][LAYER].update({key: value})
    )


def _model(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda v: v.update({key: value}))


def _entry(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: _header(folder, lambda h: h[f"{LAYER}.bitsmoe_payload"].update({key: value}))


def _overlap(header: dict[str, Any]) -> None:
    header[f"{LAYER}.bitsmoe_input_scales"]["data_offsets"] = header[f"{LAYER}.bitsmoe_output_scales"][
        "data_offsets"
    ]


def _hole(header: dict[str, Any]) -> None:
    last = max((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][1])
    last["data_offsets"] = [n + 64 for n in last["data_offsets"]]


def _twice(header: dict[str, Any]) -> str:
    name = f"{LAYER}.bitsmoe_payload"
    return f"{{{json.dumps(name)}: {json.dumps(header[name])}, {json.dumps(header)[1:]}"


def _flip(name: str) -> Callable[[Path], None]:
    """One bit, and no hash fixed."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        tensors[name].view(-1).view(torch.uint8)[5] ^= 4
        save_file(tensors, folder / FILE, metadata={"format": "pt"})

    return change


def _index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        places: dict[str, Any] = dict.fromkeys(load_file(folder / FILE), SHARD)
        (folder / FILE).rename(folder / SHARD)  # transformers looks at no index where there is a FILE
        change(places)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return write


def _elsewhere(folder: Path) -> None:
    """A shard that is a link out of the directory."""
    shutil.move(folder / FILE, folder.parent / "elsewhere.safetensors")
    (folder / FILE).symlink_to("../elsewhere.safetensors")


def _two_shards(folder: Path, named: bool = True) -> None:
    """The same tensor in both."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (folder / files[0]).write_bytes(save(tensors, {"format": "pt"}))
    (folder / files[1]).write_bytes(save({EMBEDDING: tensors[EMBEDDING]}, {"format": "pt"}))
    places = {**dict.fromkeys(tensors, files[0]), EMBEDDING: files[1]}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _deep(folder: Path) -> None:
    nested: list[Any] = []
    for _ in range(400):
        nested = [nested]
    edit(folder, lambda v: v["quantization_config"]["layers"].update({LAYER: nested}))


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-100]), "as safetensors"),
    "file grown": (lambda f: _header(f, lambda h: None, bytes(64)), "as safetensors"),
    "empty file": (lambda f: (f / FILE).write_bytes(b""), "as safetensors"),
    "absurd header": (
        lambda f: (f / FILE).write_bytes(b"\xff" * 8 + (f / FILE).read_bytes()[8:]), "its header would have"
    ),
    "deep header": (lambda f: _header(f, lambda h: "[" * 100_000), "its header cannot be read"),
    "name twice in a header": (lambda f: _header(f, _twice), "twice"),
    "overlapping offsets": (lambda f: _header(f, _overlap), "as safetensors"),
    "hole between offsets": (lambda f: _header(f, _hole), "as safetensors"),
    "offsets beyond the file": (_entry("data_offsets", [0, 2**40]), "as safetensors"),
    "offsets backwards": (_entry("data_offsets", [64, 0]), "as safetensors"),
    "negative offset": (_entry("data_offsets", [-64, 0]), "as safetensors"),
    "absurd shape": (_entry("shape", [2**62, 2**62]), "has no shape"),
    "shape is no size": (_entry("shape", [True]), "has no shape"),
    "unknown dtype": (_entry("dtype", "I999"), "as safetensors"),
    "bit of the payload": (_flip(f"{LAYER}.bitsmoe_payload"), "SHA-256"),
    "bit of the row codes": (_flip(f"{LAYER}.bitsmoe_row_codes"), "SHA-256"),
    "bit of a router": (_flip("model.layers.1.mlp.gate.weight"), r"mlp\.gate\.weight differs"),
    "packed tensor missing": (lambda f: _header(f, lambda h: None) or _drop(f, "payload"), "missing"),
    "other tensor missing": (
        lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), r"model\.norm\.weight is missing"
    ),
    "surplus packed tensor": (
        lambda f: rewrite(f, lambda t: t.update({f"{LAYER}.bitsmoe_more": torch.zeros(2)})), "bitsmoe_more"
    ),
    "wrong dtype": (
        lambda f: rewrite(f, lambda t: t.update({_P: t[_P].float()})), r"bitsmoe_payload is F32"
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({_P: t[_P][:-1].clone()})), r"bitsmoe_payload is I32"
    ),
    "width beyond the config": (_option("widths", [0, 1]), "a width that the config lacks"),
    "rows beyond the payload": (_set("row_codes", 7 << 5), "row codes describe"),
    "NaN in a scale grid": (_set("scale_grid", 0x7E00), r"bitsmoe_scale_grid holds NaN"),
    "infinite scale of a basis": (_set("input_scales", 0x7C00), r"bitsmoe_input_scales holds NaN or inf"),
    "NaN in a basis": (_set("output_scales", -512, 3), r"bitsmoe_output_scales holds NaN"),
    "absurd row scale": (_set("scale_grid", 0x7BFF), r"bitsmoe_scale_grid describes row scales"),
    "falling row scales": (_set("scale_grid", -0x5000, 32), r"bitsmoe_scale_grid describes row scales"),
    "NaN in a kept expert": (
        lambda f: tensors(f, lambda t: t[f"{LAYER}.bitsmoe_kept_input"].fill_(0x7FC00000)),
        r"bitsmoe_kept_input holds NaN",
    ),
    "kept expert out of range": (_size("kept_experts", [4]), "kept_experts"),
    "kept expert twice": (_size("kept_experts", [1, 1]), "kept_experts"),
    "kept expert with rows": (_size("kept_experts", [2]), "kept expert has rows"),
    **{
        f"num_experts={value!r}"[:24]: (_size("num_experts", value), "num_experts|is U8")
        for value in (-1, 0, True, 4.0, "4", None, [4], 5, 2**31, 10**40, float("nan"))
    },
    "hidden_size of a layer": (_size("hidden_size", 64), "hidden_size is 64"),
    "absurd payload": (_size("payload_words", 2**37), "bitsmoe_payload is"),
    "layer is no object": (_option("layers", {LAYER: 7}), LAYER),
    "layer nested deep": (_deep, LAYER),
    "layer named elsewhere": (
        lambda f: edit(f, lambda v: v["quantization_config"]["layers"].update({"x": {}})), "x"
    ),
    "future version": (_option("format_version", 99), "format version 99.*[Uu]pgrade"),
    "version is no number": (_option("format_version", "3"), "format_version"),
    "unknown option": (_option("kernel_source", "x"), "kernel_source"),
    "bits": (_option("bits", float("nan")), "bits=nan"),
    "group size": (_option("basis_group_size", 128), "basis_group_size 128 does not divide"),
    "widths": (_option("widths", [0, 2, 2]), "widths="),
    "depth": (_model("num_hidden_layers", 4000), "num_hidden_layers=4000"),
    "absurd depth": (_model("num_hidden_layers", 10**9), "num_hidden_layers=1000000000"),
    "absurd vocabulary": (_model("vocab_size", 10**12), "vocab_size=1000000000000"),
    "absurd hidden size": (_model("hidden_size", 2**40), "hidden_size="),
    "absurd experts": (_model("num_local_experts", 10**9), "num_local_experts=1000000000"),
    "absurd positions": (_model("max_position_embeddings", 2**31), "max_position_embeddings=2147483648"),
    "absurd scaling of positions": (
        _model("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 10**9}), "times 10{9}"
    ),
    "more experts per token than there are": (_model("num_experts_per_tok", 5), "num_experts_per_tok=5"),
    "code of its own": (
        lambda f: edit(f, lambda v: v.update(model_type="own", auto_map={"AutoConfig": "own.Config"})),
        "not run"
    ),
    "file outside": (_index(lambda p: p.update({EMBEDDING: "../x.safetensors"})), "x.safetensors"),
    "absolute path": (_index(lambda p: p.update({EMBEDDING: "/etc/passwd"})), "passwd"),
    "pickle in the index": (_index(lambda p: p.update({EMBEDDING: "pytorch_model.bin"})), "pytorch_model"),
    "pickle in place of the file": (
        lambda f: (f / FILE).rename(f / "pytorch_model.bin"), "lacks safetensors files"
    ),
    "index says less": (_index(lambda p: p.pop(EMBEDDING)), "embed_tokens.*no file"),
    "index says more": (_index(lambda p: p.update({"model.more": SHARD})), r"model\.more"),
    "index without map": (lambda f: _index(dict.clear)(f), "weight_map"),
    "link out of the directory": (_elsewhere, "leads out of"),
    "tensor in two shards": (_two_shards, "a second time"),
}  # fmt: skip
_P = f"{LAYER}.bitsmoe_payload"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Alter tensors, and nothing else."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def _drop(folder: Path, buffer: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"{LAYER}.bitsmoe_{buffer}"))
