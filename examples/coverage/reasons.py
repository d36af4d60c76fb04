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
    r"'\w+Config' object has no attribute": "vLLM reads an entry of config.json that transformers lacks",
    r"failed to be inspected": "vLLM imports this class with torchvision alone, with which it was not run",
    r"Can't load image processor|Failed to load the processor|Tokenizer not available": (
        "vLLM asks for a processor or tokenizer, which the small model has not: not compared"
    ),
    r"routed_experts.py:572": "vLLM takes fused experts in another order of dimensions than transformers",
    r"moe.py:185": "vLLM knows other names for the number of experts per token than this config.json has",
    r"gemma4_mm.py": "vLLM makes a tower for images, which the small model has not",
    r"^takes more than": "vLLM gave no answer in the time that a class has",
    r"does not have `num_attention_heads`": "vLLM finds no sizes of the language model in config.json",
    r"mlp_layer_types. entries must be in": "transformers 5.19 refuses the kinds of layers in its config",
    r"^KeyError: .*mlp\.experts\.": "transformers saves tensors of identity experts; vLLM knows none",
    r"_moe_C' object has no attribute": "vLLM's build for CPUs lacks an operator of this router",
    r"module 'triton' has no attribute": "vLLM on a CPU has no Triton, which this attention needs there",
    r"dispatcher.py:139": "vLLM's search for its Triton kernels fails on a CPU",
    r"requires FlashAttention": "vLLM on a CPU has no FlashAttention, which this attention needs",
    r"tokenizer is missing special tokens": (
        "vLLM asks for the published tokenizer, which the small model has not: not compared"
    ),
    r"does not dispatch through the Transformers attention": (
        "vLLM has no model of its own for it, and takes linear attention from transformers in none"
    ),
    r"image_outputs": "the forward pass of this class fails in transformers",
    r"missing the required \"forward\"": "the class has no forward pass: it generates through its parts",
}
"""Pattern -> reason. A refusal of ours says what it is about by itself, so it is none of these."""


def reason(text: str) -> str:
    """In words, or the error as it is."""
    return next((words for pattern, words in _KNOWN.items() if re.search(pattern, text)), text)
