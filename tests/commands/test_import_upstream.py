"""Checkpoints of the method authors: converted, loaded and run, or refused with nothing left."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from upstream_support import UpstreamLayer, fill_dense, random_upstream_layer, write_upstream

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.base.work_directory import locked
from bitsmoe_plugin.cli import main
from bitsmoe_plugin.commands.import_upstream import convert
from bitsmoe_plugin.commands.import_upstream.convert import import_upstream
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.errors import CheckpointError, ConfigError, QuantizationError
from bitsmoe_plugin.integrations.dequantize_checkpoint import dequantize_checkpoint
from bitsmoe_plugin.runtime import dispatch
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

PROMPT = torch.tensor([[5, 6, 7, 11, 13, 60, 61, 62, 3, 9]])
SIZES = {"hidden_size": 32, "moe_intermediate_size": 160}


def build(
    tiny_model: Any, folder: Path, model_type: str = "qwen3_moe", **options: Any
) -> tuple[Path, Any, dict[str, UpstreamLayer]]:
    """A checkpoint as the authors write it, the model with the dense weights, and its layers."""
    sizes = {**SIZES, **options.pop("sizes", {})}
    model = tiny_model(model_type, **sizes)
    hidden, size = sizes["hidden_size"], sizes["moe_intermediate_size"]
    ranks = options.pop("ranks", (hidden, hidden - 3, hidden - 1))
    rng = random.Random(0)
    moes = [name.removesuffix(".experts") for name, _ in model.named_modules() if name.endswith(".experts")]
    layers = {moe: random_upstream_layer(rng, 4, hidden, size, ranks, **options) for moe in moes}
    path = write_upstream(folder / "upstream", model, layers)
    return path, fill_dense(model, layers), layers


@pytest.fixture(scope="module")
def upstream(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Two layers of Qwen3-MoE with one unpacked expert each, and the same with dense weights."""
    torch.manual_seed(0)
    path, dense, _ = build(tiny_model, tmp_path_factory.mktemp("upstream"), dense=(1,))
    return path, dense


@pytest.fixture(scope="module")
def converted(upstream: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    import_upstream(upstream[0], out)
    return out


@torch.no_grad()
def assert_same_outputs(model: Any, dense: Any, tolerance: float = 1e-2) -> None:
    """Relative to the largest logit. Measured: 3e-3 with compiled kernels, judged in test_upstream_layer."""
    found, wanted = model(PROMPT).logits, dense(PROMPT).logits
    assert float((found - wanted).abs().max()) < tolerance * float(wanted.abs().max())


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen3_next": {"sizes": {"layer_types": ["linear_attention", "full_attention"]}},
    "deepseek_v2": {},
}
EIGHT_BITS = {"basis_bits": 8, "sizes": {"hidden_size": 128}, "ranks": (128, 64, 128), "widths": (0, 2, 3)}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [*FAMILIES.items(), ("qwen3_moe", EIGHT_BITS)],
    ids=[*FAMILIES, "8-bit bases"],
)
def test_a_converted_model_is_the_model_with_the_dense_weights(
    model_type: str, options: dict[str, Any], tiny_model: Any, tmp_path: Path, monkeypatch
) -> None:
    """The families that the authors released, and both kinds of bases."""
    path, dense, layers = build(tiny_model, tmp_path, model_type, **options)
    assert main(["import-upstream", str(path), str(tmp_path / "out")]) == 0
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model.eval()
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(isinstance(module, BitsMoEExperts) for module in model.modules()) == len(layers)
    assert_same_outputs(model, dense)
    with monkeypatch.context() as patch:  # in plain torch: float32 sums in another order
        patch.setattr(dispatch, "_on_cpu", lambda *arguments: (None, "this is a test"))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        with pytest.warns(UserWarning, match="this is a test"):
            assert_same_outputs(plain, dense, 1e-4)
    tokens = model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 14)
    assert not list(tmp_path.glob("*.work"))


def test_a_converted_model_is_made_dense(upstream: tuple[Path, Any], converted: Path, tmp_path: Path) -> None:
    """The grid "tiled", with experts that are stored as they were."""
    dequantize_checkpoint(converted, tmp_path / "dense")
    assert_same_outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), upstream[1], 1e-4)


def test_unpacked_experts_stay_as_they_were(upstream: tuple[Path, Any], converted: Path) -> None:
    """They are computed in float16, as they are stored."""
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    assert_same_outputs(model, upstream[1])
    kept = [m.spec.kept for m in model.modules() if isinstance(m, BitsMoEExperts)]
    assert kept == [(1,), (1,)]


def all_tensors(directory: Path) -> dict[str, Tensor]:
    """Of all files of a checkpoint."""
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_everything_stored_is_counted(converted: Path) -> None:
    """Bytes of the experts in the files, over the weights of the experts of the model."""
    report = inspect_checkpoint(converted)
    tensors = [
        t for file in converted.glob("*.safetensors") for n, t in load_file(file).items() if "bitsmoe_" in n
    ]
    stored = sum(t.nbytes for t in tensors)
    weights = 2 * 3 * 4 * SIZES["hidden_size"] * SIZES["moe_intermediate_size"]
    assert report["expert_bytes"] == stored
    assert report["bits_per_weight"] == 8 * stored / weights
    config = json.loads((converted / "config.json").read_text())["quantization_config"]
    assert config["bits"] == pytest.approx(report["bits_per_weight"], abs=1e-4)


def test_the_command_line_reads_it(tiny_model: Any, moe_tiny_path: Path, tmp_path: Path, capfd) -> None:
    """inspect and evaluate, with the tokenizer that stood beside the authors' files."""
    vocabulary = json.loads((moe_tiny_path / "config.json").read_text())["vocab_size"]
    source, _, _ = build(tiny_model, tmp_path, sizes={"vocab_size": vocabulary})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(moe_tiny_path / name, source / name)
    out = str(tmp_path / "out")
    assert main(["import-upstream", str(source), out]) == 0
    assert "bits per expert weight" in capfd.readouterr().err
    assert main(["inspect", out]) == 0
    assert "row_scales" in capfd.readouterr().out
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "a b c d e f g h " * 40}) + "\n")
    arguments = ["--dataset", str(text), "--sequence-length", "16", "--json"]
    assert main(["evaluate", out, *arguments]) == 0
    assert json.loads(capfd.readouterr().out)["perplexity"] > 1


def test_it_is_saved_again_as_it_is(converted: Path, tmp_path: Path) -> None:
    """Guards the grid's tensors against being lost or cast by save_pretrained and by a cast of the model."""
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    before, after = all_tensors(converted), all_tensors(tmp_path / "saved")
    packed = [name for name in before if ".bitsmoe_" in name]
    assert packed
    for name in packed:
        assert torch.equal(before[name], after[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved") is not None


def test_nothing_is_quantized_to_the_grid() -> None:
    """The grid needs rows that somebody else has rounded."""
    with pytest.raises(ConfigError, match="grid='tiled' is not allowed"):
        BitsMoEConfig(grid="tiled")


def test_other_files_come_along(upstream: tuple[Path, Any], tmp_path: Path) -> None:
    """Tokenizer and generation defaults; no remote code, no mark of the authors' loader."""
    source = Path(shutil.copytree(upstream[0], tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling_x.py").write_text("raise SystemExit\n")
    import_upstream(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= names
    assert "modeling_x.py" not in names
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "bitsmoe", "bitsmoe_model_type"} & set(written)


def test_tensors_of_prediction_layers_come_along(upstream: tuple[Path, Any], tmp_path: Path) -> None:
    """Experts of a layer for multi-token prediction are dense, and no MoE layer of the model."""
    source = copy_of(upstream[0], tmp_path)
    name = "mtp.layers.0.mlp.experts.0.gate_proj.weight"
    rewrite(source, lambda tensors: tensors.update({name: torch.ones(3, 5)}))
    import_upstream(source, tmp_path / "out")
    assert torch.equal(all_tensors(tmp_path / "out")[name], torch.ones(3, 5))


def test_files_are_bounded(upstream: tuple[Path, Any], tmp_path: Path, monkeypatch) -> None:
    """One file per MoE layer, others as they fill up; all of them are read back."""
    monkeypatch.setattr(convert, "FILE_BYTES", 5000)
    import_upstream(upstream[0], tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 4
    assert sorted(set(index["weight_map"].values())) == files
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same_outputs(model, upstream[1])


PEAK = """
import sys
from pathlib import Path
from peak_memory import watched
from bitsmoe_plugin.commands.import_upstream.convert import import_upstream
from bitsmoe_plugin.base.work_directory import locked
print(watched(lambda: import_upstream(*map(Path, sys.argv[1:]))))
"""


def test_memory_is_bounded_by_a_layer(tiny_model: Any, tmp_path: Path) -> None:
    """20 layers of 0.8 MB more, in a process of their own, because freed memory is not always given back."""
    sizes = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 2048}
    layer = random_upstream_layer(random.Random(0), 2, 32, 2048, (32, 32, 32), widths=(16,))
    peaks, sizes_found = [], []
    for count in (4, 24):
        model = tiny_model("qwen3_moe", num_hidden_layers=count, **sizes)
        layers = {f"model.layers.{i}.mlp": layer for i in range(count)}
        path, out = write_upstream(tmp_path / f"upstream-{count}", model, layers), tmp_path / f"out-{count}"
        command = [sys.executable, "-c", PEAK, str(path), str(out)]
        folders = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])
        run = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": folders}, capture_output=True, text=True, check=True
        )
        peaks.append(int(run.stdout))
        sizes_found.append(inspect_checkpoint(out)["expert_bytes"])
    more, gained = sizes_found[1] - sizes_found[0], peaks[1] - peaks[0]
    print(f"{more} more bytes of experts take {gained} more bytes of memory")
    assert gained < more / 3


def copy_of(path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder / "copy"))


def rewrite(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _without(name: str):
    return lambda tensors: tensors.pop(name)


def _with(name: str, tensor: Tensor | None = None):
    return lambda tensors: tensors.update({name: torch.zeros(1) if tensor is None else tensor})


M = "model.layers.1.mlp"
BAD = {
    "buffer is missing": (_without(f"{M}.experts.2.up_scale_buffer"), "experts.2.up_scale_buffer is missing"),
    "expert is missing": (
        lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(f"{M}.experts.3.")],
        "experts.3.gate_payload_buffer is missing",
    ),
    "unpacked expert lacks a weight": (
        _without(f"{M}.experts.1.down_proj.weight"), "experts.1.down_proj.weight is missing"
    ),
    "expert is packed and unpacked": (
        _with(f"{M}.experts.2.gate_proj.weight"), "experts.2 is both packed and unpacked"
    ),
    "unpacked expert of another shape": (
        _with(f"{M}.experts.1.up_proj.weight"), r"experts.1.up_proj.weight is .*\[160, 32\]"
    ),
    "unpacked experts of several dtypes": (
        _with(f"{M}.experts.1.up_proj.weight", torch.zeros(160, 32)), "several dtypes"
    ),
    "buffer that the format lacks": (_with(f"{M}.experts.2.up_extra_buffer"), "up_extra_buffer is no tensor"),
    "expert that the model lacks": (_with(f"{M}.experts.4.up_s_buffer"), "4.up_s_buffer is no tensor"),
    "layer that the model lacks": (
        _with("model.layers.7.mlp.experts.0.up_s_buffer"), "belongs to no MoE layer"
    ),
    "basis is missing": (_without(f"{M}.shared_vh_up_proj"), "mlp.shared_vh_up_proj is missing"),
    "half a basis": (_with(f"{M}.shared_u_down_qweight"), "shared_u_down is stored in 16 and in 8 bits"),
    "basis that the format lacks": (_with(f"{M}.shared_vh_more"), "shared_vh_more is no tensor"),
    "basis of another shape": (
        _with(f"{M}.shared_vh_up_proj", torch.zeros(32, 31).half()), r"shared_vh_up_proj is \[32, 31\]"
    ),
    "scale that is no number": (
        lambda tensors: tensors[f"{M}.experts.2.up_scale_buffer"].fill_(float("nan")), "not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused_and_nothing_is_left(
    case: str, upstream: tuple[Path, Any], tmp_path: Path, capfd
) -> None:
    """One line that names the tensor; neither a checkpoint nor a work directory."""
    change, message = BAD[case]
    source = copy_of(upstream[0], tmp_path)
    rewrite(source, change)
    with pytest.raises(CheckpointError, match=message):
        import_upstream(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert main(["import-upstream", str(source), str(tmp_path / "out")]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()[-1].split("bitsmoe: error: ")) == 2


def _edit(**changes: Any):
    def change(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        config.update(changes)
        (source / "config.json").write_text(json.dumps(config))

    return change


BAD_FILES = {
    "not marked": (_edit(bitsmoe=None), "no checkpoint of the BitsMoE authors"),
    "already ours": (_edit(quantization_config={"quant_method": "bitsmoe"}), "and a quantization_config"),
    "another activation": (_edit(hidden_act="gelu"), "SiLU"),
    "unknown family": (_edit(model_type="unheard_of"), "unheard_of"),
    "no config": (lambda source: (source / "config.json").unlink(), "cannot be read"),
    "damaged config": (lambda source: (source / "config.json").write_text("[1"), "cannot be read"),
    "other neurons": (_edit(moe_intermediate_size=40), "no multiple of 32"),
    "no files": (lambda source: (source / "model.safetensors").unlink(), "lacks model.safetensors"),
    "truncated file": (
        lambda source: (source / "model.safetensors").write_bytes(
            (source / "model.safetensors").read_bytes()[:-100]
        ),
        "cannot be read as safetensors",
    ),
    "damaged index": (
        lambda source: (source / "model.safetensors.index.json").write_text("{}"), "is damaged"
    ),
    "file of the index is missing": (
        lambda source: (source / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "other.safetensors"}}'
        ),
        "lacks other.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_directories_are_refused(case: str, upstream: tuple[Path, Any], tmp_path: Path) -> None:
    change, message = BAD_FILES[case]
    source = copy_of(upstream[0], tmp_path)
    change(source)
    with pytest.raises(CheckpointError, match=message):
        import_upstream(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_name_in_two_files_is_refused(upstream: tuple[Path, Any], tmp_path: Path) -> None:
    source = copy_of(upstream[0], tmp_path)
    shutil.copy(source / "model.safetensors", source / "second.safetensors")
    names = {"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(names))
    with pytest.raises(CheckpointError, match="stands a second time in"):
        import_upstream(source, tmp_path / "out")


def test_layers_with_different_bases_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    """Our config has one width of bases for all layers."""
    model = tiny_model("qwen3_moe", **{**SIZES, "hidden_size": 128})
    rng = random.Random(0)
    layers = {
        f"model.layers.{i}.mlp": random_upstream_layer(
            rng, 4, 128, 160, (128, 128, 128), basis_bits=bits, widths=(0, 1)
        )
        for i, bits in enumerate((8, 16))
    }
    path = write_upstream(tmp_path / "mixed", model, layers)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts has bases of 16 bits"):
        import_upstream(path, tmp_path / "out")


def test_empty_bases_of_the_release_do_not_count(tiny_model: Any, tmp_path: Path) -> None:
    """The authors' update leaves them in place where it stores 8 bits."""
    path, _, _ = build(tiny_model, tmp_path, **EIGHT_BITS)
    empty = {f"model.layers.{i}.mlp.shared_u_down": torch.zeros(0).half() for i in (0, 1)}
    rewrite(path, lambda tensors: tensors.update(empty))
    import_upstream(path, tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out")["parts"]["bases"] > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_conversion_leaves_nothing(
    error: type[BaseException], layer: int, upstream: tuple[Path, Any], tmp_path: Path, monkeypatch
) -> None:
    """And the same command then runs."""
    real, calls = convert.convert_layer, []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == layer + 1:
            raise error
        return real(*arguments)

    monkeypatch.setattr(convert, "convert_layer", stopping)
    with pytest.raises(error):
        import_upstream(upstream[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(convert, "convert_layer", real)
    import_upstream(upstream[0], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("step", ["save_file", "_name_files", "publish"])
def test_a_full_disk_is_named_and_leaves_nothing(
    step: str, upstream: tuple[Path, Any], tmp_path: Path, monkeypatch
) -> None:
    """Guards against the system's bare error, and against half of a checkpoint."""

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, step, full)
    with pytest.raises(QuantizationError, match=r"cannot be written.*No space left.*make room"):
        import_upstream(upstream[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_leaves_does_not_load_and_is_replaced(
    upstream: tuple[Path, Any], tmp_path: Path, monkeypatch
) -> None:
    """A process that is killed runs no handler: everything is written but the last step."""

    class Killed(BaseException):
        pass

    def kill(*arguments: Any) -> None:
        raise Killed

    monkeypatch.setattr(convert, "_quantization_config", kill)
    monkeypatch.setattr(convert, "staging", locked)
    with pytest.raises(Killed):
        import_upstream(upstream[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    debris = tmp_path / "out.work" / "checkpoint"
    assert list(debris.glob("*.safetensors"))
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(debris)
    monkeypatch.undo()
    import_upstream(upstream[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_nothing_is_overwritten(upstream: tuple[Path, Any], tmp_path: Path) -> None:
    """Neither a directory that is there nor finished layers of bitsmoe quantize."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(QuantizationError, match="not empty"):
        import_upstream(upstream[0], tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    work = tmp_path / "other.work"
    work.mkdir()
    (work / "layer-0.safetensors").write_bytes(b"finished")
    with pytest.raises(QuantizationError, match="bitsmoe quantize has finished"):
        import_upstream(upstream[0], tmp_path / "other")
    assert (work / "layer-0.safetensors").read_bytes() == b"finished"


def test_altered_rows_are_refused_when_it_is_loaded(converted: Path, tmp_path: Path) -> None:
    """Scales and gains belong to what the hashes cover."""
    for buffer in ("tile_scales", "row_gains"):
        copy = Path(shutil.copytree(converted, tmp_path / buffer))
        name = f"model.layers.0.mlp.experts.bitsmoe_{buffer}"
        file = next(file for file in copy.glob("*.safetensors") if name in load_file(file))
        tensors = load_file(file)
        tensors[name].flatten()[3] ^= 1
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="SHA-256"):
            AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("rows", [None, -1, 5, "3"])
def test_an_altered_number_of_rows_is_refused(rows: Any, converted: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(converted, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.mlp.experts"]["stored_rows"] = rows
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts"):
        AutoModelForCausalLM.from_pretrained(copy)
