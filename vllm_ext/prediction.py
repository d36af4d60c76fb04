"""Layers beside those of the manifest that vLLM asks about when it drafts tokens (speculative decoding)."""

from __future__ import annotations

from collections.abc import Collection

from vllm.config import VllmConfig

from bitsmoe_plugin.checkpoint.model_sizes import layer_number
from bitsmoe_plugin.errors import ConfigError

DRAFT = "draft_model."
"""What vLLM puts before the names of a model that drafts for another."""
_MTP = ".mtp"


def predicts(name: str, depth: int | None) -> bool:
    """Whether a layer is for multi-token prediction: quantization leaves those as they are.

    Args:
        name: of a module or tensor, vLLM's or the checkpoint's (``mtp.layers.0...``,
            ``model.mtp_block.0...``, or numbered beyond the decoder layers).
        depth: number of decoder layers, None if not known.
    """
    return _MTP in f".{name}" or (depth is not None and layer_number(name) >= depth)


def in_target(config: VllmConfig) -> bool:
    """Whether the tensors of what drafts come from the checkpoint of the target itself."""
    draft = getattr(config.speculative_config, "draft_model_config", None)
    return draft is not None and draft.model == config.model_config.model


def check_stored(prefix: str, depth: int | None, names: Collection[str]) -> None:
    """vLLM does not notice that tensors are missing from a quantized checkpoint.

    Args:
        prefix: vLLM's name of a prediction layer's experts.
        depth: see ``predicts``.
        names: of all tensors of the checkpoint that are not packed; none if they were not recorded.

    Raises:
        ConfigError: there are none for such layers.
    """
    if names and not any(predicts(name, depth) for name in names):
        raise ConfigError(
            f"the checkpoint has no tensors of prediction layers, which {prefix} needs; drop the "
            "speculative_config with method mtp, or quantize a checkpoint that has them"
        )
