"""Checkpoints that are stored in low precision, read by transformers' own quantizer of their kind.

That quantizer is told to dequantize. It then has rules of conversion that make weights of what is stored:
they are used where the model is loaded, and where its experts are, layer by layer. Nothing is decoded here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)
from transformers.quantizers.base import HfQuantizer

from bitsmoe_plugin.config import QUANT_METHOD
from bitsmoe_plugin.errors import QuantizationError
from bitsmoe_plugin.models.fp8_operations import FusedDequantize, PartialBlocksDequantize

READ = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
"""Methods that transformers dequantizes, and whose tensors are checked, see ``low_precision_checks``."""
FUSED = ("gate_up_proj", "down_proj")
"""Names of routed experts' weights that are stored in one piece."""
_CURE = (
    "give a checkpoint in bfloat16 (the original, or this one dequantized by what made it), or one in "
    f"{', '.join(READ)}"
)


def stored_settings(config: Any) -> dict[str, Any] | None:
    """``quantization_config`` of a model's config, or that of its text part; None: there is none.

    Args:
        config: of transformers.

    Raises:
        QuantizationError: they do not say by which method.
    """
    for part in (config, config.get_text_config(decoder=True)):
        found = getattr(part, "quantization_config", None)
        if found:
            settings = dict(found if isinstance(found, Mapping) else found.to_dict())
            if not settings.get("quant_method"):
                raise QuantizationError(f"quantization_config in config.json has no quant_method; {_CURE}")
            return settings
    return None


def method_of(settings: Mapping[str, Any]) -> str:
    """``quant_method`` of such settings as a string."""
    method = settings.get("quant_method")
    return str(getattr(method, "value", method))[:80]


class LowPrecision:
    """How a checkpoint is stored.

    Attributes:
        method: ``quant_method``.
        settings: its ``quantization_config``.
        quantizer: of transformers, set to dequantize.
    """

    def __init__(self, settings: Mapping[str, Any], stored: Mapping[str, str]) -> None:
        """
        Args:
            settings: from ``stored_settings``.
            stored: name -> dtype of the checkpoint's tensors; one of them is named in errors.

        Raises:
            QuantizationError: transformers does not know the method, cannot dequantize what is stored by it
                while it loads, or cannot use the settings.
        """
        self.settings = dict(settings)
        self.method = method_of(settings)
        self._example = example(stored)
        self._fused = any(name.endswith(f"{weight}_scale_inv") for name in stored for weight in FUSED)
        if self.method not in READ:
            known = self.method in AUTO_QUANTIZATION_CONFIG_MAPPING
            why = "has no operation that dequantizes it while it loads" if known else "does not know it"
            raise QuantizationError(f"{self._what()}: transformers {transformers.__version__} {why}; {_CURE}")
        if not hasattr(HfQuantizer, "get_load_operations"):
            raise QuantizationError(
                f"{self._what()}: transformers {transformers.__version__} does not dequantize layer by layer "
                "while it loads; upgrade it (5.24 does)"
            )
        self.quantizer = self._make_quantizer()

    def _what(self) -> str:
        return f"{self._example} is stored by quant_method {self.method!r}"

    def _make_quantizer(self) -> Any:
        try:
            config: Any = AutoQuantizationConfig.from_dict(copy.deepcopy(self.settings))
            config.dequantize = True
            quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=True)
            quantizer.validate_environment(device_map=None)
        except ImportError as error:
            raise QuantizationError(
                f"{self._what()}, to read which {' '.join(str(error).split())}"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise QuantizationError(
                f"{self._what()}, but its quantization_config in config.json cannot be used: {reason}"
            ) from error
        return quantizer

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale, of the methods that have blocks in two dimensions."""
        found = getattr(self.quantizer.quantization_config, "weight_block_size", None)
        return (int(found[0]), int(found[1])) if found else None

    def values(self, dtype: str, count: int) -> int:
        """Number of values of a stored weight.

        Args:
            dtype: in the notation of safetensors.
            count: numbers of this dtype.
        """
        if dtype == "I32":  # of compressed-tensors, which packs 4 or 8 bits
            bits = {group.weights.num_bits for group in self._groups() if group.weights.type == "int"}
            return count * (32 // min(bits))
        return count if dtype.startswith("F8") else 2 * count

    def _groups(self) -> list[Any]:
        return list(self.quantizer.compressor.quantization_config.config_groups.values())

    def operation(self, expert: bool) -> Any:
        """Of transformers, which decodes a single weight.

        Args:
            expert: that of a routed expert.
        """
        kind = self.quantizer.get_load_operations()["dequantize"]
        if self.method != "compressed-tensors":
            return self._with_partial_blocks(kind(self.quantizer))
        from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme

        chosen = get_experts_scheme if expert else get_dense_scheme
        return kind(self.quantizer, scheme=chosen(self.quantizer.compressor.quantization_config))

    def conversions(self, rules: Sequence[Any], model: Any) -> list[Any]:
        """The rules that load this checkpoint, made of those that load an unquantized one.

        Args:
            rules: of a model, from transformers.
            model: whose rules they are.
        """
        extended = self.quantizer.update_weight_conversions(list(rules), model)
        extended = self._with_fused(extended) if self._fused else extended
        if self.block is not None:
            for rule in extended:
                if isinstance(rule, WeightConverter) and rule not in rules:
                    rule.operations = [self._with_partial_blocks(operation) for operation in rule.operations]
        return list(extended)

    def _with_fused(self, rules: Sequence[Any]) -> list[Any]:
        """The same rules, and for experts' weights that are stored in one piece with their scales.

        transformers has operations for these, and rules for such weights in other precisions alone.
        """
        operation = FusedDequantize(self.quantizer.get_load_operations()["dequantize"](self.quantizer))
        missing, found = set(FUSED), []
        for rule in rules:
            sources = rule.source_patterns if isinstance(rule, WeightConverter) else []
            name = sources[0].rpartition(".")[2] if len(sources) == 1 else ""
            if name in FUSED:
                missing.discard(name)
                scales = f"{sources[0]}_scale_inv"
                steps = [operation, *rule.operations]
                rule = rule.copy([sources[0], scales], rule.target_patterns, operations=steps)
            found.append(rule)
        added = [(f"experts.{name}", f"experts.{name}_scale_inv") for name in sorted(missing)]
        return [WeightConverter([*pair], pair[0], [operation]) for pair in added] + found

    def _with_partial_blocks(self, operation: Any) -> Any:
        dequantize = self.quantizer.get_load_operations()["dequantize"]
        if not isinstance(operation, dequantize) or self.block is None:
            return operation
        return PartialBlocksDequantize(operation, self.block)


def check_loaded(model: Any) -> None:
    """Refuse a model that transformers keeps in low precision.

    Raises:
        QuantizationError: naming the method and what to do.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    method = method_of({"quant_method": quantizer.quantization_config.quant_method}) if quantizer else None
    if method not in (None, QUANT_METHOD):
        raise QuantizationError(
            f"the model was loaded in {method}; load it with quantization_config=BitsMoEConfig(...), which "
            "quantizes its experts layer by layer, or with dequantize=True in its own config"
        )


def example(stored: Mapping[str, str]) -> str:
    """A tensor that is not stored in floating point of 16 bits or more, with its dtype; else any.

    Args:
        stored: name -> dtype in the notation of safetensors.
    """
    coarse = (name for name, dtype in stored.items() if dtype not in ("F16", "BF16", "F32", "F64", ""))
    name = next(coarse, next(iter(stored), None))
    return "the model" if name is None else f"{name} ({stored[name] or 'not here yet'})"


def plain_rules(rules: Sequence[Any], extended: Sequence[Any]) -> list[Any]:
    """Of the rules for an unquantized checkpoint, those that a loaded one has used: what it is saved by.

    Args:
        rules: as they were given to ``LowPrecision.conversions``.
        extended: what that returned, after the checkpoint was loaded.
    """
    replaced = [rule for rule in extended if not any(rule is other for other in rules) and rule.was_used()]
    return [rule for rule in rules if rule.was_used() or any(_loads_same(rule, other) for other in replaced)]


def _loads_same(rule: Any, other: Any) -> bool:
    same_kind = isinstance(rule, WeightConverter) and isinstance(other, WeightConverter)
    return (
        same_kind
        and rule.scope_prefix == other.scope_prefix
        and rule.target_patterns == other.target_patterns
    )


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a model computes whose config names no dtype, so that it would be that of a stored tensor."""
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) else torch.bfloat16
