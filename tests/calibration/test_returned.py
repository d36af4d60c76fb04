"""Layers that return more than hidden states, which later layers are given: indices of a sparse attention
(GLM-5, HY V4, Mistral Large 4, which also shares keys and values), states of a router (Zaya)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.calibration.carried import joined, left_returned
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward
from bitsmoe_plugin.calibration.returned import Returned
from bitsmoe_plugin.models.families import decoder_layer_name, find_moe_layers
from bitsmoe_plugin.pipeline import quantize_model
from bitsmoe_plugin.pipeline.progress_on_disk import ProgressOnDisk

ROOT = Path(__file__).parents[2]
CLASSES = (
    "glm_moe_dsa/GlmMoeDsaForCausalLM",
    "glm5_next/Glm5NextForConditionalGeneration",
    "hy_v4/HYV4ForCausalLM",
    "hy_v4_vl/HYV4VLForConditionalGeneration",
    "mistral_large4/MistralLarge4ForConditionalGeneration",
    "zaya/ZayaForCausalLM",
)
OPTIONS: dict[str, Any] = {"basis_bits": 4, "basis_group_size": 16, "bits": 6}
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token", "ignore:out of memory")


def _model(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, nn.ModuleList]:
    """Of a class of the coverage table, and its decoder layers."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "coverage"))
    entry = import_module("model_classes").ModelClass(*name.split("/"))
    model = import_module("small_models").small_model(entry)
    layer = find_moe_layers(model)[0].name
    return model, model.get_submodule(decoder_layer_name(model, layer).rpartition(".")[0])


@pytest.mark.parametrize("name", CLASSES)
def test_layer_by_layer_is_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against layers that attend to all tokens, or to those of another stream or block: bit for bit
    what each layer puts out in the model's own forward pass; also where memory makes parts of batches."""
    model, layers = _model(name, monkeypatch)
    wanted: list[list[Tensor]] = [[] for _ in layers]
    for outputs, layer in zip(wanted, layers, strict=True):
        layer.register_forward_hook(lambda _m, _a, out, found=outputs: found.append(out[0]))
    blocks = torch.randint(2, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for batch in blocks.split(2):
            model(batch, use_cache=False)
    expected, were_left = [list(outputs) for outputs in wanted], []
    forward = LayerwiseForward(model, layers, blocks, batch_size=2)
    other: list[Tensor] = [2 * batch.flip(0) for batch in forward.hidden]
    for index in range(len(layers)):
        found = forward.run(index)
        other = forward.run(index, other)
        assert all(torch.equal(a, b) for a, b in zip(found, expected[index], strict=True)), index
        were_left.append(any(key.startswith("returned/") for key in found.left[0]))
        forward.advance(found)
    assert any(were_left)
    assert not were_left[-1]
    assert not torch.allclose(other[0], expected[-1][0], rtol=0.1)
    forward.restart()
    forward.limit(1)
    for index in range(len(layers)):
        forward.advance(forward.run(index))
    assert torch.allclose(torch.cat(list(forward.hidden)), torch.cat(expected[-1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("step", "at"), [("finish_plan", 2), ("finish_layer", 4)])
def test_a_run_goes_on(step: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that cannot go on between the layer that chooses tokens and the one that looks at
    these, or looks at others then."""
    name, blocks = CLASSES[4], torch.randint(2, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    whole = _model(name, monkeypatch)[0]
    quantize_model(whole, blocks, BitsMoEConfig(**OPTIONS))
    config, finish = BitsMoEConfig(work_dir=tmp_path / "work", **OPTIONS), getattr(ProgressOnDisk, step)

    def stopping(progress: ProgressOnDisk, index: int, *args: Any) -> None:
        finish(progress, index, *args)
        if index == at:
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(ProgressOnDisk, step, stopping)
        with pytest.raises(Interrupted):
            quantize_model(_model(name, monkeypatch)[0], blocks, config)
    model = _model(name, monkeypatch)[0]
    quantize_model(model, blocks, config)
    found = model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in whole.state_dict().items())


class _Layer(nn.Module):
    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.silent = silent

    def forward(self, hidden: Tensor, given: Any = None) -> tuple[Tensor, Tensor | None]:
        return hidden * self.weight, None if self.silent else hidden


class _Model(nn.Module):
    """Hands on what ``choose`` makes of the last value and the one before."""

    def __init__(self, choose: Any) -> None:
        super().__init__()
        self.layers, self.choose = nn.ModuleList([_Layer(), _Layer(True), _Layer()]), choose

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden, last = input_ids[..., None].float().expand(-1, -1, 4), None
        for layer in self.layers:
            hidden, found = layer(hidden, given=last)
            last = self.choose(found, last)
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_number_of_values_is_found(blocks: int) -> None:
    """Two blocks of one tensor can be unpacked as two values; and what comes after the layers unpacks too."""
    model = _Model(lambda found, last: found)
    forward = LayerwiseForward(model, model.layers, torch.ones(blocks, 3, dtype=torch.int64), blocks)
    for index in range(3):
        forward.advance(forward.run(index))
    assert [batch.shape for batch in forward.head_inputs()] == [(blocks, 3, 4)]


@pytest.mark.parametrize(
    "choose",
    [
        lambda found, last: last if found is None else found,  # what was recorded is not what would be given
        lambda found, last: found + 1,
        lambda found, last: found.detach(),
    ],
)
def test_values_that_are_not_handed_on_as_they_are_are_refused(choose: Any) -> None:
    model = _Model(choose)
    with pytest.raises(QuantizationError, match=r"_Model: after decoder layer \d the model takes more than"):
        LayerwiseForward(model, model.layers, torch.ones(3, 3, dtype=torch.int64), 3)


@pytest.mark.parametrize("output", [(torch.ones(2, 3), torch.ones(5)), (torch.ones(2, 3), 7), torch.ones(2)])
def test_what_is_no_tensor_of_blocks_is_refused(output: Any) -> None:
    with pytest.raises(QuantizationError, match=r"decoder layer 4 returns .* a tensor of 2 blocks"):
        left_returned(output, [Returned(4, 1)], {}, 4, slice(0, 2))


def test_parts_of_a_batch_leave_the_same() -> None:
    with pytest.raises(QuantizationError, match="with some calibration blocks alone"):
        joined([{"returned/0/1": (torch.ones(1),)}, {}])
