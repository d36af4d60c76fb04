"""The manifest of a model whose packed tensors may have changed since it was loaded."""

from __future__ import annotations

from typing import Any

from bitsmoe_plugin.checkpoint.manifest import tensor_digest
from bitsmoe_plugin.codec import packed_values
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


def describe_current(model: Any, config: BitsMoEConfig) -> None:
    """Write the hashes of the packed tensors as they are now into the manifest.

    ``load_state_dict`` and writes in place leave others than those that were loaded, and a checkpoint whose
    hashes are not those of its tensors cannot be loaded. Layers that are not in memory, or of which a process
    holds a part, stay as described.

    Raises:
        CheckpointError: tensors that do not fit one another, or that the manifest does not describe.
    """
    for name, module in model.named_modules():
        if not isinstance(module, BitsMoEExperts) or any(t.is_meta for _, t in module.packed().tensors()):
            continue
        if module.spec.shape != module.whole_shape:
            continue
        module.verify(name)
        packed = module.packed()
        packed_values.check_packed(name, module.spec, packed)
        _entry(model, name, config)["sha256"] = tensor_digest(packed)


def _entry(model: Any, name: str, config: BitsMoEConfig) -> dict[str, Any]:
    """Of a layer; names differ by the prefix of the base model where that is saved alone."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for described in (name, prefix + name, name.removeprefix(prefix)):
        if described in config.layers:
            entry: dict[str, Any] = config.layers[described]
            return entry
    raise CheckpointError(f"quantization_config does not describe {name}; it cannot be saved")
