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
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reload_support import SHAPE, name_engine_model, packed_tensors, reload, started
from vllm_support import ENVIRONMENT, needs_vllm

from bitsmoe_plugin import CheckpointError
from bitsmoe_plugin.codec.sharding import Shard, whole

pytestmark = needs_vllm


def _assert_serves(model, directory: Path, shard: Shard | None = None) -> None:
    """Parameters are those of a checkpoint, and outputs are those of a model that starts with it."""
    from vllm_layers import Model, computed

    from vllm_ext.weight_loading import load_shard

    files = Model(directory).quant_config.files
    options = {
        "expert_map": model.experts[0].expert_map,
        "moe_parallel_config": model.experts[0].moe_config.moe_parallel_config,
    }
    fresh = started(directory, **options)
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
    model = started(checkpoints["first"], **options)
    _assert_serves(model, checkpoints["first"], held)
    if way == "path":
        name_engine_model(monkeypatch, checkpoints["second"])
    if way != "pieces":
        reload(model, iter(packed_tensors(checkpoints["second"])))
    else:
        memory = torch.zeros(2**20, dtype=torch.uint8)
        for name, tensor in packed_tensors(checkpoints["second"]):
            sent = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            model.load_weights([(name, sent)])
    _assert_serves(model, checkpoints["second"], held)


def test_a_layer_changes_when_all_of_its_tensors_are_there(checkpoints: dict[str, Path]) -> None:
    """Guards against new rows with old offsets while a trainer writes."""
    from vllm_layers import computed

    model = started(checkpoints["first"])
    before = [computed(layer) for layer in model.experts]
    tensors = [
        (name, tensor) for name, tensor in packed_tensors(checkpoints["second"]) if "layers.0." in name
    ]
    for item in tensors[:-1]:
        model.load_weights([item])
        assert torch.equal(computed(model.experts[0]), before[0])
    model.load_weights(tensors[-1:])
    assert not torch.equal(computed(model.experts[0]), before[0])
    assert torch.equal(computed(model.experts[1]), before[1])


def test_an_update_that_did_not_end_is_no_part_of_the_next(checkpoints: dict[str, Path]) -> None:
    """Guards against scales of one version below rows of another, which nothing could tell."""
    model = started(checkpoints["first"])
    third = [
        (name, tensor + 1 if "scales" in name else tensor)
        for name, tensor in packed_tensors(checkpoints["second"])
    ]
    first_to_last = [item for item in third if "scales" in item[0]]
    for item in first_to_last:
        model.load_weights([item])
    order = sorted(packed_tensors(checkpoints["second"]), key=lambda item: "scales" not in item[0])
    for item in order:
        model.load_weights([item])
    _assert_serves(model, checkpoints["second"])
    model.load_weights(first_to_last)
    with pytest.raises(CheckpointError, match=r"without .*bitsmoe_input_scales"):
        reload(model, (item for item in packed_tensors(checkpoints["second"]) if "scales" not in item[0]))


def test_names_of_the_decoder_layer_do_not_matter(checkpoints: dict[str, Path]) -> None:
    """Mixtral's experts have another name on disk than in transformers, and streams come from both."""
    model = started(checkpoints["first"], middle="block_sparse_moe")
    reload(model, iter(packed_tensors(checkpoints["second"])))
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
    model = started(checkpoints["first"])
    for layer in model.experts:
        for parameter in layer.parameters():
            parameter.data.fill_(-1)
    name_engine_model(monkeypatch, checkpoints["first"])
    reload(model, iter(packed_tensors(checkpoints["first"])))
    _assert_serves(model, checkpoints["first"])


def test_weights_may_be_processed_twice(checkpoints: dict[str, Path]) -> None:
    """vLLM may process weights again without new ones (0.33 does where it replaces a kernel)."""
    model = started(checkpoints["first"])
    before = [dict(layer.named_parameters()) for layer in model.experts]
    model.process()
    model.process()
    for layer, parameters in zip(model.experts, before, strict=True):
        assert all(layer.get_parameter(name) is tensor for name, tensor in parameters.items())
    _assert_serves(model, checkpoints["first"])


def test_kernels_are_compiled_when_weights_are_loaded(checkpoints: dict[str, Path], monkeypatch) -> None:
    """On a GPU, where requests of other sizes than graphs were captured for waited for the compiler."""
    from vllm_ext.loaded_experts import LoadedExperts
    from vllm_ext.moe_method import BitsMoEMethod

    calls = []

    def warm_up(experts: LoadedExperts, *given: object) -> None:
        assert experts.spec is not None  # loaded
        calls.append(given)

    engine = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
        model_config=SimpleNamespace(enforce_eager=True),
    )
    monkeypatch.setattr("vllm_ext.layer_checks.get_current_vllm_config", lambda: engine)
    monkeypatch.setattr("vllm_ext.moe_method.get_current_vllm_config", lambda: engine)
    monkeypatch.setattr(LoadedExperts, "warm_up", warm_up)
    options = {"experts_per_token": 8, "in_dtype": torch.bfloat16}
    started(checkpoints["first"], **options)
    assert not calls  # on a CPU
    monkeypatch.setattr(BitsMoEMethod, "_is_on_gpu", lambda _: True)
    layers = len(started(checkpoints["first"], **options).experts)
    assert calls == [(8, torch.bfloat16, 2048)] * layers


def test_files_that_were_replaced_are_read_with_their_manifest(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    """A trainer saves into the directory that is served: the same path, another checkpoint."""
    served = tmp_path / "served"
    shutil.copytree(checkpoints["first"], served)
    model = started(served)
    shutil.rmtree(served)
    shutil.copytree(checkpoints["second"], served)
    name_engine_model(monkeypatch, served)
    reload(model, iter(packed_tensors(served)))
    _assert_serves(model, checkpoints["second"])


def test_weights_without_experts_keep_them(checkpoints: dict[str, Path]) -> None:
    """As vLLM keeps what a reload does not bring; it warns."""
    model = started(checkpoints["first"])
    reload(model, iter([]))
    _assert_serves(model, checkpoints["first"])


def test_a_model_that_is_gone_leaves_nothing(checkpoints: dict[str, Path]) -> None:
    """vLLM keeps loaders of parameters for reloads, in a table of its own (and after one whole layers)."""
    model = started(checkpoints["first"])
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
    script = Path(__file__).parents[1] / "support" / "vllm_reload.py"
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
