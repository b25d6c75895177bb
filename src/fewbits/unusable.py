"""What transformers raises for a config, a tokenizer or a model that it can't use."""

from __future__ import annotations


def unusable() -> tuple[type[Exception], ...]:
    """The exceptions, for an `except` clause; configs that contradict themselves have one of their own."""
    known: tuple[type[Exception], ...] = (ValueError, KeyError, OSError, ImportError)
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        return known
    return *known, StrictDataclassError


def reason_of(error: Exception) -> str:
    """The first line of what it says, or the next where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
