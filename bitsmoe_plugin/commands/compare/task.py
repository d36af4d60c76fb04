"""What every method of a comparison is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitsmoe_plugin.base.option_checks import check_number
from bitsmoe_plugin.commands.evaluate import check_evaluation
from bitsmoe_plugin.config import BitsMoEConfig
from bitsmoe_plugin.models.model_source import ModelSource


@dataclass(frozen=True)
class ComparisonTask:
    """What every method is given; see the options of ``bitsmoe compare``."""

    model: str
    bits: float
    factor_bits: float | None
    dataset: str
    eval: str
    calibration_tokens: int
    sequence_length: int
    batch_size: int
    seed: int
    max_tokens: int | None
    group_size: int
    prompt: str | None
    new_tokens: int
    checkpoint: str | None = None
    dense_bits: Any = 16
    size: str | None = None
    tune: int = 0
    tune_through: str = "auto"
    autoround_steps: int = 200
    """For each decoder layer; 200 is auto-round's default."""
    chat_template_kwargs: dict[str, Any] | None = None
    allow_slow: bool = False
    loading: dict[str, Any] = field(default_factory=dict)
    """Options of ``ModelSource`` for the model and its tokenizer."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval."""

    @property
    def source(self) -> ModelSource:
        """Where the model is loaded from."""
        return ModelSource.of(self.model, **self.loading)

    def config(self) -> BitsMoEConfig:
        """The BitsMoE options of this task."""
        return BitsMoEConfig(
            bits=self.bits,
            factor_bits=self.factor_bits,
            dataset=self.dataset,
            calibration_tokens=self.calibration_tokens,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            seed=self.seed,
            dense_bits=self.dense_bits,
            size=self.size,
            tune=self.tune,
            tune_through=self.tune_through,
            chat_template_kwargs=self.chat_template_kwargs,
            allow_slow=self.allow_slow,
        )

    def check(self) -> None:
        """Raises ConfigError: an option has a value that is not allowed."""
        self.config()
        check_evaluation(self.sequence_length, self.max_tokens, None, self.batch_size)
        for name, least in (("group_size", 1), ("new_tokens", 0), ("autoround_steps", 1)):
            check_number(name, getattr(self, name), least, 10**9, whole=True, owner="compare")

    @property
    def baseline_bits(self) -> int:
        """Width of round-to-nearest and GPTQ: they have whole widths only, plus their overhead."""
        return max(2, int(self.bits))
