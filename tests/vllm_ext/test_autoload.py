"""With the wheel installed, transformers loads packed checkpoints in processes that never import it.

Every test runs processes of its own on the installed wheel: what is imported when is the subject.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from wheel_support import run_python

from bitsmoe_plugin.config import QUANT_METHOD
from vllm_ext import autoload

EXPERTS = """
def experts(model):
    return {type(module).__name__ for name, module in model.named_modules() if name.endswith("experts")}
"""


def python(installed: Path, code: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    return run_python(installed, "-c", code, cwd=tmp_path, **variables)


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "AutoModel"])
def test_a_checkpoint_loads_without_an_import(installed_wheel, packed_moe_tiny, tmp_path, name) -> None:
    """transformers alone warns and makes up random experts."""
    code = f"""{EXPERTS}
from transformers import {name}
model = {name}.from_pretrained({str(packed_moe_tiny)!r})
assert experts(model) == {{"BitsMoEExperts"}}
import bitsmoe_plugin
assert bitsmoe_plugin.__file__.startswith({str(installed_wheel)!r}), bitsmoe_plugin.__file__
"""
    done = python(installed_wheel, code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_pipeline_loads_without_an_import(installed_wheel, packed_moe_tiny, tmp_path) -> None:
    code = f"""{EXPERTS}
from transformers import pipeline
generate = pipeline("text-generation", model={str(packed_moe_tiny)!r})
assert experts(generate.model) == {{"BitsMoEExperts"}}
assert generate("In the beginning", max_new_tokens=4)[0]["generated_text"].startswith("In the beginning")
"""
    done = python(installed_wheel, code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import torch",
        "import transformers",
        "import transformers.quantizers.auto",  # half loaded when it imports torch for the first time
        "import transformers.modeling_utils",
        "import bitsmoe_plugin",
    ],
)
def test_registered_in_every_order_of_imports(installed_wheel, tmp_path, imports) -> None:
    code = f"""
import sys
{imports}
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
assert {QUANT_METHOD!r} in AUTO_QUANTIZATION_CONFIG_MAPPING
assert ("bitsmoe_plugin" in sys.modules) == ({imports!r} == "import bitsmoe_plugin")
import inspect
assert "AutoHfQuantizer" in inspect.getsource(transformers.quantizers.auto)
from bitsmoe_plugin import BitsMoEConfig
assert AUTO_QUANTIZATION_CONFIG_MAPPING[{QUANT_METHOD!r}] is BitsMoEConfig
"""
    done = python(installed_wheel, code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_switch_gives_an_error_instead_of_random_experts(
    installed_wheel, packed_moe_tiny, tmp_path
) -> None:
    load = f"from transformers import AutoModel; AutoModel.from_pretrained({str(packed_moe_tiny)!r})"
    done = python(installed_wheel, load, tmp_path, **{autoload.SWITCH: "1"})
    assert done.returncode == 1
    assert f"{autoload.SWITCH} keeps" in done.stderr.splitlines()[-1]
    for code, value in ((load, "0"), (f"import bitsmoe_plugin; {load}", "1")):
        done = python(installed_wheel, code, tmp_path, **{autoload.SWITCH: value})
        assert done.returncode == 0, done.stderr


def test_import_torch_imports_nothing_more_and_takes_no_time(installed_wheel, tmp_path) -> None:
    """Everyone who imports torch in this environment pays for it."""
    code = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import vllm_ext.autoload
vllm_ext.autoload.install()
print(1000 * (time.perf_counter() - start))
print(sorted(set(sys.modules) - before))
"""
    done = python(installed_wheel, code, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    milliseconds, modules = done.stdout.splitlines()
    assert modules == "['vllm_ext', 'vllm_ext.autoload']"
    assert float(milliseconds) < 20  # measured: 1 to 2
    code = 'import sys, torch; print({"vllm_ext.autoload", "transformers"} & set(sys.modules))'
    assert python(installed_wheel, code, tmp_path).stdout.strip() == "{'vllm_ext.autoload'}"


def test_a_broken_package_breaks_neither_torch_nor_transformers(
    installed_wheel, packed_moe_tiny, tmp_path
) -> None:
    """Its own error comes up where it is needed: when a packed checkpoint is loaded."""
    broken = Path(shutil.copytree(installed_wheel, tmp_path / "broken"))
    (broken / "bitsmoe_plugin" / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    code = f"""
import torch
from transformers import AutoModel, Qwen3Config, Qwen3Model
Qwen3Model(Qwen3Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=32))
print("unharmed")
AutoModel.from_pretrained({str(packed_moe_tiny)!r})
"""
    done = python(broken, code, tmp_path)
    assert done.stdout.strip() == "unharmed", done.stderr
    assert done.returncode == 1
    assert "broken on purpose" in done.stderr.splitlines()[-1]


def test_a_transformers_that_cannot_be_registered_with_is_a_warning(installed_wheel, tmp_path) -> None:
    """A later release may change its table; ``import torch`` must not raise because of it."""
    code = """
import sys, types
table = types.ModuleType("transformers.quantizers.auto")
table.register_quantization_config = table.AUTO_QUANTIZATION_CONFIG_MAPPING = None
sys.modules[table.__name__] = table
import torch
print(torch.ones(2).sum().item())
"""
    done = python(installed_wheel, code, tmp_path)
    assert done.stdout.strip() == "2.0", done.stderr
    assert "could not register with transformers" in done.stderr


def test_the_method_has_the_same_name_in_both_packages() -> None:
    """autoload may not import the config that defines it."""
    assert autoload.QUANT_METHOD == QUANT_METHOD
