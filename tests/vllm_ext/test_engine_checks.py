"""Options of vLLM under which packed experts would be left behind: refused by name, without an engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_support import needs_vllm, write_random_packed

from bitsmoe_plugin import CheckpointError, ConfigError
from bitsmoe_plugin.codec.layout import LayerShape

pytestmark = needs_vllm

SHAPE = LayerShape(num_experts=4, hidden_size=64, intermediate_size=64)


def _engine(**options: Any) -> Any:
    """vLLM's own configs of what ``check_engine`` looks at; the device alone is made up."""
    from vllm.config import LoadConfig, OffloadConfig, ParallelConfig, WeightTransferConfig
    from vllm.config.quantization import resolve_quantization_config

    transfer = options.pop("transfer", None)
    online = resolve_quantization_config("bitsmoe", options.pop("online", None))
    parallel = ParallelConfig()
    for name, value in options.pop("parallel", {}).items():
        setattr(parallel, name, value)
    return SimpleNamespace(
        model_config=SimpleNamespace(quantization_config=online),
        load_config=LoadConfig(load_format=options.pop("load_format", "auto")),
        offload_config=OffloadConfig(**options.pop("offload", {})),
        weight_transfer_config=None if transfer is None else WeightTransferConfig(backend=transfer),
        parallel_config=parallel,
        device_config=SimpleNamespace(device=torch.device(options.pop("device", "cuda"))),
    )


def _check(**options: Any) -> None:
    from vllm_ext.engine_checks import check_engine

    check_engine(_engine(**options))


def test_formats_of_vllm_are_known_or_refused() -> None:
    """Guards against a format that a later vLLM adds, and one that another plugin does."""
    from typing import get_args

    from vllm.model_executor.model_loader import LoadFormats

    for load_format in (*get_args(LoadFormats), "some_plugins_own"):
        if load_format in ("auto", "hf", "safetensors"):
            _check(load_format=load_format)
        else:
            with pytest.raises(ConfigError, match=f"load_format '{load_format}'.*use --load-format auto"):
                _check(load_format=load_format)


DATA = {"data_parallel_size": 2, "enable_expert_parallel": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": {"uva": {"cpu_offload_gb": 2}}}, "--cpu-offload-gb 2 .*--cpu-offload-params"),
        ({"offload": {"uva": {"cpu_offload_gb": 2, "cpu_offload_params": {"mlp"}}}}, "--cpu-offload-gb"),
        (
            {"offload": {"uva": {"cpu_offload_gb": 2, "cpu_offload_params": {"experts", "self_attn"}}}},
            "--cpu-offload-gb",
        ),
        ({"offload": {"prefetch": {"offload_group_size": 4}}}, "--offload-group-size 4 .*--offload-params"),
        ({"transfer": "sparse_nccl"}, "'sparse_nccl'.*use nccl or ipc"),
        ({"online": {"moe": "fp8_per_tensor"}}, '--quantization-config would .* once more.*"linear" alone'),
        ({"parallel": {"enable_eplb": True}}, "--enable-eplb.*drop it"),
        ({"parallel": {**DATA, "all2all_backend": "deepep_low_latency"}}, "'deepep_low_latency'.*--all2all"),
        ({"parallel": {**DATA, "all2all_backend": "nixl_ep"}}, "'nixl_ep'.*allgather_reducescatter"),
        ({"parallel": DATA, "device": "cpu"}, "data_parallel_size 2.*--tensor-parallel-size"),
    ],
)
def test_options_that_leave_experts_behind_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        _check(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"offload": {"uva": {"cpu_offload_gb": 2, "cpu_offload_params": {"self_attn", "mlp.gate"}}}},
        {"transfer": "nccl"},
        {"transfer": "ipc"},
        {"online": {"linear": "fp8_per_tensor"}},
        {"online": {"moe": "fp8_per_tensor", "ignore": ["re:.*experts"]}},
        {"parallel": DATA},
        {"parallel": {"tensor_parallel_size": 2, "all2all_backend": "deepep_low_latency"}},
        {"device": "cpu"},
    ],
)
def test_others_are_not(options: dict[str, Any]) -> None:
    """What does not concern the experts is vLLM's to serve."""
    _check(**options)


@pytest.mark.parametrize("switch", ["VLLM_BATCH_INVARIANT", "BITSMOE_BATCH_INVARIANT"])
def test_batch_invariance_is_refused_on_a_gpu(switch: str, monkeypatch) -> None:
    """The kernels there sum otherwise for one token than for many; those for a CPU never do."""
    monkeypatch.setenv(switch, "1")
    with pytest.raises(ConfigError, match=rf"^{switch}: on cuda .*unset it"):
        _check(device="cuda")
    _check(device="cpu")
    monkeypatch.setenv(switch, "0")
    _check(device="cuda")


def test_a_token_is_the_same_in_any_batch_on_a_cpu(tmp_path: Path) -> None:
    """The experts as vLLM calls them, with ids of 32 bits."""
    from vllm_layers import Model

    write_random_packed(tmp_path, SHAPE, 1)
    model = Model(tmp_path)
    model.process()
    method = model.experts[0].quant_method
    x, weights = torch.randn(40, SHAPE.hidden_size).bfloat16(), torch.rand(40, 2)
    ids = torch.rand(40, SHAPE.num_experts).argsort(1)[:, :2].int()
    wanted = method.forward(x, weights, ids)
    for batch in (torch.tensor([5]), torch.arange(3), torch.arange(17), torch.randperm(40)[:33]):
        assert torch.equal(method.forward(x[batch], weights[batch], ids[batch]), wanted[batch])


def test_an_engine_is_checked_before_its_layers_are_made(tmp_path: Path, monkeypatch) -> None:
    """vLLM asks for the method of every layer when it makes it, long before it reads weights."""
    from vllm_layers import Model

    from vllm_ext import config

    write_random_packed(tmp_path, SHAPE, 1)
    served = Model(tmp_path).quant_config
    monkeypatch.setattr(config, "get_current_vllm_config", lambda: _engine(load_format="sharded_state"))
    with pytest.raises(ConfigError, match="load_format 'sharded_state'"):
        served.get_quant_method(torch.nn.Linear(2, 2), "model.layers.0.self_attn.o_proj")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": 1}, "fused 1 shared experts.*VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0"),
        ({"num_experts": 6}, "redundant copies of experts"),
        ({"num_experts": 3}, "1 of 4 experts replaced by constants .approximate_experts.* remove that"),
        ({"has_bias": True}, "experts have biases, the packed ones no biases"),
    ],
)
def test_experts_that_compute_more_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Guards against shared experts without a trace: vLLM on ROCm gives them ids after the last expert, and
    ids that are not held are skipped."""
    from vllm_layers import Model

    write_random_packed(tmp_path, SHAPE, 1)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        Model(tmp_path, **options)


@pytest.mark.parametrize(
    ("online", "applies"),
    [
        ({"moe": "fp8_per_tensor"}, True),
        ({"targets": {"*.experts": "fp8_per_tensor"}}, True),
        ({"moe": "fp8_per_tensor", "ignore": ["*.experts"]}, False),
        ({"targets": {"*.self_attn.*": "fp8_per_tensor"}}, False),
        ({"linear": "fp8_per_tensor"}, False),
    ],
)
def test_experts_are_not_quantized_once_more(online: dict[str, Any], applies: bool) -> None:
    """vLLM would ask packed experts for a dequantized copy, and fail without naming the option."""
    from vllm.config.quantization import QuantizationConfigArgs
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    from vllm_ext.layer_checks import check_online

    layer = RoutedExperts.__new__(RoutedExperts)
    asked = OnlineQuantizationConfig(QuantizationConfigArgs(**online))
    prefix = "model.layers.0.mlp.experts"
    if not applies:
        check_online(prefix, layer, asked)
        return
    with pytest.raises(ConfigError, match=rf"{prefix} once more.*\"ignore\""):
        check_online(prefix, layer, asked)


def test_a_directory_without_weights_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    """vLLM brings config.json of s3:// and others into a directory of its own, and streams the rest."""
    from transformers import AutoConfig

    from vllm_ext.config import BitsMoEServingConfig

    write_random_packed(tmp_path / "model", SHAPE, 1)
    (tmp_path / "pulled").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "pulled")
    entries = json.loads((tmp_path / "pulled" / "config.json").read_text())["quantization_config"]
    config = BitsMoEServingConfig.from_config(entries)
    with pytest.raises(CheckpointError, match=r"pulled lacks safetensors.*s3://.*download"):
        config.maybe_update_config(str(tmp_path / "pulled"), AutoConfig.from_pretrained(tmp_path / "pulled"))


def test_gpus_that_lack_registers_are_refused() -> None:
    """On 7.0 and 7.5 the kernels spill 6 to 22 KB of registers."""
    from vllm_ext.config import BitsMoEServingConfig

    assert BitsMoEServingConfig.get_min_capability() == 80
