"""Quantization that reads a model layer by layer, against the same with the whole model in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peak_memory import measured
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig, ConfigError, QuantizationError
from bitsmoe_plugin.commands.bench.checkpoint import qwen3_moe, write_checkpoint
from bitsmoe_plugin.models import streamed_experts
from bitsmoe_plugin.models.families import find_moe_layers, read_biases, read_experts
from bitsmoe_plugin.models.streamed_experts import StreamedExperts
from bitsmoe_plugin.pipeline import quantize_model
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token")
TOKENS = torch.randint(1, 64, (8, 32), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"bits": 8, "sequence_length": 32, "basis_group_size": 16, "held_out": 0.25}


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All packed tensors of a model."""
    return {
        f"{name}.{buffer}": tensor
        for name, module in model.named_modules()
        if isinstance(module, BitsMoEExperts)
        for buffer, tensor in module.packed().tensors()
    }


def save_fused(model: Any, directory: Path) -> None:
    """A checkpoint whose tensors are named and shaped as in memory."""
    model.save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, directory / "model.safetensors")


def in_memory(directory: Path, **options: Any) -> tuple[nn.Module, BitsMoEConfig]:
    """The reference: load everything, then quantize."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    return model, quantize_model(model, TOKENS, BitsMoEConfig(**{**OPTIONS, **options}))


def streamed(directory: Path, **options: Any) -> Any:
    """The same, the experts read layer by layer."""
    config = BitsMoEConfig(**{**OPTIONS, **options}, dataset=[TOKENS.flatten().tolist()])
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)


def assert_same(packed: nn.Module, config: BitsMoEConfig, reference: Any) -> None:
    """Bitwise the same packed layers, manifest and other tensors."""
    model, wanted = reference
    tensors = packed_tensors(packed)
    assert tensors.keys() == packed_tensors(model).keys()
    assert len(tensors) > 0
    for name, tensor in packed_tensors(model).items():
        assert torch.equal(tensor, tensors[name]), name
    assert json.dumps(config.layers) == json.dumps(wanted.layers)
    assert config.calibration == wanted.calibration
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, packed.state_dict()[name]), name


@pytest.mark.parametrize("stored", ["fused", "per expert"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_streaming_equals_in_memory(family: str, stored: str, tiny_model: Any, tmp_path: Path) -> None:
    """Guards against another conversion, order or dtype of the experts than the model itself has. Mixtral
    has other names on disk than in memory, DeepSeek a dense layer and shared experts."""
    model = tiny_model(family, num_hidden_layers=3).bfloat16()
    (save_fused if stored == "fused" else type(model).save_pretrained)(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        fused = any(name.endswith("experts.down_proj") for name in list(file.keys()))
    assert fused == (stored == "fused")
    packed = streamed(tmp_path)
    assert_same(packed, packed.config.quantization_config, in_memory(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_oss", {}),
        ("llama4_text", {"interleave_moe_layer_step": 2, "moe_layers": [1], "num_experts_per_tok": 1}),
    ],
)
def test_streaming_of_other_layouts_equals_in_memory(
    family: str, changes: Any, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards transposed and interleaved weights, biases and kept experts, all read layer by layer."""
    model = tiny_model(family, layer_types=["full_attention"] * 2, **changes).bfloat16()
    for name, parameter in model.named_parameters():
        if "experts" in name and name.endswith("_bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    layer = find_moe_layers(model)[-1]
    options = {"super_experts": {layer.name: [1, 3]}, "bits": 14}
    reference = in_memory(tmp_path, **options)
    read: list[str] = []
    load = StreamedExperts._load
    monkeypatch.setattr(
        StreamedExperts, "_load", lambda self, layer: (load(self, layer), read.append(layer.name))
    )
    packed = streamed(tmp_path, **options)
    assert read == 2 * [layer.name for layer in find_moe_layers(model)]
    assert_same(packed, packed.config.quantization_config, reference)
    stored = packed.get_submodule(layer.name).packed()
    weights, biases = read_experts(layer.module), read_biases(layer.module)
    assert torch.equal(stored.kept_output.view(torch.bfloat16), weights.down[[1, 3]])
    assert torch.equal(stored.kept_input.view(torch.bfloat16)[:, 1], weights.up[[1, 3]])
    assert (biases is None) == (family == "llama4_text")
    if biases is not None:
        assert torch.equal(stored.input_bias.view(torch.bfloat16)[:, 0], biases.gate)
        assert torch.equal(stored.output_bias.view(torch.bfloat16), biases.down)


@pytest.mark.parametrize("options", [{"sequential": False}, {"method": "paper-v2"}, {"scope": "layer"}])
def test_streaming_equals_in_memory_with_other_options(options: Any, tiny_model: Any, tmp_path: Path) -> None:
    """Guards the other ways through the second pass."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    packed = streamed(tmp_path, **options)
    assert_same(packed, packed.config.quantization_config, in_memory(tmp_path, **options))


def test_sharded_checkpoint_saves_the_same_files(tiny_model: Any, tmp_path: Path) -> None:
    """Guards tensors of one layer in several shards, and that a model which was streamed is saved under
    the names that its family has on disk: transformers reverts what it noted when it loaded."""
    tiny_model("mixtral", num_hidden_layers=3).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    reference, config = in_memory(tmp_path / "dense")
    packed = streamed(tmp_path / "dense")
    assert_same(packed, packed.config.quantization_config, (reference, config))
    packed.save_pretrained(tmp_path / "packed")
    names = load_file(tmp_path / "packed" / "model.safetensors").keys()
    assert any(".block_sparse_moe.gate." in name for name in names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, packed(TOKENS).logits)


def test_only_one_layer_of_experts_is_in_memory(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the point of it: whenever a layer is read, no other layer's experts are there, and every
    layer is read once in each pass."""
    tiny_model("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path)
    read: list[str] = []
    load = StreamedExperts._load

    def watched(self: StreamedExperts, layer: Any) -> None:
        dense = {name for name, _ in self._model.named_parameters() if ".bitsmoe_" not in name}
        assert [name for name in dense if ".experts." in name] == []
        load(self, layer)
        read.append(layer.name)
        assert len(find_moe_layers(self._model)) == 1

    monkeypatch.setattr(StreamedExperts, "_load", watched)
    packed = streamed(tmp_path)
    assert read == [f"model.layers.{i}.mlp.experts" for i in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert not any(parameter.is_meta for parameter in packed.parameters())


def _without(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _drop_layer(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1.mlp.experts" in name]:
        del tensors[name]


def _drop_down(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1.mlp.experts" in name and "down_proj" in name]:
        del tensors[name]


def _drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]


@pytest.mark.parametrize("change", [_drop_layer, _drop_down, _drop_one])
def test_missing_experts_are_refused(change: Any, tiny_model: Any, tmp_path: Path) -> None:
    """Guards against what transformers does: it warns, and goes on with random numbers."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    _without(tmp_path, change)
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.experts"):
        streamed(tmp_path)


def test_file_that_changes_between_the_passes_is_refused(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against rounding other weights than the plan was made for."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    load, reads = StreamedExperts._load, [0]

    def altered(self: StreamedExperts, layer: Any) -> None:
        load(self, layer)
        reads[0] += 1
        if reads[0] == 4:
            with torch.no_grad():
                layer.module.down_proj[0, 0, 0] += 1

    monkeypatch.setattr(StreamedExperts, "_load", altered)
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.experts: .* not those that"):
        streamed(tmp_path)


def test_model_that_cannot_be_streamed_is_quantized_in_memory(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards models in other files than safetensors: the same result, and it is said."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    reference = in_memory(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="all of it is in memory"):
        packed = streamed(tmp_path)
    assert_same(packed, packed.config.quantization_config, reference)


def test_progress_bars_are_as_they_were(tiny_model: Any, tmp_path: Path) -> None:
    """Guards a global switch of transformers, which is off only while a layer is read."""
    from transformers.utils import logging

    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    for shown in (True, False):
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        try:
            with streamed_experts._without_progress_bars():
                assert not logging.is_progress_bar_enabled()
            assert logging.is_progress_bar_enabled() == shown
        finally:
            logging.enable_progress_bar()


SMALL = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256}


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ({"hidden_size": 64, "moe_intermediate_size": 512, "num_experts": 24}, (12e6, 20e6)),
        pytest.param(
            {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 48},
            (12e6, 60e6),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_peak_memory_does_not_grow_with_depth(
    sizes: dict[str, int], most: tuple[float, float], tmp_path: Path, moe_tiny_path: Path
) -> None:
    """Guards the bound, from outside, of quantizing and of tuning layer by layer: 6 further layers are 28 MB
    (the larger: 226 MB) of experts, twice that in the float32 of the computation. They have taken 2 MB of
    memory, and 9 MB with the pages of files that are mapped. Tuning takes no more than quantizing does, and
    one layer's rows in float32 with their gradients.
    """
    peaks: list[dict[str, int]] = []
    tuned: list[dict[str, int]] = []
    for layers in (2, 8):
        model, out = tmp_path / f"model{layers}", tmp_path / f"out{layers}"
        write_checkpoint(model, qwen3_moe(layers, num_experts_per_tok=4, **sizes, **SMALL))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(moe_tiny_path / name, model)
        peaks.append(measured(model, out))
        tuned.append(measured(model, tmp_path / f"tuned{layers}", out))
    print(f"peak at 2 layers {peaks[0]}, at 8 layers {peaks[1]}; of tuning {tuned}")
    for kind, limit in zip(("anonymous", "resident"), most, strict=True):
        assert peaks[1][kind] - peaks[0][kind] < limit
        assert tuned[1][kind] - tuned[0][kind] < limit
    weights = 3 * sizes["hidden_size"] * sizes["moe_intermediate_size"] * sizes["num_experts"]
    assert tuned[1]["anonymous"] < peaks[1]["anonymous"] + 2 * 4 * weights


def test_written_checkpoint_loads_and_is_the_same_twice(tmp_path: Path) -> None:
    """Guards the random checkpoints that measurements are made on: all weights are there, and seeded."""
    config = qwen3_moe(2, hidden_size=32, moe_intermediate_size=16, num_experts=4, vocab_size=64, head_dim=16)
    for name in ("a", "b"):
        size = write_checkpoint(tmp_path / name, config)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert size == sum(
        t.nbytes for path in (tmp_path / "a").glob("*.safetensors") for t in load_file(path).values()
    )
    with pytest.raises(ConfigError, match="not empty"):
        write_checkpoint(tmp_path / "a", config)
