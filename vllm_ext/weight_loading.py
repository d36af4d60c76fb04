"""Where vLLM's layers stand in a packed checkpoint, and what of it a process holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmoe_plugin.checkpoint import packed_files
from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.sharding import Shard
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.models import files as model_files
from bitsmoe_plugin.models.families import apply_gating, find_moe_layers, layout_of
from bitsmoe_plugin.models.gating import GatingForm, form_of
from bitsmoe_plugin.models.layer_names import decoder_layer, tensor_key
from bitsmoe_plugin.models.model_class import auto_class


def safetensors_files(model: str, revision: str | None = None, cache: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index if it has one, else all.

    Args:
        model: directory, or name on the hub.
        revision: on the hub.
        cache: directory for downloads, None for the default.

    Raises:
        CheckpointError: there are none, or see ``models.files.safetensors_files``.
    """
    folder = Path(model)
    if not folder.is_dir():
        from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

        folder = Path(download_weights_from_hf(model, cache, ["*.safetensors", model_files.INDEX], revision))
    elif not any(folder.glob("*.safetensors*")):
        raise CheckpointError(
            f"{model} lacks safetensors files, from which packed experts are read: of a remote address "
            "(s3://, gs://, az://) vLLM brings config.json alone; download the checkpoint and serve that"
        )
    return model_files.safetensors_files(folder)


@dataclass(frozen=True)
class Planned:
    """What config.json asks for, as transformers would make it.

    Attributes:
        shapes: name -> shape of all tensors besides the experts.
        gatings: decoder layer (see ``layer_names.decoder_layer``) -> gating of its experts, None for one that
            has no form.
    """

    shapes: dict[str, tuple[int, ...]]
    gatings: dict[str, GatingForm | None]

    @classmethod
    def of(cls, config: Any) -> Planned:
        """Of transformers' config of the model.

        vLLM makes its tensors before any is read, in sizes that nobody compares with the files.

        Raises:
            CheckpointError: no language model can be made from it.
        """
        try:
            with torch.device("meta"):
                model = auto_class(config).from_config(copy.deepcopy(config))
        except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:
            raise CheckpointError(f"config.json describes no model that can be made ({error})") from error
        gatings = {}
        for layer in find_moe_layers(model):
            function = partial(apply_gating, layer.module)
            gatings[decoder_layer(layer.name)] = form_of(function, layout_of(layer.module).has_gate)
            for name in list(dict(layer.module.named_parameters(recurse=False))):
                delattr(layer.module, name)
        return cls({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, gatings)


class LayerNames:
    """Finds the manifest's entry of a layer by vLLM's name for it.

    What stands between decoder layer and experts differs (``block_sparse_moe``, ``mlp``), so decoder
    layers are compared; and what stands before them does where vLLM's mapper knows other names of the files
    than transformers has for its modules (Kimi-K2.5), so then ``layers.3`` of the only list counts.

    Args:
        names: of the manifest.
        rename: vLLM's name of a module of the checkpoint, None to drop it.
    """

    def __init__(self, names: Iterable[str], rename: Callable[[str], str | None] = str) -> None:
        self._by_layer = {self._layer(rename(name) or name): name for name in names}
        self._by_number = {decoder_layer(name): name for name in self._by_layer.values()}

    @staticmethod
    def _layer(name: str) -> str:
        return tensor_key(f"{name}.bitsmoe_payload")[0]

    @classmethod
    def layer_number(cls, name: str) -> int:
        """Index of the decoder layer, -1 if the name has none."""
        last = cls._layer(name).rpartition(".")[2]
        return int(last) if last.isdecimal() else -1

    def find(self, prefix: str) -> str:
        """Raises CheckpointError if the manifest has no such layer."""
        name = self._by_layer.get(self._layer(prefix)) or self._by_number.get(decoder_layer(prefix))
        if name is None:
            raise CheckpointError(
                f"the model has routed experts at {prefix}, but quantization_config describes "
                f"{', '.join(self._by_layer.values()) or 'no layers'}"
            )
        return name


def load_shard(
    files: PackedFiles, name: str, shard: Shard, device: torch.device
) -> tuple[PackedSpec, dict[str, Tensor]]:
    """Read, verify and ``cut`` one layer; the whole layer is mapped from its file, not copied."""
    return cut(files.specs[name], files.read(name), shard, device)


def cut(
    spec: PackedSpec, packed: PackedExperts, shard: Shard, device: torch.device
) -> tuple[PackedSpec, dict[str, Tensor]]:
    """Sizes of a shard of a layer, and copies of its tensors by buffer name, on ``device``."""
    local, sliced = packed_files.cut(spec, packed, shard)
    return local, {buffer: tensor.to(device) for buffer, tensor in sliced.tensors()}
