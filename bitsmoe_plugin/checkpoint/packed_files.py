"""Read packed layers straight from safetensors files, verified."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from bitsmoe_plugin.checkpoint.dense_headers import DenseLayer, dense_layers
from bitsmoe_plugin.checkpoint.headers import StoredTensor, stored_tensors, verify_headers
from bitsmoe_plugin.checkpoint.manifest import packed_spec, verify_packed
from bitsmoe_plugin.codec.dense import check_stored, dense_schemes
from bitsmoe_plugin.codec.layout import PackedExperts
from bitsmoe_plugin.codec.sharding import Shard, shard_kept, shard_shape, slice_packed
from bitsmoe_plugin.codec.spec import PackedSpec
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.layer_names import stored_key


@dataclass(frozen=True)
class PackedFiles:
    """The packed layers of a checkpoint.

    Attributes:
        config: with the manifest.
        specs: layer name of the manifest -> sizes.
        tensors: from ``stored_tensors``.
        dense: other layers in fewer bits.
    """

    config: BitsMoEConfig
    specs: dict[str, PackedSpec]
    tensors: dict[tuple[str, str], StoredTensor]
    dense: list[DenseLayer] = field(default_factory=list)

    @classmethod
    def open(cls, files: Iterable[str | Path], config: BitsMoEConfig) -> PackedFiles:
        """Check the headers of the files against the manifest; reads no tensor.

        Raises:
            CheckpointError: a packed tensor is missing, surplus or of another dtype or shape, or a
                file is truncated.
        """
        specs = {name: packed_spec(name, config) for name in config.layers}
        files = list(files)
        tensors = stored_tensors(files)
        verify_headers(tensors, specs)
        return cls(config, specs, tensors, dense_layers(files, dense_schemes(config.dense)))

    def check_dense(self) -> None:
        """Read the other layers in fewer bits.

        Raises:
            CheckpointError: values of one do not make a sound layer.
        """
        for layer in self.dense:
            check_stored(layer.name, layer.read(), layer.scheme, (layer.outputs, layer.inputs))

    def read(self, name: str) -> PackedExperts:
        """The packed tensors of a layer, mapped from the file and verified.

        Raises:
            CheckpointError: their bytes differ from those that were written, or their values do not make
                a sound layer.
        """
        stored = self.stored(name)
        packed = PackedExperts(**{buffer.removeprefix("bitsmoe_"): t for buffer, t in stored.items()})
        verify_packed(name, self.specs[name], packed, self.config)
        return packed

    def read_shard(self, name: str, shard: Shard) -> tuple[PackedSpec, PackedExperts]:
        """Read, verify and ``cut`` a layer, which is mapped from its file, not copied.

        Raises:
            CheckpointError: see ``read``.
        """
        return cut(self.specs[name], self.read(name), shard)

    def stored(self, name: str) -> dict[str, Tensor]:
        """Buffer name -> tensor of a layer, mapped from the file and not verified."""
        return {
            buffer: self.tensors[stored_key(f"{name}.{buffer}")].read()
            for buffer in self.specs[name].tensors()
        }


def cut(spec: PackedSpec, packed: PackedExperts, shard: Shard) -> tuple[PackedSpec, PackedExperts]:
    """Sizes of a shard of a layer, and its tensors."""
    sliced = slice_packed(packed, spec.widths, spec.shape, shard, spec.kept)
    local = replace(
        spec,
        shape=shard_shape(spec.shape, shard),
        payload_words=sliced.payload.numel(),
        kept=shard_kept(spec.kept, shard),
        stored_rows=0 if sliced.row_gains is None else sliced.row_gains.numel(),
    )
    return local, sliced
