"""QuantConfig: one method for the model and overrides by layer, in Python, TOML or JSON.

A key of `per_layer` is an exact module name, a glob (`*` also crosses dots, `[0-3]` is a class) or `re:` and a regular
expression that must match the whole name. Exact beats pattern; a later pattern beats an earlier one. None (in a file
"skip") leaves a layer alone.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fewbits.errors import ConfigError, QuantizationError
from fewbits.methods import METHODS, QuantMethod, method_fields, method_options

SKIP = "skip"
REGEX = "re:"
# Last parts of module names that only an override which spells them out may quantize.
UNQUANTIZED_BY_DEFAULT = re.compile(r"(^|\.)(lm_head|embed_out|embed_tokens|embed_positions|wte|wpe|word_embeddings)$")


@dataclass
class QuantConfig:
    """Methods by layer.

    method: for every linear layer that no override names; None leaves them alone.
    per_layer: overrides in order; None leaves a layer alone.
    """

    method: QuantMethod | None
    per_layer: dict[str, QuantMethod | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.per_layer = dict(self.per_layer)

    def set_layer_method(self, name: str, method: QuantMethod | None) -> None:
        """Override the method of the layers that `name` (exact, glob or `re:`) matches."""
        self.per_layer.pop(name, None)
        self.per_layer[name] = method

    def method_for_layer(self, name: str) -> QuantMethod | None:
        """The method for the layer `name`; None if it is left alone.

        >>> from fewbits.methods import GPTQ, Int8Symmetric
        >>> config = QuantConfig(GPTQ(), {"*.down_proj": Int8Symmetric()})
        >>> str(config.method_for_layer("model.layers.0.mlp.down_proj"))
        'INT8-Symmetric'
        >>> config.method_for_layer("lm_head") is None
        True
        """
        named, method = self.override_for(name)
        if named:
            return method
        return None if UNQUANTIZED_BY_DEFAULT.search(name) else self.method

    def override_for(self, name: str) -> tuple[bool, QuantMethod | None]:
        """Whether an override applies to `name`, and its method.

        A pattern reaches the head and the embeddings only if it spells out the last part of their name.
        """
        if name in self.per_layer:
            return True, self.per_layer[name]
        for key in reversed(self.per_layer):
            if matches(key, name) and (not UNQUANTIZED_BY_DEFAULT.search(name) or name.rpartition(".")[2] in key):
                return True, self.per_layer[key]
        return False, None

    def validate(self) -> None:
        """Raise QuantizationError if the method or an override is impossible, naming the layer."""
        if self.method is not None:
            if not isinstance(self.method, QuantMethod):
                raise ConfigError(f"method must be a QuantMethod, got {self.method!r}", "for example fewbits.GPTQ()")
            self.method.validate()
        for name, method in self.per_layer.items():
            if not isinstance(name, str) or not name:
                raise ConfigError(f"per_layer keys must be layer names or patterns, got {name!r}")
            compiled(name)
            if method is None:
                continue
            if not isinstance(method, QuantMethod):
                raise ConfigError(f"layer '{name}': expected a QuantMethod or None, got {method!r}")
            try:
                method.validate()
            except QuantizationError as error:
                raise QuantizationError(f"layer '{name}': {error.message}", error.hint) from error

    def unmatched_patterns(self, names: Iterable[str]) -> list[str]:
        """The keys of `per_layer` that match none of the layers `names`."""
        known = list(names)
        return [key for key in self.per_layer if not any(key == name or matches(key, name) for name in known)]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, where: str = "config") -> QuantConfig:
        """Read plain data as TOML or JSON give it.

        Raises:
            ConfigError: an unknown key, method or option (with the nearest known one), or a wrong type.
        """
        _refuse_unknown(where, content, ("method", "per_layer"))
        if "method" not in content:
            raise ConfigError(f"{where}: no method given.", 'add for example: method = "gptq"')
        overrides = content.get("per_layer", {})
        if not isinstance(overrides, Mapping):
            raise ConfigError(f"{where}: per_layer must be a table of layers, got {overrides!r}.")
        per_layer = {
            str(key): method_from_spec(value, where=f"{where}: per_layer.{key!r}") for key, value in overrides.items()
        }
        config = cls(method_from_spec(content["method"], where=f"{where}: method"), per_layer)
        try:
            config.validate()
        except QuantizationError as error:
            raise ConfigError(f"{where}: {error.message}", error.hint) from error
        return config

    @classmethod
    def from_toml(cls, text: str, *, where: str = "TOML") -> QuantConfig:
        """Read the TOML form."""
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{where}: not valid TOML: {error}.") from error
        return cls.from_dict(content, where=where)

    @classmethod
    def from_json(cls, text: str, *, where: str = "JSON") -> QuantConfig:
        """Read the JSON form."""
        try:
            content = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{where}: not valid JSON: {error}.") from error
        if not isinstance(content, Mapping):
            raise ConfigError(f"{where}: expected an object, got {type(content).__name__}.")
        return cls.from_dict(content, where=where)

    @classmethod
    def from_file(cls, path: str | Path) -> QuantConfig:
        """Read a `.toml` or `.json` file."""
        file = Path(path)
        reader = {".toml": cls.from_toml, ".json": cls.from_json}.get(file.suffix.lower())
        if reader is None:
            raise ConfigError(f"{file}: expected a .toml or .json file.")
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
        return reader(text, where=str(file))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back to an equal config."""
        return {
            "method": _spec(self.method),
            "per_layer": {name: _spec(method) for name, method in self.per_layer.items()},
        }

    def to_json(self) -> str:
        """The JSON form."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_toml(self) -> str:
        """The TOML form."""
        content = self.to_dict()
        lines = [f"method = {_toml(content['method'])}"]
        if content["per_layer"]:
            lines += ["", "[per_layer]"]
            lines += [f"{_toml_string(name)} = {_toml(spec)}" for name, spec in content["per_layer"].items()]
        return "\n".join(lines) + "\n"

    def to_file(self, path: str | Path) -> None:
        """Write a `.toml` or `.json` file."""
        file = Path(path)
        if file.suffix.lower() not in (".toml", ".json"):
            raise ConfigError(f"{file}: expected a .toml or .json file.")
        file.write_text(self.to_toml() if file.suffix.lower() == ".toml" else self.to_json(), encoding="utf-8")


@lru_cache(maxsize=1024)
def compiled(key: str) -> re.Pattern[str]:
    """The regular expression of a glob or `re:` key; ConfigError if it is none."""
    if not key.startswith(REGEX):
        return re.compile(fnmatch.translate(key))
    try:
        return re.compile(key.removeprefix(REGEX))
    except re.error as error:
        raise ConfigError(f"layer '{key}': not a regular expression: {error}.") from error


def matches(key: str, name: str) -> bool:
    """Whether a key of `per_layer` matches the layer `name`."""
    return compiled(key).fullmatch(name) is not None


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or all of them."""
    choices = list(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(choices)}"


def method_from_spec(spec: object, *, where: str = "method") -> QuantMethod | None:
    """A method from a short name, a table with `name` and options, or "skip".

    Raises:
        ConfigError: an unknown name or option, or a wrong type.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"{where}: expected a method's name or a table, got {spec!r}.", f"known are {', '.join(METHODS)}, skip"
        )
    name = spec.get("name")
    if not isinstance(name, str):
        raise ConfigError(
            f"{where}: expected a name, got {name!r}.", f'add name = "…", one of {", ".join(METHODS)}, skip'
        )
    if name == SKIP and len(spec) == 1:
        return None
    method_class = METHODS.get(name.lower())
    if method_class is None:
        raise ConfigError(f"{where}: unknown method {name!r}.", nearest(name.lower(), [*METHODS, SKIP]))
    options = {key: _option(value) for key, value in spec.items() if key != "name"}
    _refuse_unknown(f"{where}: {name}", options, method_options(method_class))
    return method_class(**options)


def _option(value: object) -> object:
    return None if value == "none" else value


def _spec(method: QuantMethod | None) -> Any:
    if method is None:
        return SKIP
    values = method_fields(method)
    return {key: "none" if value is None else value for key, value in values.items()}


def _refuse_unknown(where: str, content: Mapping[str, Any], known: Iterable[str]) -> None:
    choices = list(known)
    for key in content:
        if key not in choices:
            found = "it takes no options" if not choices else nearest(str(key), choices)
            raise ConfigError(f"{where}: unknown key {key!r}.", found)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return _toml_string(value) if isinstance(value, str) else repr(value)


def _toml_string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(text).replace("\x7f", "\\u007f")
