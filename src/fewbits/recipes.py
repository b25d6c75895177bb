"""Recipes: methods as plain data, and the text of TOML and JSON files. `config.QuantConfig` reads and writes them.

A method is a short name (`"gptq"`), a table with `name` and options, or `"skip"`. Where Python says None for an option,
files say `"none"`, because TOML has no such value.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from fewbits.errors import ConfigError
from fewbits.methods import METHODS, QuantMethod, method_fields, method_options
from fewbits.patterns import nearest

SKIP = "skip"
NONE = "none"


def method_from_spec(spec: object, *, where: str = "method") -> QuantMethod | None:
    """A method from a short name, a table with `name` and options, or "skip" (None). Case does not matter in names.

    Raises:
        ConfigError: an unknown name or option, or a wrong type; the method's own limits are left to `validate`.

    >>> method_from_spec({"name": "gptq", "bits": 3})
    GPTQ(bits=3, group_size=128, symmetric=True)
    """
    if spec is None:
        return None
    if isinstance(spec, str):
        spec = {"name": spec}
    known = [*METHODS, SKIP]
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"{where}: expected a method's name or a table, got {spec!r}", f"known are {', '.join(known)}"
        )
    given = spec.get("name")
    if not isinstance(given, str):
        found = f"the keys {', '.join(map(str, spec))}" if given is None else f"{given!r} for a name"
        raise ConfigError(
            f"{where}: expected a table with a method's name, got {found}",
            "a layer's name that has dots in it stands in quotes; a method's is one of " + ", ".join(known),
        )
    name = given.lower()
    if name == SKIP:
        refuse_unknown(f"{where}: {SKIP}", spec, ("name",), "it takes no options")
        return None
    if name not in METHODS:
        raise ConfigError(f"{where}: unknown method {given!r}", nearest(name, known))
    options = {key: None if value == NONE else value for key, value in spec.items() if key != "name"}
    refuse_unknown(f"{where}: {name}", options, method_options(METHODS[name]))
    return METHODS[name](**options)


def spec_of(method: QuantMethod | None) -> str | dict[str, Any]:
    """The plain data that `method_from_spec` reads back to an equal method."""
    if method is None:
        return SKIP
    if METHODS.get(method.short_name) is not type(method):
        raise ConfigError(f"{method!r} cannot be written to a file", f"files know {', '.join(METHODS)}")
    return {key: NONE if value is None else value for key, value in method_fields(method).items()}


def refuse_unknown(where: str, content: Mapping[str, Any], known: Iterable[str], hint: str | None = None) -> None:
    """Raise ConfigError for the first key that is not known, with the nearest one that is."""
    choices = list(known)
    for key in content:
        if key not in choices:
            raise ConfigError(f"{where}: unknown key {key!r}", hint or nearest(str(key), choices))


def read_toml(text: str, where: str) -> Mapping[str, Any]:
    """Parse TOML. Raises ConfigError with the line."""
    try:
        return tomllib.loads(text)
    # ValueError is its base, and what Python says of a number with thousands of digits.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from error


def read_json(text: str, where: str) -> Mapping[str, Any]:
    """Parse a JSON object. Raises ConfigError with the line, and for a key that is given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{where}: the key {twice!r} is given twice", "keep one of them")
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected an object, got {content!r:.80}", '{"method": "gptq"} is the shortest')
    return content


def write_toml(content: Mapping[str, Any]) -> str:
    """The TOML of a config as plain data: the method, then one line for each override."""
    lines = [f"method = {_toml(content['method'])}"]
    if content["per_layer"]:
        lines += ["", "[per_layer]"]
        lines += [f"{_toml_string(name)} = {_toml(spec)}" for name, spec in content["per_layer"].items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return _toml_string(value) if isinstance(value, str) else repr(value)


def _toml_string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped, and pairs of surrogates, which it refuses.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
