"""The stored tensors of a model that is to be quantized: all that belong to it are read, and none as noise.

transformers casts whatever a file holds to the model's dtype and leaves out, with a warning, what the model
has no name for. Of a checkpoint in low precision that has lost its ``quantization_config`` it makes weights
without their scales, which no later step can tell from real ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.files import read_header
from bitsmoe_plugin.models.json_objects import read_object
from bitsmoe_plugin.models.stored_names import StoredNames

_UNKNOWN = ""
"""Dtype of what an index names and no file here holds."""
_FLOATS = ("F16", "BF16", "F32", "F64", _UNKNOWN)
"""In the notation of safetensors: what a weight may be stored as without anything beside it."""
_PICKLED = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
_SCHEMES = {
    r"scale_inv$": "FP8 with block scales",
    r"weight_(packed|shape|g_idx|zero_point|global_scale)$|input_global_scale$": "compressed-tensors",
    r"(^|[._])(qweight|qzeros|g_idx|scales)$": "GPTQ, AWQ or MXFP4",
    r"_blocks$": "MXFP4",
    r"(absmax|quant_map|quant_state\.\w+|SCB|weight_format)$": "bitsandbytes",
    r"(weight|input|activation|act|proj|bias|[kvqo])_scale(_\d+)?$|_scale_2$": "FP8, FP4 or INT8 with scales",
    r"zero_points?$": "integers with zero points",
    r"(trellis|suh|svh|mcg|mul1)$": "EXL3",
    r"(codebooks|codes|Qidxs|W_q)$": "AQLM, QuIP# or HQQ",
}
"""End of the name of a tensor that belongs to a quantized weight -> what it is of."""
_ENOUGH = 2
"""Names in a message."""


def stored_dtypes(files: Iterable[str | Path]) -> dict[str, str]:
    """Name -> dtype, in the notation of safetensors, of all tensors of a checkpoint; no weight is read.

    Args:
        files: safetensors files, or what torch.save wrote.

    Raises:
        CheckpointError: a file is no safetensors file.
    """
    found: dict[str, str] = {}
    for path in map(Path, files):
        if path.suffix == ".safetensors":
            found.update({name: str(entry.get("dtype")) for name, entry in read_header(path).items()})
        else:
            tensors = load_state_dict(str(path), map_location="meta")
            found.update({name: _PICKLED.get(t.dtype, str(t.dtype)) for name, t in tensors.items()})
    return found


def folder_dtypes(folder: Path) -> dict[str, str]:
    """``stored_dtypes`` of the files in a directory that transformers loads; of files that are not there yet,
    the names that the index has.

    Raises:
        CheckpointError: a file or the index cannot be read.
    """
    for single in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / single).is_file():
            return stored_dtypes([folder / single])
        index = folder / f"{single}.index.json"
        if index.is_file():
            places = read_object(index).get("weight_map")
            places = places if isinstance(places, dict) else {}
            files = sorted({folder / str(file) for file in places.values()})
            found = stored_dtypes(file for file in files if file.is_file())
            return {**dict.fromkeys(places, _UNKNOWN), **found}
    return {}


def check_source(
    names: StoredNames, stored: Mapping[str, str], decoded: Collection[str] = (), method: str | None = None
) -> None:
    """Refuse files whose weights need something that nobody will apply to them.

    Args:
        names: of a model with its experts.
        stored: from ``stored_dtypes``.
        decoded: names of tensors that belong to weights which the loader of ``method`` decodes.
        method: ``quant_method`` that config.json names.

    Raises:
        QuantizationError: a weight is stored in low precision, or a tensor belongs to a module of the model
            and is not used; named, with what it looks like and what to do.
    """
    coarse, unused = {}, {}
    for name, dtype in stored.items():
        target = names.target(name)
        if names.holds(target):
            read = names.is_decoded(name) and (method is None or name in decoded)
            if names.is_floating(target) and dtype not in _FLOATS and not read:
                coarse[name] = dtype
        elif names.is_carried(name):
            if name not in decoded and dtype not in (*_FLOATS, "I64", "I32", "BOOL"):
                coarse[name] = dtype
        elif (
            name not in decoded
            and not names.is_ignored(name)
            and (_scheme(name) or _inside(target, names.modules))
        ):
            unused[name] = dtype
    if coarse or unused:
        raise QuantizationError(_refusal(coarse, unused, method))


def _inside(name: str, modules: set[str]) -> bool:
    """Whether a tensor would be a parameter of a module of the model, or stand below its routed experts."""
    parent = name.rpartition(".")[0]
    experts = re.match(r"(.*\.experts)\.", name)
    return parent in modules or (experts is not None and experts[1] in modules)


def _scheme(name: str) -> str | None:
    """What a tensor that belongs to a quantized weight is of, by its name."""
    return next((scheme for end, scheme in _SCHEMES.items() if re.search(end, name)), None)


def _refusal(coarse: dict[str, str], unused: dict[str, str], method: str | None) -> str:
    schemes = sorted({scheme for name in unused if (scheme := _scheme(name))})
    wrong = []
    if coarse:
        wrong.append(f"stored in low precision: {_listed(coarse)}")
    if unused:
        wrong.append(f"used by nothing in the model: {_listed(unused)}")
    looks = f"; this looks like {' / '.join(schemes)}" if schemes else ""
    if coarse or schemes:
        known = "config.json has no quantization_config that says how to read it"
        if method is not None:
            known = f"transformers does not read it by quant_method {method!r} of config.json"
        cure = (
            f"{known}; give a checkpoint in bfloat16 (the original, or this one dequantized by what made it)"
        )
    else:
        cure = "config.json belongs to another model, or these tensors have to be removed from the files"
    return f"the model's files cannot be taken as they are ({'; '.join(wrong)}){looks}. {cure}"


def _listed(tensors: dict[str, str]) -> str:
    more = f" and {len(tensors) - _ENOUGH} more" if len(tensors) > _ENOUGH else ""
    return ", ".join(f"{name} ({dtype})" for name, dtype in list(tensors.items())[:_ENOUGH]) + more
