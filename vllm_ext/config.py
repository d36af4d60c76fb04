"""BitsMoE as a quantization config of vLLM: which layers it serves, and the checkpoint they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.config import ParallelConfig, VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from bitsmoe_plugin.checkpoint.model_sizes import check_model_sizes, check_planned
from bitsmoe_plugin.checkpoint.other_tensors import stored_shapes, tied_by_record, verify_others
from bitsmoe_plugin.checkpoint.packed_files import PackedFiles
from bitsmoe_plugin.codec.dense import with_unpacked
from bitsmoe_plugin.config import QUANT_METHOD, BitsMoEConfig
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.models.gating import GatingForm
from bitsmoe_plugin.models.layer_names import decoder_layer
from vllm_ext import lora, prediction
from vllm_ext.dense import DenseLayers
from vllm_ext.engine_checks import check_engine
from vllm_ext.layer_checks import check_online
from vllm_ext.moe_method import BitsMoEMethod
from vllm_ext.parallel import check_at_start, check_degrees
from vllm_ext.reload import engine_model, read_manifest
from vllm_ext.stream_names import StreamNames
from vllm_ext.weight_loading import LayerNames, Planned, safetensors_files


class BitsMoEServingConfig(QuantizationConfig):
    """Made by vLLM from ``quantization_config`` of config.json.

    Args:
        manifest: options and layers of the checkpoint; None if there is no such entry.

    Raises:
        ConfigError: ``--quantization bitsmoe`` was given for a model that is not packed.
    """

    def __init__(self, manifest: BitsMoEConfig | None = None) -> None:
        super().__init__()
        if manifest is None:
            raise ConfigError(
                "--quantization bitsmoe serves checkpoints written by bitsmoe-plugin, and config.json of "
                "this model has no quantization_config; quantize it first (bitsmoe quantize MODEL OUT)"
            )
        self.manifest = manifest
        self.names = LayerNames(manifest.layers)
        self._depth: int | None = None  # number of decoder layers
        self._linear: list[str] = []  # names of linear layers that the model has made so far
        self._files: PackedFiles | None = None
        self._gatings: dict[str, GatingForm | None] = {}
        self._opened: tuple[str, str | None] | None = None
        self._stream = StreamNames()
        self.dense = DenseLayers(manifest.dense)
        self._is_served = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitsMoEServingConfig:
        """Checks options and format version."""
        return cls(BitsMoEConfig.from_dict(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Overrides nothing; called for every quantized model, it is where the architecture is seen."""
        if hf_quant_cfg.get("quant_method") == QUANT_METHOD:
            check_at_start(getattr(hf_config, "architectures", None) or ())
        return None

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """8.0: older GPUs lack registers for the kernels, which spill 6 to 22 KB there."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Lead packed tensors to their layers; vLLM asks each time that it loads weights into the model."""
        self._follow_engine()
        self.dense.check_asked()
        return self._stream.mapper()

    def _follow_engine(self) -> None:
        """Open what the engine names now: ``reload_weights`` changes it, or its files were replaced."""
        model = engine_model()
        if model is None or not self._is_served:
            return
        hf_config, entries = read_manifest(model)
        named = type(self).from_config(entries)
        if (model.model, model.revision) == self._opened and named.manifest.layers == self.manifest.layers:
            return
        self.dense.check_same(named.manifest.dense)
        named.maybe_update_config(model.model, hf_config)
        self._files, self.manifest = named.files, named.manifest
        self._gatings = named._gatings
        self._opened = model.model, model.revision

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Learn how vLLM's model names its modules."""
        self.names = LayerNames(self.manifest.layers, hf_to_vllm_mapper.map_name)
        self.dense.rename(hf_to_vllm_mapper)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the files of a local checkpoint before an engine is started."""
        if hasattr(hf_config, "to_dict"):
            check_model_sizes(hf_config.to_dict(), self.manifest)
        self._check_depth(hf_config)
        if hf_config is not None and Path(model_name).is_dir():
            self._files = self._open(safetensors_files(model_name), hf_config)
            self._opened = model_name, revision

    def _open(self, paths: list[Path], hf_config: Any) -> PackedFiles:
        files = PackedFiles.open(paths, self.manifest)
        planned = Planned.of(hf_config)
        schemes = {layer.name: layer.scheme for layer in files.dense}
        check_planned(planned.shapes, with_unpacked(stored_shapes(paths), schemes))
        files.check_dense()
        self._gatings = planned.gatings
        recorded = self.manifest.other_tensors
        # vLLM would leave what it finds under no other name as its memory is.
        verify_others(
            paths,
            recorded,
            self.manifest.other_tensors_in_model,
            tied_by_record(recorded),
            as_saved=True,
        )
        return files

    def _check_depth(self, hf_config: Any) -> None:
        """A model with fewer layers than were packed would drop some without a word."""
        depth = getattr(getattr(hf_config, "text_config", hf_config), "num_hidden_layers", None)
        for name in self.manifest.layers:
            if depth is not None and self.names.layer_number(name) >= depth:
                raise CheckpointError(
                    f"quantization_config describes {name}, but the model has num_hidden_layers={depth}; "
                    "config.json was altered"
                )
        self._depth = depth

    @property
    def files(self) -> PackedFiles:
        """The packed layers, fetched from the hub if the model is not a directory."""
        if self._files is None:
            config = get_current_vllm_config()
            model, load = config.model_config, config.load_config
            paths = safetensors_files(model.model, model.revision, load.download_dir)
            self._files = self._open(paths, model.hf_config)
            self._opened = model.model, model.revision
        return self._files

    def gating(self, name: str) -> GatingForm | None:
        """What transformers computes between the projections of a layer's experts; None: nothing known."""
        return self._gatings.get(decoder_layer(name))

    def note_loaded(self) -> None:
        """A layer was loaded; from now on weights that vLLM loads replace others."""
        self._is_served = True

    def check_parallel(self, parallel: ParallelConfig) -> None:
        """See ``parallel.check_degrees``; here again for whatever does not come by ``check_at_start``."""
        check_degrees(self.files.specs, parallel)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Routed experts are packed, some linear layers are in fewer bits, everything else is as it was: None
        is vLLM's own method."""
        config = get_current_vllm_config()
        check_engine(config)
        self.check_parallel(config.parallel_config)
        if isinstance(layer, LinearBase):
            self._linear.append(prefix)
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            dense = self.dense.method(layer, prefix, self.packed_modules_mapping)
            return dense or (UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None)
        return self._experts(layer, prefix, config) if isinstance(layer, RoutedExperts) else None

    def _experts(self, layer: Any, prefix: str, config: VllmConfig) -> BitsMoEMethod | None:
        name = prefix.removeprefix(prediction.DRAFT)
        if prediction.predicts(name, self._depth):
            if prediction.in_target(config):
                prediction.check_stored(name, self._depth, self.manifest.other_tensors)
            return None
        if name == prefix and config.lora_config is not None:  # adapters are not for drafts
            linear = lora.adapter_names(self._linear, self.packed_modules_mapping)
            lora.check_targets(config.lora_config, prefix, linear)
            from vllm_ext.lora_manager import watch_adapters

            watch_adapters()
        check_online(prefix, layer, self.online_quantization_config)
        self._stream.add(prefix)
        return BitsMoEMethod(layer.moe_config, self.names.find(name), self)
