"""Errors that a user can act on."""


class BitsMoEError(Exception):
    """Base class of every error raised on purpose by this package."""


class ConfigError(BitsMoEError, ValueError):
    """An option has a value that is not allowed."""


class QuantizationError(BitsMoEError, ValueError):
    """The model, data or budget cannot be quantized as asked."""


class CheckpointError(BitsMoEError, ValueError):
    """A packed checkpoint is incomplete, altered or of another version."""


class VersionError(BitsMoEError, ImportError):
    """An installed package is older than what this one works with."""
