"""Exceptions for what the user can put right.

Every message says, in this order: what must hold, what was given, what to do. Each class is also a built-in exception,
so that callers need not know this package to handle it.
"""


class MSFPError(ValueError):
    """Base of all errors raised by `diffusers_msfp`.

    Example:
        >>> from diffusers_msfp import MSFPConfig
        >>> try:
        ...     MSFPConfig("w4a5")
        ... except MSFPError as error:
        ...     print(type(error).__name__)
        ConfigError
    """


def first_line(error: BaseException) -> str:
    """What a foreign error says, in one line of at most 300 characters; its class where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


class FormatError(MSFPError):
    """A number format that does not exist or contradicts its own name."""


class NonFiniteError(MSFPError):
    """NaN or infinity where a finite number is needed."""


class ShapeError(MSFPError):
    """Tensors whose shapes do not fit together."""


class ConfigError(MSFPError):
    """A configuration that cannot be honoured."""


class StateError(MSFPError):
    """A model or pipeline in another state than the call needs: not quantized, still observing, adapted already.

    Example:
        >>> from torch import nn
        >>> from diffusers_msfp import StateError, calibration_state
        >>> try:
        ...     calibration_state(nn.Linear(2, 2))
        ... except StateError:
        ...     print("not quantized")
        not quantized
    """


class NothingToDoError(ConfigError):
    """A stage that has nothing to work on in this model; recipes go on without it."""


class CheckpointError(MSFPError):
    """A checkpoint that is damaged, foreign, or newer than this package."""


class UnsupportedError(MSFPError):
    """Something that a quantized model cannot do, with the way out."""


class HubError(MSFPError):
    """The Hub refused something, was not reached, or holds something else than was sent."""


SEE_DOCTOR = "`diffusers-msfp doctor` shows what this machine has and what it lacks."
"""The end of every message on something that cannot run here."""
