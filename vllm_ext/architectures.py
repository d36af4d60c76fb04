"""Names that transformers gives to classes which vLLM knows by the names in published config.json files.

A model that transformers saves has transformers' name in its config.json; of a name that it does not know,
vLLM runs transformers' code, which it cannot for these.
"""

from __future__ import annotations

_PUBLISHED = {
    "PhimoeForCausalLM": "PhiMoEForCausalLM",
    "Kimi_K25ForConditionalGeneration": "KimiK25ForConditionalGeneration",
}
"""transformers' name -> that of the same model in published files."""


def register_names() -> None:
    """Tell vLLM's registry, through which plugins add models; names that it knows stay as they are."""
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.models
    for name, published in _PUBLISHED.items():
        model = known.get(published)
        if name not in known and hasattr(model, "module_name"):
            ModelRegistry.register_model(name, f"{model.module_name}:{model.class_name}")
