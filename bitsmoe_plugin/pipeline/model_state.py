"""What a model is left as while, and after, it is quantized in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.runtime.dense_linear import scheme_of
from bitsmoe_plugin.runtime.experts import BitsMoEExperts


def check_unpacked(model: nn.Module) -> None:
    """Refuse a model that is packed.

    Raises:
        QuantizationError: naming its first packed layer.
    """
    packed = (name for name, module in model.named_modules() if isinstance(module, BitsMoEExperts))
    name = next(packed, None)
    if name is not None:
        raise QuantizationError(
            f"{name} is quantized already (quant_method 'bitsmoe'); the model that it was made from is needed"
        )


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module in model.modules():  # those that took the place of others
            if isinstance(module, BitsMoEExperts):
                module.training = model.training


@contextmanager
def refused_if_it_fails(model: nn.Module) -> Iterator[None]:
    """If an error leaves this, a model of which experts were replaced refuses to be called and saved: their
    original weights are gone.
    """
    try:
        yield
    except BaseException as error:
        if any(isinstance(m, BitsMoEExperts) or scheme_of(m) is not None for m in model.modules()):
            _refuse_use(model, error)
        raise


def _refuse_use(model: nn.Module, error: BaseException) -> None:
    text = (
        f"quantizing this model stopped part way ({type(error).__name__}: {error}), and its unquantized "
        "weights are gone; load it again"
    )

    def refuse(*_: Any) -> None:
        raise QuantizationError(text)

    model.register_state_dict_pre_hook(refuse)
    for module in model.modules():  # parts of a model are called, too
        if module is model or isinstance(module, BitsMoEExperts):
            module.register_forward_pre_hook(refuse)
