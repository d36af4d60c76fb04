"""Packed models under torch's DistributedDataParallel."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bitsmoe_plugin.runtime.experts import BitsMoEExperts

_WRAPPERS = ("", "base_model.model.", "_orig_mod.", "_orig_mod.base_model.model.")
"""What peft and torch.compile put before the names of a model that they wrap."""


def leave_to_each_process(model: nn.Module) -> None:
    """Have DistributedDataParallel leave out the packed tensors, which every process has loaded.

    It would send all of them when it starts, and gloo and NCCL send no 16-bit integers.
    """
    packed = [
        f"{name}.{tensor}"
        for name, module in model.named_modules()
        if isinstance(module, BitsMoEExperts)
        for tensor in module.spec.tensors()
    ]
    names = [prefix + name for prefix in _WRAPPERS for name in packed]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
