"""BitsMoEConfig: the options of quantization, checked, and the manifest of a packed checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bitsmoe_plugin.base.option_checks import check_choice
from bitsmoe_plugin.base.option_table import described, signature_of
from bitsmoe_plugin.codec import row_codec, tiled
from bitsmoe_plugin.codec.layout import FORMAT_VERSION
from bitsmoe_plugin.errors import CheckpointError, ConfigError
from bitsmoe_plugin.options import OPTIONS, Options

if TYPE_CHECKING:
    from typing_extensions import Self

QUANT_METHOD = "bitsmoe"
STREAMED = "bitsmoe-streamed"
"""Of no checkpoint: see ``StreamedConfig``."""
_SIGNATURE = signature_of(OPTIONS)
_NO_OPTIONS = ("quant_method", "made_with")


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


class BitsMoEConfig(Options, QuantizationConfigMixin):
    # The docstring's arguments are those of ``options``, see below.
    __doc__ = f"""How to quantize the routed experts of an MoE model, and how a checkpoint was quantized.

    Options are arguments, by name or in this order, and attributes of the same names.

{described(OPTIONS)}

    Attributes:
        made_with: the method that options come from which were not given.

    Raises:
        ConfigError: naming the option, its value and what is allowed.
        CheckpointError: a checkpoint of another format version.
    """

    made_with: str

    def __init__(self, *values: Any, **options: Any) -> None:
        given = _SIGNATURE.bind(self, *values, **options).arguments
        unknown = given.pop("unknown", {})
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        check_choice("quant_method", unknown.pop("quant_method", QUANT_METHOD), (QUANT_METHOD,))
        _refuse_other_formats(given.get("format_version"), bool(given.get("layers")))
        self.refuse_unknown(unknown)
        self.made_with = given.get("method", OPTIONS["method"].default)
        OPTIONS["method"].refuse("method", self.made_with)
        for name, option in OPTIONS.items():
            setattr(self, name, option.taken(given.get(name, option.default), self.made_with))
        self.validate()

    def validate(self) -> None:
        """Check every option, whatever it was set by.

        Raises:
            ConfigError: naming the option, its value and what is allowed.
        """
        self._check_attributes()
        converted = self.grid == row_codec.TILED and bool(self.layers)
        for name, option in OPTIONS.items():
            if not (converted and name == "grid"):
                option.refuse(name, getattr(self, name))
        if converted:  # bases that this grid has
            check_choice("basis_bits", self.basis_bits, (8, 16))
            check_choice("basis_group_size", self.basis_group_size, (tiled.TILE,))

    def _check_attributes(self) -> None:
        """What may be wrong with attributes that were set one by one, besides their values.

        Raises:
            ConfigError: there is no such option, or a method whose options are another's.
        """
        self.refuse_unknown(vars(self).keys() - {*OPTIONS, *_NO_OPTIONS})
        OPTIONS["method"].refuse("method", self.method)
        if self.method != self.made_with:
            raise ConfigError(
                f"BitsMoEConfig: method={self.method!r} was set where options are those of "
                f"{self.made_with!r}; use config.update(method={self.method!r}), which sets them too"
            )
        if isinstance(self.widths, list):  # as JSON has them
            self.widths = tuple(self.widths)

    @classmethod
    def option_names(cls) -> list[str]:
        """In the order of the signature."""
        return list(OPTIONS)

    @classmethod
    def refuse_unknown(cls, names: Collection[str]) -> None:
        """Raises ConfigError if there are any."""
        if names:
            listed = ", ".join(sorted(names))
            raise ConfigError(f"BitsMoEConfig: unknown option {listed}; known: {', '.join(OPTIONS)}")

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
        known = {key: kwargs.pop(key) for key in list(kwargs) if key in ("quant_method", *OPTIONS)}
        config = cls(**{**config_dict, **known})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready options and manifest, without the calibration text."""
        values: dict[str, Any] = {"quant_method": self.quant_method}
        for name, option in OPTIONS.items():
            if option.is_stored(getattr(self, name)):
                values[name] = getattr(self, name)
        values["widths"] = list(self.widths)
        return values

    def update(self, **options: Any) -> dict[str, Any]:
        """Change options. Another ``method`` brings its own, in place of those that the present one has set.

        Returns:
            {}: in transformers what was not used; here that is an error.

        Raises:
            ConfigError: an unknown option or a value that is not allowed; nothing is changed then.
        """
        present = {name: getattr(self, name) for name in OPTIONS}
        if "method" in options:
            for name, option in OPTIONS.items():
                if option.by_method and option.by_method[self.made_with] == present[name]:
                    del present[name]
        vars(self).update(vars(type(self)(**{**present, **options})))
        return {}

    def __copy__(self) -> Self:
        """Shares calibration text and tokenizer with the original, and nothing else that can be changed."""
        other = type(self).__new__(type(self))
        for name, value in vars(self).items():
            shared = name in OPTIONS and OPTIONS[name].shared
            vars(other)[name] = value if shared else copy.deepcopy(value)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """transformers copies configs deeply; text stays where it is: iterators have no copies."""
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

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from self.to_dict().items()


BitsMoEConfig.__init__.__signature__ = _SIGNATURE  # type: ignore[attr-defined]


class StreamedConfig(QuantizationConfigMixin):
    """Asks ``from_pretrained`` for a model whose experts stay in its files; nothing is quantized. See
    ``models.streamed_model``."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = STREAMED  # type: ignore[assignment]
