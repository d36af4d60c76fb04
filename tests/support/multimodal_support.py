"""A small random multimodal model of each family, and inputs with images as its processor makes them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, PreTrainedTokenizerFast
from transformers.image_utils import load_image

FAMILIES = ("qwen3_vl_moe", "qwen3_5_moe", "llama4", "glm4v_moe", "kimi_k25", "gemma4")
IMAGE, START, END = 3, 5, 6
"""Token ids."""
TEMPLATE = (
    "{% for m in messages %}w20 {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %} <start> <image> <end> {% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}"
)
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 4, "vision_start_token_id": START}
_TEXTS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "mlp_only_layers": [],
        "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3], "mrope_interleaved": True},
    },
    "qwen3_5_moe": {
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "rope_parameters": {
            **_ROPE,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        },
    },
    "llama4": {
        "intermediate_size_mlp": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "moe_layers": [0, 2],
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "glm4v_moe": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "kimi_k25": {
        "model_type": "deepseek_v3",
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "gemma4": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "use_bidirectional_attention": "vision",
    },
}
_VISIONS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        **_VISION,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64,
        "patch_size": 4,
    },
    "qwen3_5_moe": {**_VISION, "num_position_embeddings": 64, "patch_size": 4},
    "llama4": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vision_output_dim": 32,
        "image_size": 16,
        "patch_size": 4,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "pixel_shuffle_ratio": 0.5,
    },
    "glm4v_moe": {**_VISION, "patch_size": 4, "image_size": 32},
    "kimi_k25": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 4,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
    },
    "gemma4": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 32,
        "patch_size": 4,
        "position_embedding_size": 64,
        "pooling_kernel_size": 2,
    },
}
_OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {**_TOKENS, "vision_end_token_id": END},
    "qwen3_5_moe": {**_TOKENS, "vision_end_token_id": END},
    "llama4": {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END},
    "glm4v_moe": {
        **{name: _TOKENS[name] for name in ("image_token_id", "video_token_id")},
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": 7,
        "video_end_token_id": 8,
    },
    "kimi_k25": {"image_token_id": IMAGE, "projection_hidden_size": 32},
    "gemma4": {
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": 4,
        "boi_token_id": START,
        "eoi_token_id": END,
    },
}


def build(family: str, **text: Any) -> Any:
    """With weights so large that an image, and every layer, matters.

    Args:
        text: changes of the config of the language model.
    """
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        text_config={**_TEXT, **_TEXTS[family], **text}, vision_config=_VISIONS[family], **_OTHERS[family]
    )
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1 and float(parameter.detach().std()) < 0.1:
            parameter.data.normal_(0, 0.1, generator=g)
    return model


def image_inputs(family: str, images: int = 1, text: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Text, then each image of 16 x 16 pixels (4 tokens) with text behind it, as ``[1, tokens]``."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(images, 3, 16, 16, generator=g)
    ids: list[int] = []
    for part in range(images + 1):
        ids += torch.randint(10, 64, (text,), generator=g).tolist()
        ids += [START, *[IMAGE] * 4, END] if part < images else []
    return model_inputs(family, ids, pixels)


def model_inputs(family: str, ids: list[int], pixels: Tensor) -> dict[str, Tensor]:
    """What a model is called with.

    Args:
        pixels: ``[images, 3, 16, 16]``.
    """
    tokens, images = torch.tensor([ids]), len(pixels)
    kind = tokens.eq(IMAGE).long()
    if not images:
        return {"input_ids": tokens}
    if family == "llama4":
        return {"input_ids": tokens, "pixel_values": pixels}
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)  # [images, 4, 4, 3, 4, 4]
    grid = torch.tensor([[1, 4, 4]] * images)
    if family == "kimi_k25":
        return {"input_ids": tokens, "pixel_values": patches.flatten(0, 2), "image_grid_thw": grid}
    if family == "gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
        return {
            "input_ids": tokens,
            "pixel_values": patches.flatten(1, 2).flatten(2),
            "image_position_ids": places.expand(images, -1, -1).contiguous(),
            "mm_token_type_ids": kind,
        }
    twice = patches.flatten(0, 2)[:, :, None].expand(-1, -1, 2, -1, -1)  # as two frames
    values = {"pixel_values": twice.flatten(1).contiguous(), "image_grid_thw": grid}
    return {"input_ids": tokens, **values, "mm_token_type_ids": kind}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w10`` to ``w63`` and the special tokens, with a chat template that has a place for images."""
    special = {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        "<image>": IMAGE,
        "<video>": 4,
        "<start>": START,
        "<end>": END,
    }
    words = {f"w{token}": token for token in range(64) if token not in special.values()}
    model = Tokenizer(WordLevel({**special, **words}, unk_token="</s>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=TEMPLATE,
    )


class Processor:
    """Like a processor of transformers, whose own need torchvision for most of the families."""

    def __init__(self, family: str) -> None:
        self.family, self.tokenizer, self.chat_template = family, tokenizer(), TEMPLATE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
        """As of transformers, with ``tokenize`` and ``return_dict``."""
        parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
        found = [load_image(p.get("image", p.get("url"))) for p in parts if p["type"] == "image"]
        arrays = [torch.from_numpy(np.array(image.convert("RGB").resize((16, 16)))) for image in found]
        pixels = [array.permute(2, 0, 1) / 255 for array in arrays]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, tools=options.get("tools"))
        ids = self.tokenizer(text.replace("<image>", " ".join(["<image>"] * 4)))["input_ids"]
        return model_inputs(self.family, ids, torch.stack(pixels) if pixels else torch.zeros(0))


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """``[1, tokens, vocabulary]``. Those of Llama4 are read off its output layer: the forward pass of its
    multimodal class fails after that, from transformers 5.21 to 5.24."""
    if model.config.model_type != "llama4":
        return model(**inputs).logits
    found: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *call: found.append(call[-1]))
    try:
        with suppress(AttributeError):
            model(**inputs)
    finally:
        handle.remove()
    return found[0]
