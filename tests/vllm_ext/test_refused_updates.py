"""Weights that packed experts cannot take in a running vLLM: an error, and no old experts without a word."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reload_support import PAYLOAD, name_engine_model, packed_tensors, reload, started
from torch import Tensor
from vllm_support import needs_vllm

from bitsmoe_plugin import CheckpointError, ConfigError
from bitsmoe_plugin.codec.sharding import whole

pytestmark = needs_vllm


def _shorten(tensors: dict[str, Tensor]) -> None:
    tensors[f"model.layers.0.mlp.experts.{PAYLOAD}"] = torch.zeros(96, dtype=torch.int32)


def _retype(tensors: dict[str, Tensor]) -> None:
    name = f"model.layers.0.mlp.experts.{PAYLOAD}"
    tensors[name] = tensors[name].float()


def _not_finite(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.bitsmoe_scale_grid"].fill_(0x7E00)


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.bitsmoe_row_codes"]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.bitsmoe_kept_input"] = torch.zeros(1, 2, 64, 64, dtype=torch.int16)


def _unpack(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(4, 128, 64)


def _fewer_experts(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.experts.bitsmoe_row_codes"
    tensors[name] = tensors[name][:, :3].clone()


REFUSED = {
    _shorten: "row codes describe .* payload words",
    _retype: r"bitsmoe_payload is torch\.float32",
    _not_finite: "bitsmoe_scale_grid holds NaN",
    _drop: "without bitsmoe_row_codes; packed tensors of a layer are replaced together",
    _add: "bitsmoe_kept_input is none of the packed tensors that are served",
    _unpack: "gate_up_proj is of unquantized experts.*bitsmoe quantize",
    _fewer_experts: r"bitsmoe_row_codes is torch\.uint8 \(3, 3, 64\)",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_stream_of_unsound_experts_is_refused(change, checkpoints: dict[str, Path]) -> None:
    """There is no manifest to tell; nor may the old experts be computed as if all were well."""
    from vllm_layers import computed

    model = started(checkpoints["first"])
    tensors = dict(packed_tensors(checkpoints["second"]))
    change(tensors)
    with pytest.raises((CheckpointError, ConfigError), match=REFUSED[change]):
        reload(model, iter(tensors.items()))
    with pytest.raises(CheckpointError, match=r"restart vLLM|the last update .* was refused"):
        [computed(layer) for layer in model.experts]


@pytest.mark.parametrize(
    ("name", "message"), [("damaged", r"layers\.1\..*SHA-256"), ("dense", "is not packed.*bitsmoe quantize")]
)
def test_a_path_to_other_than_a_sound_checkpoint_is_refused(
    name: str, message: str, checkpoints: dict[str, Path], monkeypatch
) -> None:
    from vllm_layers import computed

    model = started(checkpoints["first"])
    name_engine_model(monkeypatch, checkpoints[name])
    with pytest.raises(CheckpointError, match=message):
        reload(model, iter(packed_tensors(checkpoints[name])))
    with pytest.raises(CheckpointError, match="restart vLLM"):
        [computed(layer) for layer in model.experts]


def test_damage_on_the_path_that_is_served_is_no_stream(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    """Tensors of a stream need no manifest, but those that lie in the directory have one."""
    served = tmp_path / "served"
    shutil.copytree(checkpoints["second"], served)
    model = started(served)
    shutil.copy(checkpoints["damaged"] / "model.safetensors", served / "new")
    (served / "new").rename(served / "model.safetensors")
    name_engine_model(monkeypatch, served)
    with pytest.raises(CheckpointError, match=r"layers\.1\..*SHA-256"):
        reload(model, iter(packed_tensors(served)))


def test_what_is_written_into_parameters_counts(checkpoints: dict[str, Path]) -> None:
    """Weights in kernel format, and code that writes by itself: offsets follow the row codes."""
    from vllm_layers import computed

    model = started(checkpoints["first"])
    layer = model.experts[0]
    before = computed(layer)
    codes = layer.bitsmoe_row_codes.detach().clone()
    with pytest.raises(CheckpointError, match=r"cannot take torch\.int32 \(1,\)"):
        layer.bitsmoe_payload.copy_(torch.zeros(1, dtype=torch.int32))
    with pytest.raises(CheckpointError, match="row codes describe"):
        layer.bitsmoe_row_codes.copy_(torch.zeros_like(codes))
    with pytest.raises(CheckpointError, match="refused"):
        computed(layer)
    layer.bitsmoe_row_codes.copy_(codes)
    assert torch.equal(computed(layer), before)
    with torch.no_grad():
        layer.bitsmoe_row_codes[:] = codes.flip(-1)  # the same widths, so the same words, of other rows
    changed = computed(layer)
    assert not torch.equal(changed, before)
    for write in (
        lambda parameter, values: parameter.copy_(values),
        lambda parameter, values: parameter.data.copy_(values),
        lambda parameter, values: setattr(parameter, "data", values),
    ):
        twin = started(checkpoints["first"]).experts[0]
        write(twin.bitsmoe_row_codes, codes.flip(-1))
        assert torch.equal(computed(twin), changed)
    with torch.no_grad():
        layer.bitsmoe_row_codes.zero_()
    with pytest.raises(CheckpointError, match="row codes describe"):
        computed(layer)


def _loaded(directory: Path, **options):
    """``LoadedExperts`` of the first layer, as on a GPU."""
    from vllm_layers import Model

    from bitsmoe_plugin.models.gating import gating
    from vllm_ext.loaded_experts import LoadedExperts
    from vllm_ext.weight_loading import load_shard

    files = Model(directory).quant_config.files
    name = next(iter(files.specs))
    receiver = SimpleNamespace(name=name)
    experts = LoadedExperts(receiver, gating("silu"), **options)
    shard = load_shard(files, name, whole(files.specs[name].shape), torch.device("cpu"))
    experts.replace(*shard)
    return experts, shard


def test_addresses_stay_where_cuda_graphs_hold_them(checkpoints: dict[str, Path]) -> None:
    """A replayed graph reads tensors and what was derived from them where they were captured."""
    experts, (spec, tensors) = _loaded(checkpoints["first"], in_place=True, captured=True)
    arguments = torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    before = experts.forward(*arguments)
    held = {**experts.parameters, **experts.derived()}
    addresses = {name: tensor.data_ptr() for name, tensor in held.items()}
    assert experts.derived()
    for tensor in experts.derived().values():
        tensor.fill_(-1)  # sleep of level 2
    codes = tensors["bitsmoe_row_codes"].flip(1).contiguous()
    experts.replace(spec, {**tensors, "bitsmoe_row_codes": codes})
    swapped, _ = _loaded(checkpoints["first"], in_place=False, captured=False)
    swapped.replace(spec, {**tensors, "bitsmoe_row_codes": codes})
    assert torch.equal(experts.forward(*arguments), swapped.forward(*arguments))
    assert not torch.equal(experts.forward(*arguments), before)
    after = {**experts.parameters, **experts.derived()}
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == addresses


def test_other_sizes_than_cuda_graphs_were_made_for_are_refused(checkpoints: dict[str, Path]) -> None:
    experts, _ = _loaded(checkpoints["first"], in_place=True, captured=True)
    _, other = _loaded(checkpoints["second"], in_place=True, captured=False)
    with pytest.raises(ConfigError, match=r"payload words.*--enforce-eager"):
        experts.replace(*other)
