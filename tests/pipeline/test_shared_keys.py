"""Layers that take keys and values of earlier ones, which reach them beside the hidden states (Gemma4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal_support import build, image_inputs
from torch import Tensor

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.base.interruption import Interrupted
from bitsmoe_plugin.calibration.blocks import ConversationBlocks
from bitsmoe_plugin.calibration.carried import left_in
from bitsmoe_plugin.calibration.layerwise_forward import LayerwiseForward
from bitsmoe_plugin.pipeline import quantize_model
from bitsmoe_plugin.pipeline.progress_on_disk import ProgressOnDisk
from bitsmoe_plugin.runtime.experts import BitsMoEExperts

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token", "ignore:out of memory")
TYPES = ["sliding_attention", "full_attention"] * 2
OPTIONS: dict[str, Any] = {"method": "paper-v2", "basis_bits": 4, "basis_group_size": 16, "bits": 6}


def _model() -> Any:
    """The last two of four layers have no keys and values of their own."""
    return build("gemma4", num_hidden_layers=4, layer_types=TYPES, num_kv_shared_layers=2)


def _conversations() -> ConversationBlocks:
    return ConversationBlocks(image_inputs("gemma4", 1 + i % 2, text=6 + i, seed=i) for i in range(5))


def test_each_stream_has_its_own_keys_and_values() -> None:
    """Guards against layers of the unquantized stream that see keys of the quantized one, which ran last; and
    against keys that are lost when less memory makes parts of the batches."""
    model = _model()
    layers, tokens = model.model.language_model.layers, torch.randint(10, 64, (4, 16))
    wanted: list[Tensor] = []
    handle = layers[-1].register_forward_hook(lambda *call: wanted.append(call[-1]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    forward = LayerwiseForward(model, layers, tokens, batch_size=4)
    exact, other = forward.hidden, [2 * batch.flip(0) for batch in forward.hidden]
    for index in range(len(layers)):
        exact, other = forward.run(index, exact), forward.run(index, other)
        if index == 2:
            forward.limit(2)
    assert torch.allclose(exact[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[0], wanted[0], rtol=0.1)


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """What an uninterrupted run packs."""
    model = _model()
    quantize_model(model, _conversations(), BitsMoEConfig(**OPTIONS))
    assert sum(isinstance(module, BitsMoEExperts) for module in model.modules()) == 4
    return model.state_dict()


@pytest.mark.parametrize(("step", "at"), [("finish_plan", 2), ("finish_layer", 2)])
def test_a_run_with_images_goes_on(
    step: str, at: int, whole: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a run that cannot go on between the layer that makes keys and the one that takes them,
    and one that goes on with other images."""
    config = BitsMoEConfig(work_dir=tmp_path / "work", **OPTIONS)
    finish = getattr(ProgressOnDisk, step)

    def stopping(progress: ProgressOnDisk, index: int, *args: Any) -> None:
        finish(progress, index, *args)
        if index == at:
            raise Interrupted("stopped")

    monkeypatch.setattr(ProgressOnDisk, step, stopping)
    with pytest.raises(Interrupted):
        quantize_model(_model(), _conversations(), config)
    monkeypatch.undo()
    others = _conversations()
    others[0]["pixel_values"] = 1 - others[0]["pixel_values"]
    with pytest.raises(QuantizationError, match="progress of another run: calibration tokens was"):
        quantize_model(_model(), others, config)
    model = _model()
    quantize_model(model, _conversations(), config)
    found = model.state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_stream_that_is_copied_keeps_them(tmp_path: Path) -> None:
    """Without ``sequential`` the second stream is a copy of the first; a file that holds both has room for
    neither's memory twice."""
    config = BitsMoEConfig(work_dir=tmp_path / "work", sequential=False, **{**OPTIONS, "method": "fast"})
    model = _model()
    quantize_model(model, _conversations(), config)
    assert sum(isinstance(module, BitsMoEExperts) for module in model.modules()) == 4


def test_what_cannot_be_carried_is_refused() -> None:
    with pytest.raises(QuantizationError, match="decoder layer 3 leaves 'window' in shared for later ones"):
        left_in({"shared": {"window": 5}}, 3, 2)
