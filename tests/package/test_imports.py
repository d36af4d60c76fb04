"""What importing the package loads: registering with transformers should cost little beyond transformers."""

from __future__ import annotations

import subprocess
import sys

HEAVY = (
    *("highspy", "rich", "matplotlib", "jinja2", "datasets", "triton", "optimum", "vllm", "lm_eval"),
    *(f"bitsmoe_plugin.{room}" for room in ("allocation", "calibration", "commands", "models", "pipeline")),
    *(f"bitsmoe_plugin.{room}" for room in ("rounding", "runtime", "spectral", "cli")),
)


def run(code: str) -> str:
    """What a new process prints that runs ``code``."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_registering_loads_no_room_that_it_does_not_need() -> None:
    """Guards the time that ``import bitsmoe_plugin`` takes, in every process that loads any model."""
    code = f"""
import sys
import transformers.quantizers.auto as known
before = set(sys.modules)
import bitsmoe_plugin
print([name for name in {HEAVY} if name in set(sys.modules) - before])
print(bitsmoe_plugin.base.native.library.cache_info().currsize)
assert known.AUTO_QUANTIZATION_CONFIG_MAPPING["bitsmoe"] is bitsmoe_plugin.BitsMoEConfig
assert known.AUTO_QUANTIZER_MAPPING["bitsmoe"] is bitsmoe_plugin.BitsMoEQuantizer
missing = [name for name in bitsmoe_plugin.__all__ if not hasattr(bitsmoe_plugin, name)]
from bitsmoe_plugin import write_model_card
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
print(missing, callable(write_model_card), callable(quantize_to_directory))
"""
    assert run(code).splitlines() == ["[]", "0", "[] True True"]
