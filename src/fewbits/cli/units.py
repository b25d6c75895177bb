"""Numbers as people read them."""

from __future__ import annotations

import re

from fewbits.errors import ConfigError


def bytes_text(count: float) -> str:
    """1536 -> "1.5 KB"; decimal units, as disks and model hubs count."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 1000 else f"{count:.0f} TB"


def bytes_number(option: str, text: str) -> int:
    """ "2GiB" -> 2147483648, "500MB" -> 500000000, "4096" -> 4096.

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{option}: expected a size such as 2GiB, 500MB or a number of bytes, got {text!r}.")
    base = 1024 if found[3] else 1000
    power = " kmgt".index(found[2].lower() or " ")
    return round(float(found[1]) * float(base**power))


def seconds_text(seconds: float) -> str:
    """75.3 -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
