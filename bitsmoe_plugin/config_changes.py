"""What happens to options after they were given: changed, copied, checked again before they are used."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bitsmoe_plugin.base.option_checks import check_choice
from bitsmoe_plugin.errors import ConfigError
from bitsmoe_plugin.presets import METHODS

if TYPE_CHECKING:
    from typing_extensions import Self

_SHARED_BY_COPIES = ("dataset", "tokenizer")
_NO_OPTIONS = ("quant_method", "made_with")


class ChangeableConfig(QuantizationConfigMixin):
    """Options are the arguments of ``__init__``, and attributes of the same names.

    Attributes:
        made_with: the method that options come from which were not given.
    """

    method: str
    made_with: str
    widths: Any

    def validate(self) -> None:
        """Check every option; raises ConfigError."""
        raise NotImplementedError

    @classmethod
    def option_names(cls) -> list[str]:
        """In the order of the signature."""
        return [name for name in cls.__init__.__annotations__ if name not in ("return", "unknown")]

    @classmethod
    def refuse_unknown(cls, names: Collection[str]) -> None:
        """Raises ConfigError if there are any."""
        if names:
            listed = ", ".join(sorted(names))
            raise ConfigError(
                f"BitsMoEConfig: unknown option {listed}; known: {', '.join(cls.option_names())}"
            )

    def check_attributes(self) -> None:
        """What may be wrong with attributes that were set one by one, besides their values.

        Raises:
            ConfigError: there is no such option, or a method whose options are another's.
        """
        self.refuse_unknown(vars(self).keys() - {*self.option_names(), *_NO_OPTIONS})
        check_choice("method", self.method, tuple(METHODS))
        if self.method != self.made_with:
            raise ConfigError(
                f"BitsMoEConfig: method={self.method!r} was set where options are those of "
                f"{self.made_with!r}; use config.update(method={self.method!r}), which sets them too"
            )
        if isinstance(self.widths, list):  # as JSON has them
            self.widths = tuple(self.widths)

    def update(self, **options: Any) -> dict[str, Any]:
        """Change options. Another ``method`` brings its own, in place of those that the present one has set.

        Returns:
            {}: in transformers what was not used; here that is an error.

        Raises:
            ConfigError: an unknown option or a value that is not allowed; nothing is changed then.
        """
        present = {name: getattr(self, name) for name in self.option_names()}
        if "method" in options:
            for name, value in METHODS[self.made_with].items():
                if present[name] == value:
                    del present[name]
        vars(self).update(vars(type(self)(**{**present, **options})))
        return {}

    def __copy__(self) -> Self:
        """Shares calibration text and tokenizer with the original, and nothing else that can be changed."""
        other = type(self).__new__(type(self))
        for name, value in vars(self).items():
            vars(other)[name] = value if name in _SHARED_BY_COPIES else copy.deepcopy(value)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)

    @classmethod
    def checked_copy(cls, value: Any) -> Self:
        """A config that is as good as a new one, of one that may have been changed or of a dict.

        Raises:
            ConfigError: it is neither, or an option is unknown or has a value that is not allowed.
        """
        if isinstance(value, dict):
            made: Self = cls.from_dict(value)
            return made
        if not isinstance(value, cls):
            raise ConfigError(
                f"quantization_config is a {type(value).__name__}; give a BitsMoEConfig or a dict of options"
            )
        config = copy.copy(value)
        config.validate()
        return config
