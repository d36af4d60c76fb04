"""The options: the one table that constructor, checks, documents and the command line's flags follow from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.option_checks import (
    NOT_FOR_TEMPLATES,
    Check,
    is_budget_table,
    is_expert_table,
    is_template_kwargs,
    number,
    one_of,
)
from bitsmoe_plugin.base.option_table import option, rows_of
from bitsmoe_plugin.base.sizes import size_in_bytes
from bitsmoe_plugin.codec.names import FACTORS, FORMAT_VERSION, GRIDS

ALL_WIDTHS = (0, 1, 2, 3, 4, 6, 8, 16)
DENSE_BITS = (4, 8, 16)
METHOD_NAMES = ("default", "fast", "paper-v1", "paper-v2")
_SAME = object()
_FLAG = one_of(True, False)
_WRITTEN = Check("objects written by this package", lambda value: isinstance(value, dict), tell_type=True)


def _by_method(default: Any, *, paper: Any, fast: Any = _SAME, paper_v2: Any = _SAME) -> dict[str, Any]:
    """What each method sets; ``fast`` is as ``default``, and ``paper_v2`` as ``paper``, unless given."""
    values = (default, default if fast is _SAME else fast, paper, paper if paper_v2 is _SAME else paper_v2)
    return dict(zip(METHOD_NAMES, values, strict=True))


def _are_widths(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and all(type(width) is int and width in ALL_WIDTHS for width in value)
        and value == tuple(sorted(set(value)))
        and any(value)
    )


def _are_projection_bits(value: Any) -> bool:
    return is_budget_table(value) and set(value) <= set(FACTORS)


def _is_size(value: Any) -> bool:
    return value is None or size_in_bytes(value) is not None


def _are_dense_bits(value: Any) -> bool:
    bits = value.values() if isinstance(value, dict) else (value,)
    names = value if isinstance(value, dict) else ("*",)
    return bool(names) and all(type(b) is int and b in DENSE_BITS for b in bits) and all(map(_is_name, names))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, Path)) and bool(str(value))


def _table(value: Any) -> Any:
    return {} if value is None else value


def _widths(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _dense_bits(value: Any) -> Any:
    """A number or a table; of the text of a flag, that is JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value  # which is refused


def _tokenizer(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


class Options:
    """Attributes of ``BitsMoEConfig``, in the order of its arguments."""

    bits: float = option(
        "bits per expert weight to spend, everything that is stored for the experts counted (payload, "
        "scales, widths, bases)",
        check=number(0.1, 16),
        default=2.0,
        flag="N",
    )
    factor_bits: float | None = option(
        "instead of bits: the same count without the two bases, which weigh much where experts are few",
        check=number(0.1, 16).or_none(),
        flag="N",
    )
    dataset: Any = option(
        "calibration text, like what the model will read and write: a .txt file, or a .jsonl file with a "
        "field text, messages or input_ids",
        "In Python also a list of strings, a list of token id lists, a ``datasets`` dataset, streamed or "
        "not, with a column ``text``, ``input_ids`` (and ``attention_mask``, which leaves padding out) or "
        "``messages``, a list of such rows, or an iterator. Needed to quantize, not stored in the checkpoint "
        "(its token count and hash are).",
        flag="FILE",
        stored="never",
        shared=True,
    )
    tokenizer: Any = option(
        "name, path, or tokenizer or processor object; default: the one saved with the model",
        check=Check(
            "a name, the path of a directory, a tokenizer, a processor, or None",
            lambda value: value is None or isinstance(value, str) or callable(value),
        ),
        stored="never",
        shared=True,
        convert=_tokenizer,
    )
    calibration_tokens: int | None = option(
        "use at most this many tokens of the calibration text, sampled from all its documents; if not given, "
        "as many as give an expert 4 x hidden_size on average, but 131,072 to 524,288",
        check=number(1, 10**12, whole=True).or_none(),
        flag="N",
    )
    sequence_length: int = option(
        "tokens per calibration sequence", check=number(8, 10**7, whole=True), default=512, flag="N"
    )
    batch_size: int = option(
        "sequences per forward pass; fewer take less memory",
        check=number(1, 10**6, whole=True),
        default=8,
        flag="N",
    )
    held_out: float = option(
        "share of the calibration sequences that no statistic sees",
        "The output error of each layer is measured on them and reported.",
        check=number(0, 0.5),
        default=0.0625,
    )
    method: str = option(
        f"one of {', '.join(METHOD_NAMES)}; fast takes a third of the time and loses about twice as much, "
        "the others do what the two versions of the publication (arXiv 2606.00079) describe, with worse "
        "results, to compare with",
        "Sets the options below that say so, unless they are given.",
        check=one_of(*METHOD_NAMES),
        default="default",
        flag="NAME",
    )
    widths: tuple[int, ...] = option(
        "bits that a row may take; 0 drops it",
        check=Check(f"rising, distinct members of {ALL_WIDTHS}, not 0 alone", _are_widths),
        by_method=_by_method(ALL_WIDTHS, paper=ALL_WIDTHS),
        convert=_widths,
    )
    grid: str = option(
        "trellis codes rows of up to 4 bits by trellis, uniform rounds all to uniform grids",
        '"tiled" stands in checkpoints that ``import-upstream`` converted.',
        check=one_of(*GRIDS),
        by_method=_by_method("trellis", paper="uniform"),
    )
    basis_bits: int = option(
        "width of the shared bases",
        check=one_of(4, 8, 16),
        by_method=_by_method(4, paper=16, paper_v2=8),
    )
    basis_group_size: int = option(
        "basis values that share a scale; divides hidden_size",
        check=one_of(16, 32, 64, 128, 256),
        default=32,
    )
    joint_basis: bool = option(
        "one input basis for gate and up (True) or one for each (False)",
        check=_FLAG,
        by_method=_by_method(True, paper=False),
    )
    whitening: bool = option(
        "bases in the metric of the inputs and outputs (True) or from plain SVDs (False)",
        check=_FLAG,
        by_method=_by_method(True, paper=False),
    )
    cost: str = option(
        "output estimates the layer's output error from each row's own error at each width, model from the "
        "row's energy and the error of Gaussian rows, spectral is row energy times input energy, relative to "
        "the projection's",
        check=one_of("output", "model", "spectral"),
        by_method=_by_method("output", fast="model", paper="spectral"),
    )
    token_weighting: str = option(
        "residual weighs a token by 1 / mean square of its residual stream, none weighs all alike",
        check=one_of("residual", "none"),
        by_method=_by_method("residual", paper="none"),
    )
    neuron_weighting: bool = option(
        "weigh a neuron's gate and up by what they do to the output (True), or all neurons of an "
        "expert alike",
        check=_FLAG,
        by_method=_by_method(True, paper=False),
    )
    covariance_prior: float = option(
        "weight of the layer's covariance in an expert's own, in tokens per dimension: 0 uses the expert's "
        "alone, 1e6 the layer's",
        "More for short calibration text.",
        check=number(0, 1e6),
        by_method=_by_method(1.0, paper=0.0),
    )
    feedback: bool = option(
        "pass rounding errors on to values not yet rounded (GPTQ)",
        check=_FLAG,
        by_method=_by_method(True, fast=False, paper=False),
    )
    widening: bool = option(
        "choose gate and up scales such that rounding does not shrink rows on average",
        check=_FLAG,
        by_method=_by_method(True, paper=False),
    )
    refit: bool = option(
        "recompute each down factor for the rounded gate and up before rounding it",
        check=_FLAG,
        by_method=_by_method(True, fast=False, paper=False),
    )
    compensation: bool = option(
        "refit it such that it also makes up for what earlier layers lost (no effect unless ``refit`` and "
        "``sequential``)",
        check=_FLAG,
        by_method=_by_method(True, fast=False, paper=False),
    )
    sequential: bool = option(
        "calibrate a layer on the outputs of the quantized layers before it",
        check=_FLAG,
        by_method=_by_method(True, fast=False, paper=False),
    )
    scope: str = option(
        "global spends one budget over all layers, layer the same budget on each",
        check=one_of("global", "layer"),
        by_method=_by_method("global", paper="layer", paper_v2="global"),
    )
    damping: float = option(
        "share of the mean diagonal added to second moments before they are inverted",
        "Of those of fewer than about three tokens per dimension more, up to ten times as much.",
        check=number(1e-6, 1.0),
        default=0.01,
    )
    super_experts: str | dict[str, list[int]] = option(
        "experts that keep their original weights, inside the budget",
        '"auto" leaves those whose output is found to be extreme (``super_experts``) to the allocation; with '
        '``method="fast"`` they keep them, if that takes at most a quarter of the budget; '
        '"keep" has them keep them whatever it takes, {"path.of.experts": [ids]} has these keep them; {} '
        "treats all experts alike.",
        check=Check(
            '"auto", "keep", {} or {"path.of.experts": [expert ids]}',
            lambda value: value in ("auto", "keep") or is_expert_table(value),
        ),
        default="auto",
    )
    all_experts: bool = option(
        "statistics of every expert see all calibration tokens, those that are not routed to it with little "
        "weight",
        "The model itself routes as ever. Slower by experts / experts per token.",
        check=_FLAG,
        default=False,
    )
    seed: int = option(
        "of the few random choices",
        "They are pieces of calibration text, and stand-in tokens for thin experts.",
        check=number(0, 2**63 - 1, whole=True),
        default=0,
        flag="N",
    )
    work_dir: str | Path | None = option(
        "directory in which finished layers are saved while a model is quantized",
        "If the process ends, the same call continues after the last of them, with the same result. Remove "
        "it when the packed model is saved: until then it holds the model's packed tensors. Not stored.",
        check=Check("the path of a directory, or None", lambda value: value is None or _is_path(value)),
        stored="never",
    )
    allow_thin: bool = option(
        "go on where calibration text is so short that leaving a layer's experts out would err less on other "
        "text",
        check=_FLAG,
        default=False,
        stored="never",
    )
    allow_slow: bool = option(
        "quantize also where the compiled kernels are missing, which takes about 20 times as long",
        check=_FLAG,
        default=False,
        stored="never",
    )
    layer_bits: dict[str, float] = option(
        "counted bits of layers that get a budget of their own",
        "The others share what these leave of ``bits`` (or ``factor_bits``, and then bases do not count here "
        "either). Where there are no others it stays unspent.",
        check=Check('{"path.of.experts": bits from 0.1 to 16}', is_budget_table),
        stored="if filled",
        convert=_table,
    )
    projection_bits: dict[str, float] = option(
        "counted bits of projections that get a budget of their own",
        "All that is stored for their rows (payload, row codes, scale grids, kept experts) over their "
        "weights, in each layer of ``layer_bits`` and in all others together; the projections not named "
        "share the rest. Bases and biases belong to no projection.",
        check=Check('{"gate", "up" or "down": bits from 0.1 to 16}', _are_projection_bits),
        stored="if filled",
        convert=_table,
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        "for text with a field messages: arguments of the tokenizer's chat template",
        'Like {"enable_thinking": False}, or {"chat_template": "..."} for another one. Not stored.',
        check=Check(
            f"an object of arguments by name, without {', '.join(NOT_FOR_TEMPLATES)}", is_template_kwargs
        ).or_none(),
        flag="JSON",
        stored="never",
    )
    dense_bits: int | dict[str, int] = option(
        "bits of the linear layers outside the routed experts (attention, shared experts, dense MLPs; "
        "never routers): 16 leaves them as they are, 8 or 4 stores them as compressed-tensors does; or "
        '{"pattern": bits}, the first pattern that fits a layer counts',
        'A pattern is a part of a layer\'s name between dots, like "self_attn" or "q_proj", or has signs '
        'like "*". The head (``lm_head``) is stored in fewer bits only if a pattern names it. Layers that '
        "vLLM computes as one (query, key and value; gate and up) have the same.",
        check=Check('16, 8, 4 or {"pattern": 16, 8 or 4}', _are_dense_bits),
        default=16,
        flag="N",
        stored="if changed",
        convert=_dense_bits,
    )
    dense_group_size: int = option(
        "values that share a scale in the layers of ``dense_bits``; 32 where it does not divide their inputs",
        check=one_of(128, 32),
        default=128,
        stored="if changed",
    )
    size: str | int | None = option(
        "instead of bits: size of all weight files, like 11GB (1e9 bytes) or 10GiB; widths of the experts' "
        "rows and of other linear layers are chosen together",
        "Of linear layers outside the experts each (or those that vLLM computes as one) gets 4 bits, in "
        "groups of ``dense_group_size`` or of 32, 8 or 16, by how much its error changes the output of its "
        "decoder layer; so does the head, if it is not the embeddings, by how much the model's "
        "distribution changes. What a table ``dense_bits`` names is taken from it, and a number other than "
        "16 counts for all layers but the head, which then keeps its dtype as all else does (embeddings, "
        "norms, routers).",
        check=Check("a size like 11GB, 10.5GiB or a number of bytes, or None", _is_size),
        flag="SIZE",
        stored="if filled",
    )
    fit: str | int | None = option(
        "instead of size: memory that weights and the KV cache of fit_context times fit_batch tokens take "
        "together",
        "The cache takes 2 x layers with attention x key-value heads x head_dim x 2 bytes per token, with "
        "latent attention layers x (kv_lora_rank + qk_rope_head_dim) x 2 bytes. What a server needs besides "
        "is not counted.",
        check=Check("a size like 24GB, 22GiB or a number of bytes, or None", _is_size),
        flag="SIZE",
        stored="if filled",
    )
    fit_context: int = option(
        "tokens of a sequence, for fit",
        check=number(1, 10**8, whole=True),
        default=8192,
        flag="N",
        stored="if changed",
    )
    fit_batch: int = option(
        "sequences at once, for fit",
        check=number(1, 10**6, whole=True),
        default=1,
        flag="N",
        stored="if changed",
    )
    tune: int = option(
        "how often all calibration text is seen once more when the model is packed, to move scales such that "
        "its predictions come closer to the original's; 0: not at all",
        "As ``bitsmoe tune`` does it, with its defaults; of the epochs the best on the sequences held out "
        "counts. Not stored; the manifest tells what came of it.",
        check=number(0, 1000, whole=True),
        default=0,
        flag="EPOCHS",
        stored="never",
    )
    tune_through: str = option(
        "how tune goes: through the layers one by one, with the experts of one in memory; through the model, "
        "which is in memory whole, as is the original; both, one after the other; auto: both if there is "
        "memory for it, or else layers",
        "Not stored, as ``tune``.",
        check=one_of("auto", "layers", "model", "both"),
        default="auto",
        flag="WAY",
        stored="never",
    )
    format_version: int = option(
        "of the packed tensors",
        check=number(FORMAT_VERSION, FORMAT_VERSION, whole=True),
        default=FORMAT_VERSION,
        manifest=True,
    )
    layers: dict[str, dict[str, Any]] = option(
        "how each layer is packed; written into checkpoints, as all that follows, not for users",
        check=_WRITTEN,
        manifest=True,
        convert=_table,
    )
    calibration: dict[str, Any] = option(
        "what calibration text there was", check=_WRITTEN, manifest=True, convert=_table
    )
    other_tensors: dict[str, str] = option(
        "fingerprints of all other tensors, by their names in the files",
        check=_WRITTEN,
        manifest=True,
        convert=_table,
    )
    other_tensors_in_model: dict[str, str] = option(
        "the same, by their names in the model",
        check=_WRITTEN,
        manifest=True,
        stored="if filled",
        convert=_table,
    )
    dense: dict[str, Any] = option(
        "which other layers are stored in fewer bits: a quantization_config of compressed-tensors",
        check=_WRITTEN,
        manifest=True,
        stored="if filled",
        convert=_table,
    )


OPTIONS = rows_of(Options)
"""By name, in the order of the arguments."""
