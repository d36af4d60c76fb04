"""Small multimodal models with the files of their processors, and what transformers says of vLLM's sequences.

``python vllm_images.py make FAMILY FOLDER`` writes ``FOLDER/dense`` and ``FOLDER/packed``; ``python
vllm_images.py judge FAMILY MODEL SEQUENCES IMAGES`` prints log-probabilities of ``vllm_generate``'s sequences
as JSON. Both need torchvision, like the processors.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from multimodal_support import END, IMAGE, START, build
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedTokenizerFast

from bitsmoe_plugin import BitsMoEConfig

_MROPE = {"rope_type": "default", "rope_theta": 1e4}
_PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
_PIXELS = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
_QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": 4, "<|vision_start|>": START, "<|vision_end|>": END}

_QWEN_KINDS = ("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor")
_KINDS = {
    "qwen3_vl_moe": _QWEN_KINDS,
    "qwen3_5_moe": _QWEN_KINDS,
    "glm4v_moe": ("Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor"),
}


@dataclass(frozen=True)
class Family:
    """Attributes:
    text: of the language model's config; sizes that vLLM's kernels for the CPU know.
    special: tokens that its processor knows -> id.
    prompt: token ids that stand for an image.
    """

    text: dict[str, Any]
    special: dict[str, int]
    prompt: tuple[int, ...] = (START, IMAGE, END)


FAMILIES = {
    "qwen3_vl_moe": Family(
        {
            "rope_parameters": {**_MROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            "norm_topk_prob": True,
            "head_dim": 32,
        },
        _QWEN,
    ),
    "qwen3_5_moe": Family(
        {
            "rope_parameters": {
                **_MROPE,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.5,
            },
            "head_dim": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_value_heads": 4,
        },
        _QWEN,
    ),
    "glm4v_moe": Family(
        {
            "rope_parameters": {**_MROPE, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
            "head_dim": 32,
            "use_qk_norm": False,  # vLLM asks for it
        },
        {
            "<|image|>": IMAGE,
            "<|video|>": 4,
            "<|begin_of_image|>": START,
            "<|end_of_image|>": END,
            "<|begin_of_video|>": 7,
            "<|end_of_video|>": 8,
        },
    ),
}


def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Words, and the special tokens."""
    words = {f"w{token}": token for token in range(64) if token not in family.special.values()}
    model = Tokenizer(WordLevel({**family.special, **words}, unk_token="w2"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, extra_special_tokens=list(family.special), pad_token="w0"
    )


def processor(name: str) -> Any:
    """Of transformers; patches of 4 x 4 pixels, of which four make a token."""
    words = tokenizer(FAMILIES[name])
    words.add_special_tokens({"additional_special_tokens": list(FAMILIES[name].special)})
    processor_class, images, videos = (getattr(transformers, kind) for kind in _KINDS[name])
    return processor_class(images(**_PATCHES, **_PIXELS), words, videos(**_PATCHES, **_PIXELS))


def make(name: str, folder: Path) -> None:
    """The model, unquantized and packed at 4 bits."""
    dense = build(name, **FAMILIES[name].text)
    dense.get_output_embeddings().weight.data[IMAGE] = 0  # generated, it would stand for one more image
    dense.save_pretrained(folder / "dense")
    tokens = torch.randint(10, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    config = BitsMoEConfig(bits=4, dataset=tokens.tolist(), sequence_length=32)
    model = AutoModelForMultimodalLM.from_pretrained(folder / "dense", quantization_config=config)
    model.save_pretrained(folder / "packed")
    for kind in ("dense", "packed"):
        processor(name).save_pretrained(folder / kind)


@torch.no_grad()
def judge(name: str, folder: str, sequences: list[dict[str, Any]], images: list[str]) -> list[list[float]]:
    """Per sequence, the log-probability of each token after the first; then how far each generated one is
    behind the best."""
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, made = [], AutoProcessor.from_pretrained(folder)
    for sequence, file in zip(sequences, images, strict=True):
        tokens = torch.tensor([sequence["prompt"] + sequence["tokens"]])
        seen: dict[str, Any] = {}
        if file:
            given = made.image_processor(images=[Image.open(file).convert("RGB")], return_tensors="pt")
            seen = {key: given[key] for key in ("pixel_values", "image_grid_thw")}
            seen["mm_token_type_ids"] = tokens.eq(IMAGE).long()
        logits = model(input_ids=tokens, **seen).logits[0, :-1].float().log_softmax(-1)
        chosen = logits.gather(1, tokens[0, 1:, None])[:, 0]
        behind = (logits.max(-1).values - chosen)[-len(sequence["tokens"]) :]
        found.append([*chosen.tolist(), *behind.tolist()])
    return found


def main() -> None:
    """See the module."""
    step, name, folder, *others = sys.argv[1:]
    if step == "make":
        make(name, Path(folder))
        return
    sequences, images = (json.loads(text) for text in others)
    print(json.dumps(judge(name, folder, sequences, images)))


if __name__ == "__main__":
    main()
