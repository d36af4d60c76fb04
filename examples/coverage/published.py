"""Makes a small model's files like published ones, where transformers saves others than vLLM reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from model_classes import ModelClass
from recipes import TOKENIZED
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def as_published(entry: ModelClass, config: Any, dense: Path, packed: Path) -> None:
    """Change the dense model's tensors, and put a tokenizer beside both models, where vLLM asks for it.

    Args:
        config: of the model.
    """
    change = {"qwen3_vl_moe": _transposed, "longcat_flash": _without_identity_experts}.get(entry.model_type)
    if change is not None:
        path = dense / "model.safetensors"
        save_file(change(load_file(path), config), path, metadata={"format": "pt"})
    if entry.model_type in TOKENIZED:
        for folder in (dense, packed):
            _tokenizer(config.get_text_config().vocab_size).save_pretrained(folder)


def _transposed(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Fused experts as ``[E, H, 2I]`` and ``[E, I, H]``."""
    fused = re.compile(r".*\.experts\.(gate_up|down)_proj")
    return {
        name: tensor.transpose(1, 2).contiguous() if fused.fullmatch(name) else tensor
        for name, tensor in tensors.items()
    }


def _without_identity_experts(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """They compute nothing; transformers has rows for them all the same."""
    number = re.compile(r".*\.experts\.(\d+)\..*")
    found = {name: number.fullmatch(name) for name in tensors}
    return {n: t for n, t in tensors.items() if not found[n] or int(found[n][1]) < config.n_routed_experts}


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({f"w{token}": token for token in range(size)}, unk_token="w2"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="w0")
