"""New weights in a running vLLM: experts change with the rest of the model, or it is an error.

Without an engine but with vLLM's own reload and loaders (``vllm_layers``), and once with an engine.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_support import ENVIRONMENT, needs_vllm, small_model, write_random_packed

from bitsmoe_plugin import CheckpointError, ConfigError
from bitsmoe_plugin.packing import LayerShape
from bitsmoe_plugin.sharding import Shard, whole

pytestmark = needs_vllm

SHAPE = LayerShape(num_experts=4, hidden_size=64, intermediate_size=64)
PAYLOAD = "bitsmoe_payload"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two packed checkpoints of one model with payloads of other sizes, the second damaged, a dense one."""
    folder = tmp_path_factory.mktemp("reload")
    paths = {name: folder / name for name in ("first", "second", "damaged", "dense")}
    write_random_packed(paths["first"], SHAPE, 2)
    write_random_packed(paths["second"], SHAPE, 2, seed=10)
    shutil.copytree(paths["second"], paths["damaged"])
    tensors = load_file(paths["damaged"] / "model.safetensors")
    tensors[f"model.layers.1.mlp.experts.{PAYLOAD}"][5] ^= 1
    save_file(tensors, paths["damaged"] / "model.safetensors", metadata={"format": "pt"})
    small_model("qwen3_moe").save_pretrained(paths["dense"])
    return paths


def _packed(directory: Path) -> list[tuple[str, Tensor]]:
    tensors = load_file(directory / "model.safetensors")
    return [(name, tensor) for name, tensor in tensors.items() if ".bitsmoe_" in name]


def _started(directory: Path, **options):
    """A model of which vLLM has loaded the weights, as it does at start."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm_layers import Model

    model = Model(directory, **options)
    record_metadata_for_reloading(model)
    model.load_weights(_packed(directory))
    model.process()
    return model


def _reload(model, weights: Iterable[tuple[str, Tensor]]) -> None:
    """As vLLM's ``reload_weights`` and its engines of weight transfer do."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    initialize_layerwise_reload(model)
    model.load_weights(weights)
    finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


def _name_engine_model(monkeypatch, directory: Path) -> None:
    from vllm_ext import config

    model = SimpleNamespace(model=str(directory), revision=None, trust_remote_code=False)
    monkeypatch.setattr(config, "engine_model", lambda: model)


def _assert_serves(model, directory: Path, shard: Shard | None = None) -> None:
    """Parameters are those of a checkpoint, and outputs are those of a model that starts with it."""
    from vllm_layers import Model, computed

    from vllm_ext.weight_loading import load_shard

    files = Model(directory).quant_config.files
    options = {
        "expert_map": model.experts[0].expert_map,
        "moe_parallel_config": model.experts[0].moe_config.moe_parallel_config,
    }
    fresh = _started(directory, **options)
    for layer, other, (name, spec) in zip(model.experts, fresh.experts, files.specs.items(), strict=True):
        _, tensors = load_shard(files, name, shard or whole(spec.shape), torch.device("cpu"))
        assert {n: t.shape for n, t in layer.named_parameters()} == {n: t.shape for n, t in tensors.items()}
        assert all(torch.equal(layer.get_parameter(buffer), tensor) for buffer, tensor in tensors.items())
        assert torch.equal(computed(layer), computed(other))


SHARDS = {
    "whole": ({}, whole(SHAPE)),
    "tensor parallel": (
        {"moe_parallel_config": SimpleNamespace(tp_size=2, tp_rank=1)},
        Shard((0, 1, 2, 3), (1, 2)),
    ),
    "expert parallel": ({"expert_map": torch.tensor([-1, 0, -1, 1])}, Shard((1, 3), (0, 2))),
}


@pytest.mark.parametrize("way", ["path", "stream", "pieces"])
@pytest.mark.parametrize("shard", SHARDS)
def test_experts_are_those_of_the_new_weights(
    way: str, shard: str, checkpoints: dict[str, Path], monkeypatch
) -> None:
    """Guards against old experts below new attention, in every process; from a path, from a stream, and from
    trainers that write tensor by tensor into the model, whose memory is used again."""
    options, held = SHARDS[shard]
    model = _started(checkpoints["first"], **options)
    _assert_serves(model, checkpoints["first"], held)
    if way == "path":
        _name_engine_model(monkeypatch, checkpoints["second"])
    if way != "pieces":
        _reload(model, iter(_packed(checkpoints["second"])))
    else:
        memory = torch.zeros(2**20, dtype=torch.uint8)
        for name, tensor in _packed(checkpoints["second"]):
            sent = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            model.load_weights([(name, sent)])
    _assert_serves(model, checkpoints["second"], held)


def test_a_layer_changes_when_all_of_its_tensors_are_there(checkpoints: dict[str, Path]) -> None:
    """Guards against new rows with old offsets while a trainer writes."""
    from vllm_layers import computed

    model = _started(checkpoints["first"])
    before = [computed(layer) for layer in model.experts]
    tensors = [(name, tensor) for name, tensor in _packed(checkpoints["second"]) if "layers.0." in name]
    for item in tensors[:-1]:
        model.load_weights([item])
        assert torch.equal(computed(model.experts[0]), before[0])
    model.load_weights(tensors[-1:])
    assert not torch.equal(computed(model.experts[0]), before[0])
    assert torch.equal(computed(model.experts[1]), before[1])


def test_an_update_that_did_not_end_is_no_part_of_the_next(checkpoints: dict[str, Path]) -> None:
    """Guards against scales of one version below rows of another, which nothing could tell."""
    model = _started(checkpoints["first"])
    third = [
        (name, tensor + 1 if "scales" in name else tensor) for name, tensor in _packed(checkpoints["second"])
    ]
    first_to_last = [item for item in third if "scales" in item[0]]
    for item in first_to_last:
        model.load_weights([item])
    order = sorted(_packed(checkpoints["second"]), key=lambda item: "scales" not in item[0])
    for item in order:
        model.load_weights([item])
    _assert_serves(model, checkpoints["second"])
    model.load_weights(first_to_last)
    with pytest.raises(CheckpointError, match=r"without .*bitsmoe_input_scales"):
        _reload(model, (item for item in _packed(checkpoints["second"]) if "scales" not in item[0]))


def test_names_of_the_decoder_layer_do_not_matter(checkpoints: dict[str, Path]) -> None:
    """Mixtral's experts have another name on disk than in transformers, and streams come from both."""
    model = _started(checkpoints["first"], middle="block_sparse_moe")
    _reload(model, iter(_packed(checkpoints["second"])))
    _assert_serves(model, checkpoints["second"])
    mapper = model.quant_config.get_checkpoint_weight_mapper()
    renamed = "layers.1.block_sparse_moe.experts.routed_experts.bitsmoe_payload"
    assert mapper.map_name("layers.1.mlp.experts.bitsmoe_payload") == renamed
    assert mapper.map_name(renamed) == renamed
    assert mapper.map_name("model.layers.11.mlp.experts.bitsmoe_payload") is None
    assert (
        mapper.map_name("model.layers.1.self_attn.q_proj.weight") == "model.layers.1.self_attn.q_proj.weight"
    )


def test_experts_without_values_come_back(checkpoints: dict[str, Path], monkeypatch) -> None:
    """Sleep of level 2 leaves parameters without values; reload without arguments reads the same path."""
    model = _started(checkpoints["first"])
    for layer in model.experts:
        for parameter in layer.parameters():
            parameter.data.fill_(-1)
    _name_engine_model(monkeypatch, checkpoints["first"])
    _reload(model, iter(_packed(checkpoints["first"])))
    _assert_serves(model, checkpoints["first"])


def test_files_that_were_replaced_are_read_with_their_manifest(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    """A trainer saves into the directory that is served: the same path, another checkpoint."""
    served = tmp_path / "served"
    shutil.copytree(checkpoints["first"], served)
    model = _started(served)
    shutil.rmtree(served)
    shutil.copytree(checkpoints["second"], served)
    _name_engine_model(monkeypatch, served)
    _reload(model, iter(_packed(served)))
    _assert_serves(model, checkpoints["second"])


def test_weights_without_experts_keep_them(checkpoints: dict[str, Path]) -> None:
    """As vLLM keeps what a reload does not bring; it warns."""
    model = _started(checkpoints["first"])
    _reload(model, iter([]))
    _assert_serves(model, checkpoints["first"])


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

    model = _started(checkpoints["first"])
    tensors = dict(_packed(checkpoints["second"]))
    change(tensors)
    with pytest.raises((CheckpointError, ConfigError), match=REFUSED[change]):
        _reload(model, iter(tensors.items()))
    with pytest.raises(CheckpointError, match=r"restart vLLM|the last update .* was refused"):
        [computed(layer) for layer in model.experts]


@pytest.mark.parametrize(
    ("name", "message"), [("damaged", r"layers\.1\..*SHA-256"), ("dense", "is not packed.*bitsmoe quantize")]
)
def test_a_path_to_other_than_a_sound_checkpoint_is_refused(
    name: str, message: str, checkpoints: dict[str, Path], monkeypatch
) -> None:
    from vllm_layers import computed

    model = _started(checkpoints["first"])
    _name_engine_model(monkeypatch, checkpoints[name])
    with pytest.raises(CheckpointError, match=message):
        _reload(model, iter(_packed(checkpoints[name])))
    with pytest.raises(CheckpointError, match="restart vLLM"):
        [computed(layer) for layer in model.experts]


def test_damage_on_the_path_that_is_served_is_no_stream(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    """Tensors of a stream need no manifest, but those that lie in the directory have one."""
    served = tmp_path / "served"
    shutil.copytree(checkpoints["second"], served)
    model = _started(served)
    shutil.copy(checkpoints["damaged"] / "model.safetensors", served / "new")
    (served / "new").rename(served / "model.safetensors")
    _name_engine_model(monkeypatch, served)
    with pytest.raises(CheckpointError, match=r"layers\.1\..*SHA-256"):
        _reload(model, iter(_packed(served)))


def test_what_is_written_into_parameters_counts(checkpoints: dict[str, Path]) -> None:
    """Weights in kernel format, and code that writes by itself: offsets follow the row codes."""
    from vllm_layers import computed

    model = _started(checkpoints["first"])
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
        twin = _started(checkpoints["first"]).experts[0]
        write(twin.bitsmoe_row_codes, codes.flip(-1))
        assert torch.equal(computed(twin), changed)
    with torch.no_grad():
        layer.bitsmoe_row_codes.zero_()
    with pytest.raises(CheckpointError, match="row codes describe"):
        computed(layer)


def _loaded(directory: Path, **options):
    """``LoadedExperts`` of the first layer, as on a GPU."""
    from vllm_layers import Model

    from bitsmoe_plugin.serving import gating
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


def test_a_model_that_is_gone_leaves_nothing(checkpoints: dict[str, Path]) -> None:
    """vLLM keeps loaders of parameters for reloads, in a table of its own (and after one whole layers)."""
    model = _started(checkpoints["first"])
    alive = [weakref.ref(layer) for layer in model.experts]
    alive += [weakref.ref(layer.bitsmoe_payload) for layer in model.experts]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in alive)


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("engine")
    job = {name: str(path) for name, path in checkpoints.items()} | {"served": str(folder / "served")}
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("vllm_reload.py")
    command = [sys.executable, str(script), str(folder / "job.json"), str(folder / "results.json")]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


def test_an_engine_computes_what_was_loaded_last(engine) -> None:
    """Step by step: whose experts it computes; after unquantized weights none."""
    for step, (whose, error) in engine.items():
        expected = step.split()[-1]
        assert (whose == expected and not error) or (expected == "other" and "did not end" in whose), step
        assert expected != "other" or "bitsmoe quantize" in error, (step, error)
