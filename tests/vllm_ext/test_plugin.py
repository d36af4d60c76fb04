"""The plugin without an engine: registration, and everything that must stop a server at start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_support import needs_vllm

from bitsmoe_plugin import BitsMoEConfig, CheckpointError, ConfigError
from bitsmoe_plugin.codec.sharding import Shard, whole

PAYLOAD = "model.layers.1.mlp.experts.bitsmoe_payload"


def test_importing_the_plugin_imports_neither_vllm_nor_torch() -> None:
    """vLLM asks every installed plugin in every process, also when another method is served."""
    code = (
        "import sys, vllm_ext; sys.exit(any(m in sys.modules for m in ('vllm', 'torch', 'bitsmoe_plugin')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs_vllm
def test_registering_twice_is_registering_once() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    import vllm_ext

    vllm_ext.register()
    first = get_quantization_config("bitsmoe")
    vllm_ext.register()
    assert get_quantization_config("bitsmoe") is first
    assert QUANTIZATION_METHODS.count("bitsmoe") == 1


@pytest.fixture
def copy(packed_moe_tiny: Path, tmp_path: Path) -> Path:
    """A copy of the packed model that a test may damage."""
    return Path(shutil.copytree(packed_moe_tiny, tmp_path / "copy"))


def _config(directory: Path):
    """What vLLM makes of a directory before it starts an engine."""
    from transformers import AutoConfig

    from vllm_ext.config import BitsMoEServingConfig

    entries = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = BitsMoEServingConfig.from_config(entries)
    config.maybe_update_config(str(directory), AutoConfig.from_pretrained(directory))
    return config


def _rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _edit(directory: Path, **changes) -> None:
    entries = json.loads((directory / "config.json").read_text())
    entries.update(changes)
    (directory / "config.json").write_text(json.dumps(entries))


def _drop(tensors) -> None:
    del tensors[PAYLOAD]


def _shorten(tensors) -> None:
    tensors[PAYLOAD] = tensors[PAYLOAD][:-32].clone()


def _add(tensors) -> None:
    tensors["model.layers.1.mlp.experts.bitsmoe_more"] = torch.zeros(3)


def _retype(tensors) -> None:
    tensors[PAYLOAD] = tensors[PAYLOAD].float()


@needs_vllm
@pytest.mark.parametrize("change", [_drop, _shorten, _add, _retype])
def test_wrong_tensors_are_refused_by_name_before_an_engine_starts(copy: Path, change) -> None:
    _rewrite(copy, change)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.bitsmoe"):
        _config(copy)


def _drop_other(tensors) -> None:
    del tensors["model.layers.1.self_attn.q_proj.weight"]


def _alter_other(tensors) -> None:
    tensors["model.layers.1.mlp.gate.weight"][3, 5] += 0.01


def _add_other(tensors) -> None:
    tensors["model.layers.1.self_attn.more"] = torch.zeros(3)


@needs_vllm
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_other, r"layers\.1\.self_attn\.q_proj\.weight is missing"),
        (_alter_other, r"layers\.1\.mlp\.gate\.weight differs"),
        (_add_other, r"layers\.1\.self_attn\.more is in the checkpoint"),
    ],
)
def test_wrong_tensors_besides_the_packed_ones_are_refused(copy: Path, change, message: str) -> None:
    """vLLM would serve with whatever its memory held, or drop the tensor."""
    _rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message):
        _config(copy)


@needs_vllm
def test_a_truncated_file_is_refused_before_an_engine_starts(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        _config(copy)


@needs_vllm
@pytest.mark.parametrize("buffer", ["payload", "row_codes", "scale_grid", "output_basis", "input_scales"])
def test_one_wrong_bit_is_refused_when_its_layer_is_loaded(copy: Path, buffer: str) -> None:
    def flip(tensors) -> None:
        tensors[f"model.layers.1.mlp.experts.bitsmoe_{buffer}"].flatten()[7] ^= 1

    from vllm_ext.weight_loading import load_shard

    _rewrite(copy, flip)
    files = _config(copy).files
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.experts"
        shard = whole(files.specs[name].shape)
        if layer != 1:
            load_shard(files, name, shard, torch.device("cpu"))
            continue
        with pytest.raises(CheckpointError, match=rf"{name}.*SHA-256"):
            load_shard(files, name, shard, torch.device("cpu"))


@needs_vllm
def test_values_are_checked_even_if_their_hash_fits(copy: Path) -> None:
    """Whoever alters a checkpoint can write the hash of what he altered; kernels must not see NaN scales."""
    from bitsmoe_plugin.checkpoint.manifest import tensor_digest
    from bitsmoe_plugin.codec.layout import PackedExperts
    from vllm_ext.weight_loading import load_shard

    name = "model.layers.1.mlp.experts"
    _rewrite(copy, lambda tensors: tensors[f"{name}.bitsmoe_scale_grid"].fill_(0x7E00))
    tensors = load_file(copy / "model.safetensors")
    prefix = f"{name}.bitsmoe_"
    packed = PackedExperts(**{n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    entries = json.loads((copy / "config.json").read_text())["quantization_config"]
    entries["layers"][name]["sha256"] = tensor_digest(packed)
    _edit(copy, quantization_config=entries)
    files = _config(copy).files
    with pytest.raises(CheckpointError, match=r"bitsmoe_scale_grid holds NaN"):
        load_shard(files, name, whole(files.specs[name].shape), torch.device("cpu"))


@needs_vllm
def test_an_index_cannot_name_files_elsewhere(copy: Path) -> None:
    weight_map = {"a": "../copy/model.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"names '\.\./copy/model\.safetensors'"):
        _config(copy)


@needs_vllm
def test_a_newer_format_version_is_refused(copy: Path) -> None:
    entries = json.loads((copy / "config.json").read_text())["quantization_config"]
    _edit(copy, quantization_config={**entries, "format_version": 99})
    with pytest.raises(CheckpointError, match="format version 99"):
        _config(copy)


@needs_vllm
def test_a_model_with_fewer_layers_than_were_packed_is_refused(copy: Path) -> None:
    """vLLM would serve the first three layers without a word."""
    _edit(copy, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\..*num_hidden_layers=3"):
        _config(copy)


@needs_vllm
def test_a_file_that_the_index_names_must_be_there(copy: Path) -> None:
    weight_map = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"lacks model-2\.safetensors"):
        _config(copy)


@needs_vllm
def test_a_model_that_is_not_packed_is_told_so() -> None:
    """``vllm serve UNQUANTIZED --quantization bitsmoe``: vLLM then makes a config of nothing."""
    from vllm_ext.config import BitsMoEServingConfig

    with pytest.raises(ConfigError, match="bitsmoe quantize"):
        BitsMoEServingConfig()


@needs_vllm
def test_degrees_that_cannot_split_the_rows_are_refused(packed_moe_tiny: Path) -> None:
    """64 neurons are two blocks: vLLM itself would split them over 4 processes."""
    from vllm.config import ParallelConfig

    config = _config(packed_moe_tiny)
    config.check_parallel(ParallelConfig(tensor_parallel_size=2))
    config.check_parallel(ParallelConfig(tensor_parallel_size=4, enable_expert_parallel=True))
    with pytest.raises(ConfigError, match=r"layers\.0.* 64 .*tensor_parallel_size 4.*4\*32.*Use 1, 2, or"):
        config.check_parallel(ParallelConfig(tensor_parallel_size=4))


@needs_vllm
def test_a_process_reads_its_shard(packed_moe_tiny: Path) -> None:
    """Half of the experts, and of half of the blocks: a quarter of the payload of even experts."""
    from vllm_ext.weight_loading import load_shard

    files = _config(packed_moe_tiny).files
    name = "model.layers.2.mlp.experts"
    spec, tensors = load_shard(files, name, Shard(tuple(range(24)), (1, 2)), torch.device("cpu"))
    assert (spec.shape.num_experts, spec.shape.intermediate_size) == (24, 32)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == spec.tensors()
    assert 0.2 < spec.payload_words / files.specs[name].payload_words < 0.3


@needs_vllm
@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("model.layers.3.block_sparse_moe.experts", "model.layers.3.mlp.experts"),
        ("language_model.model.layers.12.mlp.experts", "model.language_model.layers.12.mlp.experts"),
    ],
)
def test_layers_are_found_under_other_names(prefix: str, found: str) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_ext.weight_loading import LayerNames

    mapper = WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."})
    names = LayerNames([found, "model.layers.1.mlp.experts"], mapper.map_name)
    assert names.find(prefix) == found
    with pytest.raises(CheckpointError, match=r"layers\.7"):
        names.find("model.layers.7.mlp.experts")


@needs_vllm
@pytest.mark.parametrize("known", [{}, {"language_model.layers.": "language_model.model.layers."}])
def test_layers_are_found_by_number_where_a_mapper_knows_other_names(known: dict[str, str]) -> None:
    """Guards multimodal models (Kimi-K2.5): transformers' names of its modules are not those of the published
    files, which vLLM's mapper renames. Packed tensors of the stream go the same way, others stay away."""
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_ext.stream_names import StreamNames
    from vllm_ext.weight_loading import LayerNames

    manifest = [f"model.language_model.layers.{number}.mlp.experts" for number in (1, 12)]
    names = LayerNames(manifest, WeightsMapper(orig_to_new_prefix=known).map_name)
    prefix = "language_model.model.layers.12.mlp.experts"
    assert names.find(prefix) == manifest[1]
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp"):
        names.find("language_model.model.layers.2.mlp.experts")
    stream = StreamNames()
    stream.add(prefix)
    here, elsewhere = (f"{name}.bitsmoe_payload" for name in manifest[::-1])
    assert (
        stream.mapper().map_name(here)
        == "model.language_model.layers.12.mlp.experts.routed_experts.bitsmoe_payload"
    )
    assert stream.mapper().map_name(elsewhere) is None


@needs_vllm
def test_options_of_the_checkpoint_are_checked(copy: Path) -> None:
    entries = json.loads((copy / "config.json").read_text())["quantization_config"]
    _edit(copy, quantization_config={**entries, "basis_bits": 5})
    with pytest.raises(ConfigError, match="basis_bits=5"):
        _config(copy)
    assert isinstance(BitsMoEConfig.from_dict(entries), BitsMoEConfig)
