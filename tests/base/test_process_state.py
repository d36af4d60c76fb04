"""State that users set for the whole process changes nothing that is stored or loaded, and stays theirs."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig
from bitsmoe_plugin.base.process_state import known_state
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.pipeline import quantize_model
from bitsmoe_plugin.pipeline.tune_scales import TuningSettings, tune

TOKENS = torch.randint(64, (16, 128), generator=torch.Generator().manual_seed(1))
SETTINGS = TuningSettings(epochs=1, learning_rate=0.01, batch_size=4, held_out=0.25)


@contextmanager
def between(enter: Callable[..., Any], value: Any, leave: Callable[..., Any], default: Any) -> Iterator[None]:
    enter(value)
    try:
        yield
    finally:
        leave(default)


def dtype(value: torch.dtype) -> AbstractContextManager:
    return between(torch.set_default_dtype, value, torch.set_default_dtype, torch.float32)


def precision(value: str) -> AbstractContextManager:
    return between(torch.set_float32_matmul_precision, value, torch.set_float32_matmul_precision, "highest")


def backends(value: str) -> AbstractContextManager:
    """torch's newer way to say the same, which makes the getter of the older one raise."""

    def set_both(value: str) -> None:
        torch.backends.fp32_precision = value
        torch.backends.mkldnn.matmul.fp32_precision = value

    return between(set_both, value, set_both, "none")


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def threads_changed_and_back() -> Iterator[None]:
    """The number itself may change the order of sums, as the README says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.ones(300, 300) @ torch.ones(300, 300)
    torch.set_num_threads(threads)
    yield


STATES: dict[str, Callable[[], AbstractContextManager]] = {
    "bfloat16": lambda: dtype(torch.bfloat16),
    "float16": lambda: dtype(torch.float16),
    "float64": lambda: dtype(torch.float64),
    "tensor type": lambda: between(
        torch.set_default_tensor_type, torch.DoubleTensor, torch.set_default_tensor_type, torch.FloatTensor
    ),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": lambda: between(
        torch.use_deterministic_algorithms, True, torch.use_deterministic_algorithms, False
    ),
    "device": lambda: torch.device("cpu"),
    "default device": lambda: between(torch.set_default_device, "cpu", torch.set_default_device, None),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "medium": lambda: precision("medium"),
    "bf16 products": lambda: backends("bf16"),
    "no denormals": lambda: between(torch.set_flush_denormal, True, torch.set_flush_denormal, False),
    "numpy raises": lambda: np.errstate(all="raise"),
    "warnings are errors": warnings_as_errors,
    "threads": threads_changed_and_back,
}  # fmt: skip


def digest(values: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in values.items()
        if tensor.numel()
    }


def config() -> BitsMoEConfig:
    return BitsMoEConfig(dataset=TOKENS.tolist(), calibration_tokens=2048, sequence_length=128, bits=3)


def quantize(model: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Digests of all tensors, and the manifest."""
    packed = AutoModelForCausalLM.from_pretrained(model, quantization_config=config())
    return digest(packed.state_dict()), packed.config.quantization_config.layers


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, in float32, whose products are what torch may be told to compute in fewer bits."""
    path = tmp_path_factory.mktemp("state") / "model"
    tiny_model("qwen3_moe", hidden_size=64, moe_intermediate_size=32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clean(model: Path) -> tuple[dict[str, str], dict[str, Any]]:
    return quantize(model)


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clean") / "out"
    quantize_to_directory(str(model), out, config())
    return out


@pytest.mark.filterwarnings("ignore:.*set_default_tensor_type:UserWarning")
@pytest.mark.parametrize("state", STATES)
def test_quantizing_and_loading_are_as_in_a_fresh_process(
    state: str, model: Path, clean: Any, written: Path
) -> None:
    """A low default dtype or inference mode ended the run; low precision of products changed the model."""
    torch.manual_seed(len(state))
    drawn = torch.get_rng_state()
    with STATES[state]():
        result = quantize(model)
        loaded = AutoModelForCausalLM.from_pretrained(written)
    assert result == clean
    assert digest(loaded.state_dict()) == clean[0]
    assert torch.equal(drawn, torch.get_rng_state())
    expected = AutoModelForCausalLM.from_pretrained(written)
    with torch.no_grad():
        logits = (m(TOKENS[:1]).logits for m in (loaded, expected))
        assert torch.equal(*logits)


@pytest.mark.parametrize("state", ["bfloat16", "inference mode", "autocast", "medium"])
def test_a_model_in_memory_is_quantized_the_same(state: str, model: Path) -> None:
    """``quantize_model`` without from_pretrained's hooks, on parameters made under that state."""

    def run() -> dict[str, str]:
        loaded = AutoModelForCausalLM.from_pretrained(model)
        quantize_model(loaded, TOKENS, config())
        return digest(loaded.state_dict())

    expected = run()
    with STATES[state]():
        assert run() == expected


@pytest.mark.filterwarnings("ignore:no tokenizer saved")
@pytest.mark.parametrize("state", ["bfloat16", "inference mode", "autocast", "meta"])
def test_directories_hold_the_same_bytes(state: str, model: Path, written: Path, tmp_path: Path) -> None:
    """Whole files: loading, quantizing and saving are all inside."""
    states = {**STATES, "meta": lambda: torch.device("meta")}
    with states[state]():
        quantize_to_directory(str(model), tmp_path / "out", config())
    assert files(tmp_path / "out") == files(written)


def tuned(written: Path, model: Path, state: Callable[[], AbstractContextManager]) -> dict[str, str]:
    packed, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (written, model))
    with state():
        assert tune(packed, reference, TOKENS, SETTINGS).epoch
    return digest(packed.state_dict())


def test_tuning_is_as_in_a_fresh_process(model: Path, written: Path) -> None:
    """It needs gradients, which inference mode has not, and no_grad neither."""
    expected = tuned(written, model, nullcontext)
    for state in ("float64", "inference mode", "autocast", "no grad"):
        assert tuned(written, model, STATES[state]) == expected, state


def test_a_default_device_without_memory_is_refused(model: Path) -> None:
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context manager"):
        quantize(model)


def seen() -> dict[str, Any]:
    """The state, as torch and numpy tell it."""
    backend = torch.backends
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = "mixed"
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.empty(0).device,
        "inference": torch.is_inference_mode_enabled(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "products": old,
        "backends": [b.fp32_precision for b in (backend, backend.mkldnn.matmul, backend.cuda.matmul)],
        "denormals": float(torch.tensor(1e-310, dtype=torch.float64, device="cpu") / 1),
        "numpy": np.geterr(),
    }


@pytest.mark.filterwarnings("ignore:.*set_default_tensor_type:UserWarning")
@pytest.mark.parametrize("state", [*STATES, "meta"])
def test_the_state_is_known_inside_and_restored_behind_an_error(state: str) -> None:
    """Guards users' settings against a run that fails in the middle."""
    with known_state():
        known = seen()
    states = {**STATES, "meta": lambda: torch.device("meta")}
    with states[state]():
        before = seen()
        with suppress(KeyError), known_state():
            assert seen() == known
            raise KeyError
        assert seen() == before
    with states[state](), known_state(gradients=True):
        assert torch.is_grad_enabled()
