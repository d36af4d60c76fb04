"""What a packed model says of its parameters, some of which are packed words.

``num_parameters()`` is that of the model that it stands for: transformers' own knows packed elements of
bitsandbytes alone, and asks no quantizer. ``requires_grad_()`` is of the others: integers have no gradient.
Partial functions, because a bound method is pickled as that of the class.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from bitsmoe_plugin.runtime.dense_linear import quantized_linears
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


def count_original_parameters(model: PreTrainedModel) -> None:
    """Let ``num_parameters`` of a model and the models in it count the experts' original weights."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.num_parameters = partial(num_parameters, module)  # type: ignore[method-assign]


def train_others_only(model: PreTrainedModel) -> None:
    """Let ``requires_grad_`` of a model and the models in it leave packed tensors alone, not fail."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.requires_grad_ = partial(requires_grad_, module)  # type: ignore[method-assign]


def requires_grad_(model: Any, requires_grad: bool = True) -> Any:
    """See ``torch.nn.Module.requires_grad_``."""
    stored = {id(module.weight) for module in quantized_linears(model).values()}  # saved in fewer bits
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in stored:
            parameter.requires_grad_(requires_grad)
    return model


def as_unpacked(model: PreTrainedModel) -> None:
    """Undo ``count_original_parameters`` and ``train_others_only``."""
    for module in model.modules():
        for name in ("num_parameters", "requires_grad_"):
            vars(module).pop(name, None)


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """See ``PreTrainedModel.num_parameters``. Packed experts are not trained."""
    count: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return count
    packed = [module for module in model.modules() if isinstance(module, BitsMoEExperts)]
    return count + sum(_original(module) - _packed(module) for module in packed)


def _packed(module: BitsMoEExperts) -> int:
    return sum(tensor.numel() for _, tensor in module.packed().tensors())


def _original(module: BitsMoEExperts) -> int:
    shape = module.whole_shape
    biases = shape.num_experts * (shape.inputs * shape.intermediate_size + shape.hidden_size)
    # Rows of the fused parameter that stand for experts which compute nothing.
    unused = getattr(module.original, "zero_expert_num", 0) * shape.inputs * shape.intermediate_size
    return shape.weights + (biases if module.spec.has_bias else 0) + unused * shape.hidden_size
