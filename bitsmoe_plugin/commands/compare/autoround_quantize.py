"""AutoRound baseline: quantize a MoE checkpoint's routed experts, or attention too, with auto-round, on CPU.

Run as ``python -m bitsmoe_plugin.commands.compare.autoround_quantize``, always in a process of its own:
auto-round changes transformers classes for the life of the process. The checkpoint has the layout
of AutoGPTQ and is read by ``gptq_checkpoint``. Logs go to stderr; stdout gets one JSON line
``{"quantize_seconds": ..., "settings": {...}}``.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.argument_types import count
from bitsmoe_plugin.commands.compare.answer import answer, baseline_parser
from bitsmoe_plugin.commands.compare.gptq_checkpoint import ROUTED_EXPERT, count_quantized_experts
from bitsmoe_plugin.commands.compare.gptq_quantize import read_calibration, scratch_directory
from bitsmoe_plugin.errors import BitsMoEError
from bitsmoe_plugin.models.dense_layers import head_name, linear_layers
from bitsmoe_plugin.models.families import find_moe_layers


class AutoRoundMissingError(BitsMoEError, ImportError):
    """auto-round cannot be imported."""


@dataclasses.dataclass(frozen=True)
class AutoRoundSettings:
    """What decides the result of an AutoRound run, apart from model and calibration tokens.

    ``iters``: steps of signed gradient descent per decoder layer (200 is auto-round's default;
    its recipe "best" takes 1000). ``lr``: None lets auto-round choose, 1 / iters, or 2 / iters for
    1000 steps at 2 or 3 bits. ``alg_ext``: its improved algorithm for 2 bits, symmetric only;
    "best" with it is what its authors recommend for 2 bits. ``batch_size``: sequences per step.
    ``all_layers``: not the experts alone.
    """

    bits: int = 2
    group_size: int = 64
    sym: bool = True
    iters: int = 200
    lr: float | None = None
    alg_ext: bool = False
    batch_size: int = 8
    seed: int = 0
    all_layers: bool = False


def _import_autoround() -> Any:
    try:
        import auto_round
    except ImportError as error:
        raise AutoRoundMissingError(
            f"the AutoRound baseline needs auto-round, which cannot be imported ({error}); "
            "run `make install-autoround`"
        ) from error
    return auto_round


def _samples(calibration: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Batches of one sequence; the mask keeps end-of-text tokens that double as padding."""
    import torch

    tokens = torch.tensor(calibration)
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]


def _linear_layers_to_skip(model: Any, all_layers: bool) -> list[str]:
    """Paths of all linear layers but the routed experts': attention, router, shared experts, dense MLPs,
    head; or with ``all_layers`` only of those that ``dense_bits`` leaves alone too, and of the head."""
    import torch

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    others = [name for name in linear if not ROUTED_EXPERT.search(name)]
    if not all_layers:
        return others
    taken = linear_layers(model, find_moe_layers(model))
    return [name for name in others if name not in taken or name == head_name(model)]


def quantize_experts(
    model_dir: Path,
    out_dir: Path,
    calibration: Sequence[Sequence[int]],
    settings: AutoRoundSettings,
    trust_remote_code: bool = False,
) -> float:
    """Quantize the routed experts of ``model_dir`` and save an AutoGPTQ checkpoint in ``out_dir``.

    Args:
        model_dir: directory of an unquantized transformers checkpoint.
        out_dir: directory that receives the checkpoint.
        calibration: token ids, ``[num_sequences][sequence_length]``.
        settings: the AutoRound settings.
        trust_remote_code: run the code that the tokenizer brings along.

    Returns:
        Seconds spent in quantization and packing, without loading.
    """
    model_dir, out_dir = model_dir.resolve(), out_dir.resolve()
    auto_round = _import_autoround()
    import torch
    from transformers import AutoTokenizer

    from bitsmoe_plugin.models.model_class import load_model

    model = load_model(model_dir)
    options = dataclasses.asdict(settings)
    options["enable_alg_ext"] = options.pop("alg_ext")
    skipped = _linear_layers_to_skip(model, options.pop("all_layers"))
    rounder = auto_round.AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code),
        scheme="W4A16",  # widths and groups are overridden by ours
        dataset=_samples(calibration),
        seqlen=len(calibration[0]),
        nsamples=len(calibration),
        ignore_layers=",".join(skipped),
        device_map="cpu",
        amp=model.dtype != torch.float32,  # else a float32 model would be stored in bfloat16
        enable_torch_compile=False,  # needs a C++ compiler; changes only the speed
        **options,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    with scratch_directory():  # auto-round adds a folder of its own naming below the one it is given
        start = time.perf_counter()
        _, folder = rounder.quantize_and_save(os.path.abspath("out"), format="auto_gptq")
        seconds = time.perf_counter() - start
        shutil.copytree(folder, out_dir, dirs_exist_ok=True)
    if not count_quantized_experts(out_dir, settings.all_layers):
        raise ValueError(f"{model_dir}: auto-round found no routed experts to quantize")
    return seconds


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line; defaults come from ``AutoRoundSettings``."""
    defaults = AutoRoundSettings()
    parser = baseline_parser(__doc__.splitlines()[0], defaults)
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=defaults.sym)
    parser.add_argument("--iters", type=count(), default=defaults.iters)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--alg-ext", action=argparse.BooleanOptionalAction, default=defaults.alg_ext)
    parser.add_argument("--batch-size", type=count(), default=defaults.batch_size)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry point."""
    arguments = build_parser().parse_args(argv)
    names = [field.name for field in dataclasses.fields(AutoRoundSettings)]
    settings = AutoRoundSettings(**{name: getattr(arguments, name) for name in names})

    def quantize() -> dict[str, Any]:
        calibration = read_calibration(arguments.calibration)
        seconds = quantize_experts(
            arguments.model, arguments.out, calibration, settings, arguments.trust_remote_code
        )
        return {"quantize_seconds": round(seconds, 3), "settings": dataclasses.asdict(settings)}

    return answer("autoround_quantize", arguments.model, quantize)


if __name__ == "__main__":
    sys.exit(main())
