"""What stops a class, in words for the table: of errors of transformers and vLLM, which name no cause."""

from __future__ import annotations

import re

_KNOWN = {
    r"does not recognize this architecture": (
        "transformers 5.19, the newest that vLLM 0.32 takes, does not know this model type"
    ),
    r"^AssertionError: .*cpu_router": "vLLM on a CPU has no router for sigmoid scores without groups",
    r"Sparse Attention is not supported on CPU|no valid sparse MLA backend": (
        "vLLM on a CPU has no sparse attention"
    ),
    r"is_act_and_mul=False is supported only": "vLLM computes experts without a gate on GPUs alone",
    r"selective_scan_fwd": "vLLM's build for CPUs has no kernel for Mamba",
    r"^differs by": "vLLM's unquantized model differs from transformers' by as much as the table says",
    r"Head dimension \d+ is not supported by MLA": (
        "vLLM reads head_dim as the size of a compressed key, which transformers' config calls otherwise"
    ),
    r"image_outputs": "the forward pass of this class fails in transformers",
    r"missing the required \"forward\"": "the class has no forward pass: it generates through its parts",
}
"""Pattern -> reason. A refusal of ours says what it is about by itself, so it is none of these."""


def reason(text: str) -> str:
    """In words, or the error as it is."""
    return next((words for pattern, words in _KNOWN.items() if re.search(pattern, text)), text)
