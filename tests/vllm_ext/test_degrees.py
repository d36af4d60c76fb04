"""Degrees that cannot work are refused where vLLM's options are read, before it starts a process for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_support import needs_vllm, pack_small, small_model

pytestmark = [needs_vllm, pytest.mark.filterwarnings("ignore:.*calibration token")]


@pytest.fixture(scope="module")
def configure() -> Callable[..., Any]:
    """vLLM's configuration of a model, as its servers make it; no process is started."""
    from vllm.engine.arg_utils import EngineArgs

    def make(model: Path, **options: Any) -> Any:
        return EngineArgs(model=str(model), max_model_len=64, **options).create_engine_config()

    return make


@pytest.fixture(scope="module")
def three_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 neurons are three blocks of 32."""
    directory = tmp_path_factory.mktemp("degrees")
    return pack_small(small_model("qwen3_moe", moe_intermediate_size=96), directory)


def test_rows_that_cannot_be_split_are_refused(configure, three_blocks: Path, monkeypatch) -> None:
    """It was each worker that refused them, after a minute and under two tracebacks."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.*96.*tensor_parallel_size 2.*Use 1, 3, or"):
        configure(three_blocks, tensor_parallel_size=2)
    configure(three_blocks, tensor_parallel_size=2, enable_expert_parallel=True)
    configure(three_blocks.parent / "dense", tensor_parallel_size=2)
    configure(three_blocks)


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_too_few_numa_nodes_name_the_variable(
    options: dict[str, int], configure, packed_moe_tiny: Path, monkeypatch
) -> None:
    """vLLM asserts that threads be bound "manually", without a word of how."""
    from vllm.utils import cpu_resource_utils

    monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: [0])
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    with pytest.raises(
        ValueError, match=r"2 processes.*1 can be used here; set VLLM_CPU_OMP_THREADS_BIND=nobind"
    ):
        configure(packed_moe_tiny, **options)
    configure(packed_moe_tiny)
    monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: [0, 1])
    configure(packed_moe_tiny, **options)
    monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: [0])
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    configure(packed_moe_tiny, **options)


def test_what_the_table_has_for_an_architecture_is_still_done(monkeypatch) -> None:
    """Some families need it; another call must not stack a check on the check."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from vllm_ext.parallel import check_at_start

    seen: list[Any] = []

    class Theirs(VerifyAndUpdateConfig):
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            seen.append(vllm_config.model_config.quantization)

    class Other:
        class model_config:
            quantization = "gptq"
            hf_config = None

    monkeypatch.setitem(MODELS_CONFIG_MAP, "SomeArchitecture", Theirs)
    check_at_start(["SomeArchitecture"])
    checked = MODELS_CONFIG_MAP["SomeArchitecture"]
    check_at_start(["SomeArchitecture"])
    assert MODELS_CONFIG_MAP["SomeArchitecture"] is checked
    assert issubclass(checked, Theirs)
    checked.verify_and_update_config(Other)
    assert seen == ["gptq"]
