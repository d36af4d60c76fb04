"""Read packed layers straight from safetensors files, verified."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bitsmoe_plugin.checkpoint import (
    StoredTensor,
    packed_spec,
    stored_tensors,
    verify_headers,
    verify_packed,
)
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.layer_names import stored_key
from bitsmoe_plugin.packed_spec import PackedSpec
from bitsmoe_plugin.packing import PackedExperts


@dataclass(frozen=True)
class PackedFiles:
    """The packed layers of a checkpoint.

    Attributes:
        config: with the manifest.
        specs: layer name of the manifest -> sizes.
        tensors: from ``stored_tensors``.
    """

    config: BitsMoEConfig
    specs: dict[str, PackedSpec]
    tensors: dict[tuple[str, str], StoredTensor]

    @classmethod
    def open(cls, files: Iterable[str | Path], config: BitsMoEConfig) -> PackedFiles:
        """Check the headers of the files against the manifest; reads no tensor.

        Raises:
            CheckpointError: a packed tensor is missing, surplus or of another dtype or shape, or a
                file is truncated.
        """
        specs = {name: packed_spec(name, config) for name in config.layers}
        tensors = stored_tensors(files)
        verify_headers(tensors, specs)
        return cls(config, specs, tensors)

    def read(self, name: str) -> PackedExperts:
        """The packed tensors of a layer, mapped from the file and verified.

        Raises:
            CheckpointError: their bytes differ from those that were written, or their values do not make
                a sound layer.
        """
        spec = self.specs[name]
        packed = PackedExperts(
            **{
                buffer.removeprefix("bitsmoe_"): self.tensors[stored_key(f"{name}.{buffer}")].read()
                for buffer in spec.tensors()
            }
        )
        verify_packed(name, spec, packed, self.config)
        return packed
