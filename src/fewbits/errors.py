"""Every error the package raises on purpose: one tree, one way to say where, what, and the way out."""

from __future__ import annotations


class FewbitsError(Exception):
    """Base of all errors of the package.

    Args:
        message: Where it happened, what was found and what was expected.
        hint: What the user can do about it; shown on a line of its own.
    """

    exit_status = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class QuantizationError(FewbitsError):
    """A value, method or option that cannot be quantized with."""


class ConfigError(QuantizationError):
    """A configuration (file, dictionary or override) that says something impossible."""


class PlanError(FewbitsError):
    """A model and a configuration that do not go together; found before any work is done."""


class CheckpointError(FewbitsError):
    """A checkpoint that is missing, damaged or not what its own headers say."""


class CalibrationError(FewbitsError):
    """Calibration data that is missing or unusable, or a model that cannot be calibrated."""


class MissingDependencyError(FewbitsError):
    """An optional package that this call needs is not installed."""


class KernelError(FewbitsError):
    """No kernel can run what was asked for on this device."""


class OutputError(FewbitsError):
    """The output could not be written: disk full, target not writable, interrupted."""

    exit_status = 1


class Interrupted(OutputError):
    """The user stopped a run; what was finished is kept."""

    exit_status = 130


class VerificationError(FewbitsError):
    """A checkpoint does not hold what was recorded when it was written."""

    exit_status = 1
