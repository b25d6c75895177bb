"""Patterns: which layers a key of a configuration means, and what a mistyped one may have meant.

A key is an exact module name, a glob (`*` also crosses dots, `?` is one character, `[0-3]` a class), or `re:` and a
regular expression that must match the whole name. Exact beats pattern; a later pattern beats an earlier one.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Generic, TypeVar

from fewbits.errors import ConfigError

REGEX = "re:"
GLOB_CHARACTERS = frozenset("*?[")
# Last parts of module names that only a key which spells them out may reach: heads and embeddings.
LEFT_ALONE = re.compile(r"^(lm_head|embed_out|wte|wpe)$|(^|_)(embed|embd|embeds|embedding|embeddings)(_|$)")
# A projection of embeddings is a linear like any other.
NOT_LEFT_ALONE = re.compile(r"proj|mapping|linear|dense")
# Fewer differ than agree; chosen so that a slip of a letter is found and an unrelated word is not.
LIKE_ENOUGH = 0.6

Value = TypeVar("Value")


class Overrides(Generic[Value]):
    """A snapshot of keys and what they stand for, made once to look up many layers."""

    def __init__(self, by_key: Mapping[str, Value]) -> None:
        self._by_key = dict(by_key)
        self._patterns = [(key, compiled(key)) for key in reversed(self._by_key) if is_pattern(key)]

    def key_for(self, name: str, *, left_alone: bool | None = None) -> str | None:
        """The key that decides about the layer `name`; None if none does.

        left_alone: whether the layer is one that only a key with the last part of its name in it reaches; None judges
            by the name.
        """
        if name in self._by_key:
            return name
        last_part = name.rpartition(".")[2]
        if left_alone is None:
            left_alone = is_left_alone(name)
        for key, pattern in self._patterns:
            if (not left_alone or last_part in key) and pattern.fullmatch(name):
                return key
        return None

    def find(self, name: str, *, left_alone: bool | None = None) -> tuple[bool, Value | None]:
        """Whether a key decides about the layer `name`, and what it says."""
        key = self.key_for(name, left_alone=left_alone)
        return (False, None) if key is None else (True, self._by_key[key])

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The keys that reach none of `names`; one that says None may also match what is left alone anyway."""
        known = set(names)
        missing = [key for key in self._by_key if key not in known]
        return [
            key
            for key in missing
            if not is_pattern(key) or not any(self._reaches(key, name) for name in known if matches(key, name))
        ]

    def _reaches(self, key: str, name: str) -> bool:
        return self._by_key[key] is None or not is_left_alone(name) or name.rpartition(".")[2] in key


def is_left_alone(name: str) -> bool:
    """Whether `name` is that of an output head or an embedding, which stay unquantized unless named."""
    last_part = name.rpartition(".")[2]
    return LEFT_ALONE.search(last_part) is not None and NOT_LEFT_ALONE.search(last_part) is None


def is_pattern(key: str) -> bool:
    """Whether a key is a glob or a regular expression rather than a layer's name."""
    return key.startswith(REGEX) or not GLOB_CHARACTERS.isdisjoint(key)


@lru_cache(maxsize=1024)
def compiled(key: str) -> re.Pattern[str]:
    """The regular expression that a pattern stands for.

    Raises:
        ConfigError: it is none; the message says at which position.
    """
    if not key.startswith(REGEX):
        return re.compile(fnmatch.translate(key))
    try:
        return re.compile(key.removeprefix(REGEX))
    except re.error as error:
        found = f"{error.msg} at position {error.pos}" if error.pos is not None else error.msg
    except (OverflowError, RecursionError) as error:
        found = str(error)
    raise ConfigError(f"layer '{key}': not a regular expression: {found} (counted after 're:')", "escape a dot as \\.")


def matches(key: str, name: str) -> bool:
    """Whether a key means the layer `name`.

    >>> matches("model.layers.[0-3].*", "model.layers.2.mlp.up_proj")
    True
    >>> matches("re:.*up", "model.layers.2.mlp.up_proj")
    False
    """
    return key == name or (is_pattern(key) and compiled(key).fullmatch(name) is not None)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or all of them."""
    choices = list(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(choices)}"


def nearest_layer(key: str, names: Iterable[str]) -> str:
    """A hint for a key that matches no layer: what it may have meant, or how the layers are called.

    >>> nearest_layer("*.mlp.down_prj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"])
    "did you mean '*.mlp.down_proj'?"
    """
    known = list(names)
    for name in known:
        if is_left_alone(name) and matches(key, name):
            return f"{name} is left alone unless a key spells out {name.rpartition('.')[2]!r}"
    # Blocks differ by their number only: comparing one name of each kind is quick and says as much.
    kinds = {re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", name): name for name in known}
    last_parts = list(dict.fromkeys(kind.rpartition(".")[2] for kind in kinds))
    if not key.startswith(REGEX):
        stem, dot, last = key.rpartition(".")
        for leaf in difflib.get_close_matches(last, last_parts, n=3, cutoff=LIKE_ENOUGH):
            meant = f"{stem}{dot}{leaf}"
            if any(matches(meant, name) for name in known):
                return f"did you mean {meant!r}?"
        close = difflib.get_close_matches(re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", key), kinds, n=1, cutoff=LIKE_ENOUGH)
        if close:
            return f"did you mean {close[0]!r}? One of these layers is {kinds[close[0]]!r}"
    if not last_parts:
        return "the model has no linear layers"
    shown = ", ".join(last_parts[:12]) + (", …" if len(last_parts) > 12 else "")
    return f"layers are called like {known[0]!r}, and end in {shown}"
