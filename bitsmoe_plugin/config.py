"""BitsMoEConfig: every option of quantization, validated, and the manifest of a packed checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from bitsmoe_plugin.base.option_checks import (
    check_choice,
    check_number,
    check_template_kwargs,
    fail,
    is_budget_table,
    is_expert_table,
)
from bitsmoe_plugin.codec import row_codec, tiled
from bitsmoe_plugin.codec.layout import FACTORS, FORMAT_VERSION
from bitsmoe_plugin.config_changes import ChangeableConfig
from bitsmoe_plugin.errors import CheckpointError
from bitsmoe_plugin.presets import ALL_WIDTHS, METHODS

QUANT_METHOD = "bitsmoe"
_FLAGS = (
    "joint_basis",
    "whitening",
    "neuron_weighting",
    "feedback",
    "widening",
    "refit",
    "compensation",
    "sequential",
)
_RUNTIME_ONLY = ("dataset", "tokenizer", "chat_template_kwargs", "work_dir", "made_with")


def _check_tiled(basis_bits: int, basis_group_size: int) -> None:
    """Bases that the grid "tiled" has."""
    check_choice("basis_bits", basis_bits, (8, 16))
    check_choice("basis_group_size", basis_group_size, (tiled.TILE,))


def _refuse_other_formats(format_version: Any, packed: bool) -> None:
    """A checkpoint (``packed``) of before the first release, or of a later one than this."""
    if not isinstance(format_version, int):
        return  # an option of the wrong type, which validate names
    what = f"checkpoint has BitsMoE format version {format_version}"
    if 0 < format_version < FORMAT_VERSION and packed:
        raise CheckpointError(
            f"{what}, of before the first release; this release reads version {FORMAT_VERSION}. "
            "Quantize the model again."
        )
    if format_version > FORMAT_VERSION:
        raise CheckpointError(f"{what}; this release reads version {FORMAT_VERSION}. Upgrade bitsmoe-plugin.")


class BitsMoEConfig(ChangeableConfig):
    """How to quantize the routed experts of an MoE model, and how a checkpoint was quantized.

    Args:
        bits: counted bits per expert weight: everything stored for the experts (payload, scales,
            widths, bases) over the number of original expert weights. 0.1 to 16.
        factor_bits: if given, replaces ``bits``: the same count without the two bases, for models whose
            few experts make the bases a large share.
        layer_bits: counted bits of layers that get a budget of their own, {"path.of.experts": bits}; the
            others share what these leave of ``bits`` (or ``factor_bits``, and then bases do not count here
            either). Where there are no others it stays unspent.
        projection_bits: the same for projections, {"gate", "up" or "down": bits}: all that is stored for
            their rows (payload, row codes, scale grids, kept experts) over their weights, in each layer of
            ``layer_bits`` and in all others together; the projections not named share the rest. Bases and
            biases belong to no projection.
        dataset: calibration text: list of strings, list of token id lists, a ``datasets`` dataset,
            streamed or not, with a column ``text``, ``input_ids`` (and ``attention_mask``, which leaves
            padding out) or ``messages``, a list of such rows, an iterator, or a path to a .txt or .jsonl
            file. Needed to quantize, not stored in the checkpoint (its token count and hash are).
        tokenizer: name, path or tokenizer object; default: the one saved with the model.
        chat_template_kwargs: arguments of the tokenizer's chat template, for a dataset of ``messages``:
            {"enable_thinking": False}, or {"chat_template": "..."} for another one. Not stored.
        calibration_tokens: use at most this many tokens, sampled from all documents of ``dataset``.
        sequence_length: tokens per calibration sequence.
        batch_size: sequences per forward pass.
        held_out: share of the calibration sequences that no statistic sees; the output error of each
            layer is measured on them and reported. 0 to 0.5.
        method: "default", "fast" (less time, somewhat lower quality), or "paper-v1" or "paper-v2" as
            published; sets all options from ``widths`` to ``scope`` but ``basis_group_size`` that are not
            given.
        widths: bits that a row may take; 0 drops it. A subset of 0, 1, 2, 3, 4, 6, 8, 16.
        grid: "trellis" codes rows of up to 4 bits by trellis, "uniform" rounds all to uniform grids; "tiled"
            stands in checkpoints that ``import-upstream`` converted.
        basis_bits: width of the shared bases, 4, 8 or 16.
        basis_group_size: basis values that share a scale; divides hidden_size.
        joint_basis: one input basis for gate and up (True) or one for each (False).
        whitening: bases in the metric of the inputs and outputs (True) or from plain SVDs (False).
        cost: "output" estimates the layer's output error from each row's own error at each width, "model"
            from the row's energy and the error of Gaussian rows, "spectral" is row energy times input
            energy, relative to the projection's.
        token_weighting: "residual" weighs a token by 1 / mean square of its residual stream,
            "none" weighs all alike.
        neuron_weighting: weigh a neuron's gate and up by what they do to the output (True), or all
            neurons of an expert alike.
        covariance_prior: weight of the layer's covariance in an expert's own, in tokens per
            dimension: 0 uses the expert's alone, 1e6 the layer's. More for short calibration text.
        feedback: pass rounding errors on to values not yet rounded (GPTQ).
        widening: choose gate and up scales such that rounding does not shrink rows on average.
        refit: recompute each down factor for the rounded gate and up before rounding it.
        compensation: refit it such that it also makes up for what earlier layers lost (no effect
            unless ``refit`` and ``sequential``).
        sequential: calibrate a layer on the outputs of the quantized layers before it.
        scope: "global" spends one budget over all layers, "layer" the same budget on each.
        damping: share of the mean diagonal added to second moments before they are inverted.
        super_experts: experts that get more bits than the allocation would give them, inside the budget:
            "auto" gives those whose output is found to be extreme (``super_experts``) rows of at least 8
            bits, or with ``method="fast"`` their original weights, if that takes at most a quarter of the
            budget; "keep" has them keep them whatever it takes, {"path.of.experts": [ids]}
            has these keep them; {} treats all experts alike.
        all_experts: statistics of every expert see all calibration tokens, those that are not routed to it
            with little weight. The model itself routes as ever. Slower by experts / experts per token.
        seed: of the few random choices (pieces of calibration text, stand-in tokens for thin experts).
        work_dir: directory in which finished layers are saved while a model is quantized; if the process
            ends, the same call continues after the last of them, with the same result. Remove it when the
            packed model is saved: until then it holds the model's packed tensors. Not stored.
        format_version, layers, calibration, other_tensors, other_tensors_in_model: written into
            checkpoints, not for users.

    Raises:
        ConfigError: naming the option, its value and what is allowed.
        CheckpointError: a checkpoint of another format version.
    """

    # Set from the method's table, see __init__.
    widths: tuple[int, ...]
    grid: str
    basis_bits: int
    joint_basis: bool
    whitening: bool
    cost: str
    token_weighting: str
    neuron_weighting: bool
    covariance_prior: float
    feedback: bool
    widening: bool
    refit: bool
    compensation: bool
    sequential: bool
    scope: str

    def __init__(
        self,
        bits: float = 2.0,
        factor_bits: float | None = None,
        dataset: Any = None,
        tokenizer: Any = None,
        calibration_tokens: int = 131_072,
        sequence_length: int = 512,
        batch_size: int = 8,
        held_out: float = 0.0625,
        method: str = "default",
        widths: tuple[int, ...] | list[int] | None = None,
        grid: str | None = None,
        basis_bits: int | None = None,
        basis_group_size: int = 32,
        joint_basis: bool | None = None,
        whitening: bool | None = None,
        cost: str | None = None,
        token_weighting: str | None = None,
        neuron_weighting: bool | None = None,
        covariance_prior: float | None = None,
        feedback: bool | None = None,
        widening: bool | None = None,
        refit: bool | None = None,
        compensation: bool | None = None,
        sequential: bool | None = None,
        scope: str | None = None,
        damping: float = 0.01,
        super_experts: str | dict[str, list[int]] = "auto",
        all_experts: bool = False,
        seed: int = 0,
        work_dir: str | Path | None = None,
        layer_bits: dict[str, float] | None = None,
        projection_bits: dict[str, float] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        layers: dict[str, dict[str, Any]] | None = None,
        calibration: dict[str, Any] | None = None,
        other_tensors: dict[str, str] | None = None,
        other_tensors_in_model: dict[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        check_choice("quant_method", unknown.pop("quant_method", QUANT_METHOD), (QUANT_METHOD,))
        _refuse_other_formats(format_version, bool(layers))
        self.refuse_unknown(unknown)
        self.bits = bits
        self.factor_bits = factor_bits
        self.layer_bits = {} if layer_bits is None else copy.deepcopy(layer_bits)
        self.projection_bits = {} if projection_bits is None else copy.deepcopy(projection_bits)
        self.dataset = dataset
        self.tokenizer = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        self.chat_template_kwargs = copy.deepcopy(chat_template_kwargs)
        self.calibration_tokens = calibration_tokens
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.held_out = held_out
        self.basis_group_size = basis_group_size
        self.damping = damping
        self.super_experts = copy.deepcopy(super_experts)
        self.all_experts = all_experts
        self.seed = seed
        self.work_dir = work_dir
        self.format_version = format_version
        self.layers = layers or {}
        self.calibration = calibration or {}
        self.other_tensors = other_tensors or {}
        self.other_tensors_in_model = other_tensors_in_model or {}
        check_choice("method", method, tuple(METHODS))
        self.method = self.made_with = method
        given = {
            "widths": tuple(widths) if isinstance(widths, (list, tuple)) else widths,
            "grid": grid,
            "basis_bits": basis_bits,
            "joint_basis": joint_basis,
            "whitening": whitening,
            "cost": cost,
            "token_weighting": token_weighting,
            "neuron_weighting": neuron_weighting,
            "covariance_prior": covariance_prior,
            "feedback": feedback,
            "widening": widening,
            "refit": refit,
            "compensation": compensation,
            "sequential": sequential,
            "scope": scope,
        }
        for option, value in given.items():
            setattr(self, option, METHODS[method][option] if value is None else value)
        self.validate()

    def validate(self) -> None:
        """Check every option, whatever it was set by.

        Raises:
            ConfigError: naming the option, its value and what is allowed.
        """
        self.check_attributes()
        check_number("bits", self.bits, 0.1, 16)
        if self.factor_bits is not None:
            check_number("factor_bits", self.factor_bits, 0.1, 16)
        if not is_budget_table(self.layer_bits):
            fail("layer_bits", self.layer_bits, '{"path.of.experts": bits from 0.1 to 16}')
        if not is_budget_table(self.projection_bits) or set(self.projection_bits) - set(FACTORS):
            allowed = '{"gate", "up" or "down": bits from 0.1 to 16}'
            fail("projection_bits", self.projection_bits, allowed)
        check_template_kwargs(self.chat_template_kwargs)
        check_number("calibration_tokens", self.calibration_tokens, 1, 10**12, whole=True)
        check_number("sequence_length", self.sequence_length, 8, 10**7, whole=True)
        check_number("batch_size", self.batch_size, 1, 10**6, whole=True)
        widths_ok = isinstance(self.widths, tuple) and len(self.widths) > 0
        if not widths_ok or any(w not in ALL_WIDTHS or type(w) is not int for w in self.widths):
            fail("widths", self.widths, f"distinct members of {ALL_WIDTHS}")
        if max(self.widths) == 0:
            fail("widths", self.widths, f"members of {ALL_WIDTHS}, not 0 alone")
        if tuple(sorted(set(self.widths))) != self.widths:
            fail("widths", self.widths, f"rising, distinct members of {ALL_WIDTHS}")
        check_choice("basis_bits", self.basis_bits, (4, 8, 16))
        check_choice("basis_group_size", self.basis_group_size, (16, 32, 64, 128, 256))
        for flag in _FLAGS:
            check_choice(flag, getattr(self, flag), (True, False))
        check_number("held_out", self.held_out, 0, 0.5)
        check_choice("cost", self.cost, ("output", "model", "spectral"))
        check_choice("token_weighting", self.token_weighting, ("residual", "none"))
        if self.grid == row_codec.TILED and self.layers:
            _check_tiled(self.basis_bits, self.basis_group_size)
        else:
            check_choice("grid", self.grid, row_codec.GRIDS)
        check_choice("scope", self.scope, ("global", "layer"))
        check_number("covariance_prior", self.covariance_prior, 0, 1e6)
        check_number("damping", self.damping, 1e-6, 1.0)
        check_choice("all_experts", self.all_experts, (True, False))
        if self.super_experts not in ("auto", "keep") and not is_expert_table(self.super_experts):
            fail(
                "super_experts", self.super_experts, '"auto", "keep", {} or {"path.of.experts": [expert ids]}'
            )
        check_number("seed", self.seed, 0, 2**63 - 1, whole=True)
        if self.tokenizer is not None and not (isinstance(self.tokenizer, str) or callable(self.tokenizer)):
            fail("tokenizer", self.tokenizer, "a name, the path of a directory, a tokenizer, or None")
        if self.work_dir is not None and (
            not isinstance(self.work_dir, (str, Path)) or not str(self.work_dir)
        ):
            fail("work_dir", self.work_dir, "the path of a directory, or None")
        check_number("format_version", self.format_version, FORMAT_VERSION, FORMAT_VERSION, whole=True)
        for part in ("layers", "calibration", "other_tensors", "other_tensors_in_model"):
            if not isinstance(getattr(self, part), dict):
                fail(part, type(getattr(self, part)).__name__, "objects written by this package")

    @property
    def rounds_as_planned(self) -> bool:
        """Whether nothing that is found out after planning changes how rows are rounded: they are taken for
        Gaussian, so that energies tell scales, and neither follow each other nor what earlier layers put
        out."""
        return self.cost == "model" and not (self.feedback or self.refit or self.sequential)

    @property
    def input_bases(self) -> int:
        """Number of input bases per layer."""
        return 1 if self.joint_basis else 2

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in transformers; options in ``kwargs`` replace those of the dict and are checked like them."""
        known = {key: kwargs.pop(key) for key in list(kwargs) if key in ("quant_method", *cls.option_names())}
        config = cls(**{**config_dict, **known})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready options and manifest, without the calibration text."""
        values = {k: v for k, v in self.__dict__.items() if k not in _RUNTIME_ONLY}
        for option in ("layer_bits", "projection_bits", "other_tensors_in_model"):
            if not values[option]:  # releases that do not know it can read what was made without it
                del values[option]
        values["widths"] = list(self.widths)
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> BitsMoEConfig:
        """transformers copies configs deeply; text stays where it is: iterators have no copies."""
        copied = copy.copy(self)
        for name, value in self.__dict__.items():
            setattr(copied, name, value if name in _RUNTIME_ONLY else copy.deepcopy(value, memo))
        return copied

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from self.to_dict().items()
