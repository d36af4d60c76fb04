"""GPTQ baseline: quantize the routed experts of a MoE checkpoint, or attention too, with gptqmodel, on CPU.

Run as ``python -m bitsmoe_plugin.commands.compare.gptq_quantize``, always in a process of its own:
gptqmodel changes transformers classes for the life of the process. Logs go to stderr; stdout gets
one JSON line ``{"quantize_seconds": ..., "rounded_layers": ..., "settings": {...}}``.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.argument_types import count
from bitsmoe_plugin.commands.compare.answer import answer, baseline_parser
from bitsmoe_plugin.commands.compare.gptq_checkpoint import count_quantized_experts
from bitsmoe_plugin.errors import BitsMoEError

# A negative rule: skip every module whose path does not run through ``.experts.<n>.``.
# Attention, router, shared experts and dense MLPs all fall under it.
SKIP_ALL_BUT_ROUTED_EXPERTS = r"-:^(?!.*\.experts\.\d+\.).*$"


class GptqModelMissingError(BitsMoEError, ImportError):
    """gptqmodel cannot be imported."""


@dataclasses.dataclass(frozen=True)
class GptqSettings:
    """What decides the result of a GPTQ run, apart from model and calibration tokens.

    ``mse`` is the exponent p of the clipping search min sum |q(w) - w|^p (0: plain min-max).
    ``fallback_percent``: a linear layer that sees fewer than this share of the calibration
    tokens is rounded to nearest instead (0.5 is gptqmodel's default; without a fallback it
    leaves a layer that saw no token unquantized). ``all_layers``: not the experts alone.
    """

    bits: int = 2
    group_size: int = 64
    sym: bool = False
    damp_percent: float = 0.05
    desc_act: bool = False
    group_aware: bool = True
    mse: float = 6.0
    fallback_percent: float = 0.5
    checkpoint_format: str = "gptq_v2"
    seed: int = 0
    all_layers: bool = False


def read_calibration(path: Path) -> list[list[int]]:
    """Read a JSON list of token-id lists, all of one length >= 2."""
    sequences = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(sequences, list) or not sequences:
        raise ValueError(f"{path}: expected a non-empty JSON list of token-id lists")
    for index, sequence in enumerate(sequences):
        if not isinstance(sequence, list) or not all(type(token) is int for token in sequence):
            raise ValueError(f"{path}: sequence {index} is not a list of integers")
    lengths = {len(sequence) for sequence in sequences}
    if len(lengths) > 1 or min(lengths) < 2:
        raise ValueError(f"{path}: sequences must share one length >= 2, got {sorted(lengths)}")
    return sequences


def _import_gptqmodel() -> Any:
    """Import gptqmodel with a worker count that suits small machines."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    try:
        import gptqmodel
    except ImportError as error:
        raise GptqModelMissingError(
            f"the GPTQ baseline needs gptqmodel, which cannot be imported ({error}); run `make install-gptq`"
        ) from error
    return gptqmodel


def quantize_config(settings: GptqSettings) -> Any:
    """Translate our settings to a gptqmodel ``QuantizeConfig``; without ``all_layers`` it only touches
    experts. Routers and the head are no layers that gptqmodel quantizes."""
    from gptqmodel.quantization.config import Fallback, QuantizeConfig

    return QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.sym,
        desc_act=settings.desc_act,
        act_group_aware=settings.group_aware,
        damp_percent=settings.damp_percent,
        mse=settings.mse,
        fallback=Fallback(threshold=f"{settings.fallback_percent}%"),
        dynamic=None if settings.all_layers else {SKIP_ALL_BUT_ROUTED_EXPERTS: {}},
        format=settings.checkpoint_format,
        device="cpu",
        offload_to_disk=False,
    )


def _seed_everything(seed: int) -> None:
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def quantize_experts(
    model_dir: Path,
    out_dir: Path,
    calibration: Sequence[Sequence[int]],
    settings: GptqSettings,
    batch_size: int = 4,
    trust_remote_code: bool = False,
) -> tuple[float, int]:
    """Quantize the routed experts of ``model_dir`` and save a GPTQ checkpoint in ``out_dir``.

    Args:
        model_dir: directory of an unquantized transformers checkpoint.
        out_dir: directory that receives the checkpoint.
        calibration: token ids, ``[num_sequences][sequence_length]``.
        settings: the GPTQ settings.
        batch_size: sequences per calibration forward pass; it does not change the result
            beyond float rounding.
        trust_remote_code: run the code that the tokenizer brings along.

    Returns:
        Seconds spent in quantization, without loading and saving, and the number of linear
        layers that fell back to rounding to nearest for want of tokens.
    """
    model_dir, out_dir = model_dir.resolve(), out_dir.resolve()
    gptqmodel = _import_gptqmodel()
    _seed_everything(settings.seed)
    backend = gptqmodel.BACKEND.GPTQ_TORCH
    examples = [{"input_ids": list(tokens), "attention_mask": [1] * len(tokens)} for tokens in calibration]
    with scratch_directory():
        options = {"backend": backend, "trust_remote_code": trust_remote_code}
        model = gptqmodel.GPTQModel.load(str(model_dir), quantize_config(settings), **options)
        start = time.perf_counter()
        log = model.quantize(examples, batch_size=batch_size, backend=backend)
        seconds = time.perf_counter() - start
        model.save(str(out_dir))
    if not count_quantized_experts(out_dir, settings.all_layers):
        raise ValueError(f"{model_dir}: gptqmodel found no routed experts to quantize")
    rows = [row for process_rows in log.values() for row in process_rows]
    return seconds, sum("fallback" in str(row.get("loss")) for row in rows)


@contextlib.contextmanager
def scratch_directory() -> Iterator[None]:
    """Work in a temporary directory: quantizers write logs and caches to the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.chdir(scratch)
        try:
            yield
        finally:
            os.chdir(before)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line; defaults come from ``GptqSettings``."""
    defaults = GptqSettings()
    parser = baseline_parser(__doc__.splitlines()[0], defaults)
    parser.add_argument("--sym", action="store_true", help="symmetric grid (default: zero points)")
    parser.add_argument("--damp-percent", type=float, default=defaults.damp_percent)
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--desc-act", action="store_true", help="columns by activation size")
    order.add_argument(
        "--group-aware", action=argparse.BooleanOptionalAction, default=None,
        help="columns by activation size within groups (default, unless --desc-act)",
    )  # fmt: skip
    parser.add_argument("--mse", type=float, default=defaults.mse)
    parser.add_argument("--fallback-percent", type=float, default=defaults.fallback_percent)
    parser.add_argument(
        "--checkpoint-format", choices=("gptq", "gptq_v2"), default=defaults.checkpoint_format
    )
    parser.add_argument("--batch-size", type=count(), default=4)
    return parser


def settings_from_arguments(arguments: argparse.Namespace) -> GptqSettings:
    """Build the settings; group-aware ordering is on unless refused or replaced."""
    values = vars(arguments)
    names = [field.name for field in dataclasses.fields(GptqSettings)]
    settings = {name: values[name] for name in names}
    if settings["group_aware"] is None:
        settings["group_aware"] = not arguments.desc_act
    return GptqSettings(**settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry point."""
    arguments = build_parser().parse_args(argv)
    settings = settings_from_arguments(arguments)

    def quantize() -> dict[str, Any]:
        calibration = read_calibration(arguments.calibration)
        seconds, rounded = quantize_experts(
            arguments.model,
            arguments.out,
            calibration,
            settings,
            arguments.batch_size,
            arguments.trust_remote_code,
        )
        return {
            "quantize_seconds": round(seconds, 3),
            "rounded_layers": rounded,
            "settings": dataclasses.asdict(settings),
        }

    return answer("gptq_quantize", arguments.model, quantize)


if __name__ == "__main__":
    sys.exit(main())
