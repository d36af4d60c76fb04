"""LoRA beside packed experts: vLLM applies it to linear layers; on packed experts it is refused by name.

vLLM would else fail while it wraps the experts ("Unsupported base layer"); for adapters see ``lora_manager``.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm.config.lora import LoRAConfig

from bitsmoe_plugin.errors import ConfigError

_INNER = "routed_experts"  # vLLM's name of the module within the experts' that holds the parameters
_ROUTER = "gate"


def check_targets(lora: LoRAConfig | None, prefix: str, linear: Iterable[str]) -> None:
    """Refuse a configuration in which vLLM would wrap packed experts.

    Args:
        lora: of the engine, None without LoRA.
        prefix: vLLM's name of the experts.
        linear: names of linear layers that adapters may have, for the message.

    Raises:
        ConfigError: the experts are among the targets.
    """
    if lora is None:
        return
    targets = lora.target_modules
    if targets is not None and not any(_names_experts(target, prefix) for target in targets):
        return
    given = "not given" if targets is None else " ".join(targets)
    raise ConfigError(
        f"LoRA cannot be applied to packed experts, but lora_target_modules ({given}) includes {prefix}; "
        f"pass --lora-target-modules with linear layers only: {' '.join(linear)}"
    )


def _names_experts(target: str, prefix: str) -> bool:
    """Targets are ends of names, or whole names; those of single experts are ``experts.3.gate_proj``."""
    return not {prefix.rpartition(".")[2], _INNER}.isdisjoint(target.split("."))


def adapter_names(linear: Iterable[str], packed: dict[str, list[str]]) -> list[str]:
    """Names that adapters have for vLLM's linear layers, in their order; routers are left out, because
    transformers has no linear layers for them.

    Args:
        linear: vLLM's names, from a model's root or not.
        packed: vLLM's name of layers that it stores as one -> their names in the checkpoint.
    """
    ends = [end for name in linear if (end := name.rpartition(".")[2]) != _ROUTER]
    return list(dict.fromkeys(part for end in ends for part in packed.get(end, [end])))
