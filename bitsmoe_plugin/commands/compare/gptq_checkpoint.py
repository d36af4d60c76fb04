"""Read GPTQ checkpoints of MoE models without gptqmodel.

A quantized linear layer ``y = x @ W.T``, ``W: [out_features, in_features]``, is stored as

* ``qweight``: int32 ``[in_features * bits / 32, out_features]``, codes packed down the rows;
* ``qzeros``: int32 ``[num_groups, out_features * bits / 32]``, zero points packed along the row;
* ``scales``: float ``[num_groups, out_features]``;
* ``g_idx``: int32 ``[in_features]``, the group of each input column.

``W[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])``. Value k of a packed line
occupies bits ``k * bits`` to ``(k + 1) * bits - 1`` of the line's words, lowest bit first, for
every width: only 3-bit values ever straddle two words. In ``checkpoint_format`` "gptq" (AutoGPTQ)
zero points are stored less one; in "gptq_v2" they are stored as they are.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models.files import open_tensors, safetensors_files, tensor_files
from bitsmoe_plugin.models.json_objects import read_object

SUPPORTED_BITS = (2, 3, 4, 8)
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
WORD_BITS = 32
ROUTED_EXPERT = re.compile(r"\.experts\.\d+\.")
SPLIT_EXPERT = re.compile(r"(?P<module>.*\.experts)\.(?P<expert>\d+)\.(?:gate|up|down)_proj\.weight")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack lines of packed unsigned values.

    Args:
        words: int32 (or int64 with values taken modulo 2**32) ``[lines, num_words]``.
        bits: width of a value; ``num_words * 32`` must be a multiple of it.

    Returns:
        int64 ``[lines, num_words * 32 / bits]``, values in ``[0, 2**bits)``.
    """
    num_words = words.shape[1]
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    offset = torch.arange(0, num_words * WORD_BITS, bits, device=words.device)
    first, shift = offset // WORD_BITS, offset % WORD_BITS
    second = (first + 1).clamp(max=num_words - 1)
    low = unsigned[:, first] >> shift
    # For values inside one word this only adds bits above the mask (shift <= 32 - bits).
    high = unsigned[:, second] << (WORD_BITS - shift)
    return (low | high) & ((1 << bits) - 1)


def unpack_zero_points(qzeros: torch.Tensor, bits: int, checkpoint_format: str) -> torch.Tensor:
    """Unpack zero points and undo the "gptq" format's offset of one.

    gptqmodel writes that offset for 2, 4 and 8 bits by subtracting 1 from every field in one
    32-bit subtraction, so a zero point of 0 borrows from the field above it. Adding back whole
    words undoes this exactly; 3-bit fields are shifted one by one, modulo 8.

    Args:
        qzeros: int32 ``[num_groups, out_features * bits / 32]``.

    Returns:
        int64 ``[num_groups, out_features]``, values in ``[0, 2**bits)``.
    """
    if checkpoint_format == "gptq_v2":
        return unpack_words(qzeros, bits)
    if WORD_BITS % bits:
        return (unpack_words(qzeros, bits) + 1) & ((1 << bits) - 1)
    one_in_every_field = sum(1 << position for position in range(0, WORD_BITS, bits))
    return unpack_words(qzeros.to(torch.int64) + one_in_every_field, bits)


def _check_parts(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    checkpoint_format: str,
) -> None:
    """Raise CheckpointError unless the four tensors describe one layer."""
    if bits not in SUPPORTED_BITS:
        raise CheckpointError(f"{bits}-bit GPTQ is not supported; known: {SUPPORTED_BITS}")
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise CheckpointError(
            f"checkpoint_format {checkpoint_format!r} is not supported; known: {CHECKPOINT_FORMATS}"
        )
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32:
        raise CheckpointError(f"qweight and qzeros must be int32, got {qweight.dtype} and {qzeros.dtype}")
    (num_groups, out_features), in_features = scales.shape, g_idx.numel()
    layer = f"{bits}-bit layer with {in_features} inputs, {out_features} outputs"
    if not in_features or in_features * bits % WORD_BITS or out_features * bits % WORD_BITS:
        raise CheckpointError(f"{layer}: inputs and outputs must fill {WORD_BITS}-bit words")
    words_in, words_out = in_features * bits // WORD_BITS, out_features * bits // WORD_BITS
    expected = {"qweight": (words_in, out_features), "qzeros": (num_groups, words_out)}
    found = {"qweight": tuple(qweight.shape), "qzeros": tuple(qzeros.shape)}
    if expected != found:
        raise CheckpointError(f"{layer}, {num_groups} groups: expected {expected}, got {found}")
    if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < num_groups:
        raise CheckpointError(
            f"g_idx has groups {int(g_idx.min())} to {int(g_idx.max())}, scales have {num_groups}"
        )


def dequantize_gptq_linear(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    checkpoint_format: str,
) -> torch.Tensor:
    """Return the dense weight of one quantized linear layer.

    Args:
        qweight: int32 ``[in_features * bits / 32, out_features]``.
        qzeros: int32 ``[num_groups, out_features * bits / 32]``.
        scales: float16, bfloat16 or float32 ``[num_groups, out_features]``.
        g_idx: int32 ``[in_features]``; any order (``desc_act``) is allowed.
        bits: 2, 3, 4 or 8.
        checkpoint_format: "gptq" or "gptq_v2".

    Returns:
        float32 ``[out_features, in_features]``; products are formed in float32.
    """
    _check_parts(qweight, qzeros, scales, g_idx, bits, checkpoint_format)
    codes = unpack_words(qweight.T, bits)  # [out_features, in_features]
    zeros = unpack_zero_points(qzeros, bits, checkpoint_format)  # [num_groups, out_features]
    group = g_idx.to(torch.int64)
    return scales.float()[group].T * (codes - zeros[group].T).float()


def _settings(directory: Path) -> dict[str, Any]:
    """The quantization settings: in config.json, or in AutoGPTQ's file of its own."""
    path = directory / "config.json"
    found = read_object(path).get("quantization_config") if path.is_file() else None
    own = directory / "quantize_config.json"
    if found is None and own.is_file():
        return {"quant_method": "gptq", **read_object(own)}
    return {"quant_method": None} if found is None else found


def is_gptq(directory: Path | str) -> bool:
    """True for the directory of a GPTQ checkpoint, of AutoGPTQ or GPTQModel."""
    return Path(directory).is_dir() and _settings(Path(directory)).get("quant_method", "gptq") == "gptq"


def checkpoint_format_of(directory: Path) -> str:
    """Return "gptq" or "gptq_v2"; checkpoints older than the field are "gptq"."""
    found = _settings(directory)
    method = found.get("quant_method", "gptq")
    layout = found.get("checkpoint_format") or "gptq"
    if method != "gptq" or layout not in CHECKPOINT_FORMATS:
        raise CheckpointError(
            f"{directory}: quant_method {method!r} with checkpoint_format {layout!r} is not GPTQ"
        )
    return layout


def _tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """Yield every (name, lazily read safetensors file) of a checkpoint, shard by shard."""
    # AutoGPTQ names its files after the settings (gptq_model-4bit-128g.safetensors).
    indices = sorted(path.name for path in directory.glob("*.safetensors.index.json"))
    files = safetensors_files(directory, *indices[:1])
    tensor_files(files)  # it refuses what safetensors does not notice
    for file in files:
        with open_tensors(file) as handle:
            yield from ((name, handle) for name in list(handle.keys()))


def expert_bytes(directory: Path | str) -> int:
    """Count the bytes of all tensors of routed experts (``.experts.<n>.`` in the name).

    A ``g_idx`` in rising order says no more than the group size does; it is stored all the same,
    but a loader needs none of it, so it is left out in favour of GPTQ.
    """
    return _bytes_by_part(Path(directory))[0]


def other_bytes(directory: Path | str) -> int:
    """The same of all other tensors; a head that is tied to the embeddings is left out."""
    return _bytes_by_part(Path(directory))[1]


def _bytes_by_part(directory: Path) -> tuple[int, int]:
    experts = others = 0
    tied = read_object(directory / "config.json").get("tie_word_embeddings", False)
    for name, handle in _tensors(directory):
        tensor = handle.get_tensor(name)
        redundant = name.endswith(".g_idx") and bool((tensor.diff() >= 0).all())
        size = 0 if redundant or (tied and name == "lm_head.weight") else tensor.nbytes
        is_expert = ROUTED_EXPERT.search(name) is not None
        experts, others = experts + size * is_expert, others + size * (not is_expert)
    return experts, others


def count_quantized_experts(directory: Path | str, all_layers: bool = False) -> int:
    """Return the number of quantized linear layers of routed experts.

    Args:
        all_layers: others were to be quantized too.

    Raises CheckpointError if an expert's layer was left dense (gptqmodel skips layers that saw
    no token when its fallback is off), or not as many others were quantized as should be: none,
    or at least one.
    """
    count = others = 0
    for name, _ in _tensors(Path(directory)):
        is_expert = ROUTED_EXPERT.search(name) is not None
        if is_expert and name.endswith(".weight"):
            raise CheckpointError(f"{directory}: expert tensor {name!r} was not quantized")
        quantized = name.endswith(".qweight")
        if quantized and not is_expert and not all_layers:
            raise CheckpointError(f"{directory}: {name!r} is quantized but is no routed expert")
        count, others = count + (quantized and is_expert), others + (quantized and not is_expert)
    if all_layers and not others:
        raise CheckpointError(f"{directory}: nothing but routed experts was quantized")
    return count


def _dequantize(prefix: str, parts: dict[str, torch.Tensor], layout: str) -> torch.Tensor:
    """Dequantize one layer; its width follows from the shapes of ``qzeros`` and ``scales``."""
    bits = parts["qzeros"].shape[1] * WORD_BITS // parts["scales"].shape[1]
    try:
        return dequantize_gptq_linear(**parts, bits=bits, checkpoint_format=layout)
    except CheckpointError as error:
        raise CheckpointError(f"layer {prefix!r}: {error}") from error


def dequantized_state_dict(
    directory: Path | str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, dense tensor) for a whole checkpoint, reading one tensor at a time.

    The four tensors of a quantized linear become ``.weight`` ``[out_features, in_features]`` in
    ``dtype``; all others pass unchanged. Widths may differ by layer.
    """
    directory = Path(directory)
    layout = checkpoint_format_of(directory)
    pending: dict[str, dict[str, torch.Tensor]] = {}
    for name, handle in _tensors(directory):
        prefix, _, part = name.rpartition(".")
        if part not in _PARTS:
            yield name, handle.get_tensor(name)
            continue
        parts = pending.setdefault(prefix, {})
        parts[part] = handle.get_tensor(name)
        if len(parts) == len(_PARTS):
            weight = _dequantize(prefix, pending.pop(prefix), layout)
            yield f"{prefix}.weight", weight.to(dtype)
    if pending:
        prefix, parts = next(iter(pending.items()))
        raise CheckpointError(f"layer {prefix!r} lacks {sorted(set(_PARTS) - set(parts))}")


def fuse_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack experts saved as ``experts.<n>.{gate,up,down}_proj.weight`` into fused parameters.

    Quantizers split fused experts into layers of these names for every family; transformers fuses
    them on loading only for families whose original checkpoints use the names (Mixtral's do not).
    A module that lacks a layer is left as it is, for loading to complain about.
    """
    modules: dict[str, set[int]] = {}
    for name in weights:
        if match := SPLIT_EXPERT.fullmatch(name):
            modules.setdefault(match["module"], set()).add(int(match["expert"]))
    fused = dict(weights)
    for module, experts in modules.items():
        parts = {
            part: [f"{module}.{expert}.{part}_proj.weight" for expert in range(max(experts) + 1)]
            for part in ("gate", "up", "down")
        }
        if not any(name in weights for name in parts["gate"]):  # experts without one
            del parts["gate"]
        if any(name not in weights for names in parts.values() for name in names):
            continue
        *inputs, down = (torch.stack([fused.pop(name) for name in names]) for names in parts.values())
        fused[f"{module}.{'gate_up_proj' if len(inputs) > 1 else 'up_proj'}"] = torch.cat(inputs, dim=1)
        fused[f"{module}.down_proj"] = down
    return fused


def _drop_empty_biases(weights: dict[str, torch.Tensor], directory: Path) -> None:
    """Remove the biases of zero that AutoGPTQ gives to every layer it quantizes."""
    quantized = {name.rpartition(".")[0] for name, _ in _tensors(directory) if name.endswith(".qweight")}
    for name in [f"{prefix}.bias" for prefix in quantized]:
        if name in weights and not bool(weights[name].any()):
            del weights[name]


def load_gptq_model(directory: Path | str, dtype: torch.dtype | None = None) -> Any:
    """Build the plain transformers model of a GPTQ checkpoint, with dense weights in ``dtype``.

    Args:
        dtype: that of config.json by default, or else float16, in which scales are stored.

    Raises CheckpointError if a parameter is missing (hence random), unexpected or misshapen.
    """
    from transformers import AutoConfig

    from bitsmoe_plugin.models.model_class import auto_class

    directory = Path(directory)
    config = AutoConfig.from_pretrained(directory)
    dtype = dtype or config.dtype or torch.float16
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # the auto class itself accepts no state_dict
        model_class = type(auto_class(config).from_config(config))
    weights = fuse_experts(dict(dequantized_state_dict(directory, dtype)))
    _drop_empty_biases(weights, directory)
    try:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # an expert that is missing in part cannot be fused
        raise CheckpointError(f"{directory}: weights do not fit the model: {error}") from error
    problems = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    if problems:
        raise CheckpointError(f"{directory}: weights do not fit the model: {problems}")
    return model
