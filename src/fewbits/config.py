"""QuantConfig: one method for the model and overrides by layer, in Python, TOML or JSON.

A key of `per_layer` is an exact module name, a glob or `re:` and a regular expression (`patterns.py`). Exact beats
pattern; a later pattern beats an earlier one. None (in a file "skip") leaves a layer alone. Heads and embeddings are
left alone unless a key spells out the last part of their name: `*` does not reach `lm_head`, `*lm_head` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbits.errors import ConfigError, OutputError, QuantizationError
from fewbits.methods import QuantMethod
from fewbits.patterns import Overrides, compiled, is_left_alone, is_pattern
from fewbits.recipes import method_from_spec, read_json, read_toml, refuse_unknown, spec_of, write_toml

__all__ = ["QuantConfig", "method_from_spec"]


@dataclass(eq=False)
class QuantConfig:
    """Methods by layer.

    method: for every linear layer that no override names; None leaves them alone.
    per_layer: overrides; None leaves a layer alone. Copied; the order of patterns matters.
    """

    method: QuantMethod | None
    per_layer: dict[str, QuantMethod | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.per_layer, Mapping):
            raise ConfigError(f"per_layer must map layer names to methods, got {self.per_layer!r}")
        self.per_layer = dict(self.per_layer)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantConfig):
            return NotImplemented
        patterns = [[key for key in config.per_layer if is_pattern(key)] for config in (self, other)]
        return self.method == other.method and self.per_layer == other.per_layer and patterns[0] == patterns[1]

    def set_layer_method(self, name: str, method: QuantMethod | None) -> None:
        """Override the method of the layers that `name` (exact, glob or `re:`) means; it counts as the latest."""
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
        return None if is_left_alone(name) else self.method

    def override_for(self, name: str, *, left_alone: bool | None = None) -> tuple[bool, QuantMethod | None]:
        """Whether an override applies to the layer `name`, and its method; `overrides()` is quicker for many layers."""
        return self.overrides().find(name, left_alone=left_alone)

    def overrides(self) -> Overrides[QuantMethod | None]:
        """The overrides as they are now, ready to look up many layers."""
        return Overrides(self.per_layer)

    def unmatched_patterns(self, names: Iterable[str]) -> list[str]:
        """The keys of `per_layer` that match none of the layers `names`."""
        return self.overrides().unmatched(names)

    def validate(self) -> None:
        """Raise QuantizationError if the method or an override is impossible, naming the layer."""
        if self.method is not None:
            if not isinstance(self.method, QuantMethod):
                raise ConfigError(f"method must be a QuantMethod or None, got {self.method!r}", "for example GPTQ()")
            self.method.validate()
        for name, method in self.per_layer.items():
            _check_key(name)
            if method is None:
                continue
            if not isinstance(method, QuantMethod):
                raise ConfigError(f"layer '{name}': expected a QuantMethod or None, got {method!r}")
            try:
                method.validate()
            except QuantizationError as error:
                raise QuantizationError(f"layer '{name}': {error.message}", error.hint) from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, where: str = "config") -> QuantConfig:
        """Read plain data as TOML or JSON give it.

        Raises:
            ConfigError: an unknown key, method or option (with the nearest known one), a wrong type or an impossible
                value.
        """
        if not isinstance(content, Mapping):
            raise ConfigError(f"{where}: expected a table with a method, got {content!r:.80}")
        refuse_unknown(where, content, ("method", "per_layer"))
        if "method" not in content:
            raise ConfigError(f"{where}: no method given", 'add for example: method = "gptq"')
        overrides = content.get("per_layer", {})
        if not isinstance(overrides, Mapping):
            raise ConfigError(f"{where}: per_layer must be a table of layers, got {overrides!r:.80}")
        config = cls(
            method_from_spec(content["method"], where=f"{where}: method"),
            {key: method_from_spec(spec, where=f"{where}: per_layer.{key!r}") for key, spec in overrides.items()},
        )
        try:
            config.validate()
        except QuantizationError as error:
            raise ConfigError(f"{where}: {error.message}", error.hint) from error
        return config

    @classmethod
    def from_toml(cls, text: str, *, where: str = "TOML") -> QuantConfig:
        """Read the TOML form."""
        return cls.from_dict(read_toml(text, where), where=where)

    @classmethod
    def from_json(cls, text: str, *, where: str = "JSON") -> QuantConfig:
        """Read the JSON form."""
        return cls.from_dict(read_json(text, where), where=where)

    @classmethod
    def from_file(cls, path: str | Path) -> QuantConfig:
        """Read a `.toml` or `.json` file (UTF-8)."""
        file = Path(path)
        as_toml = _is_toml(file)
        try:
            # A byte order mark, which some editors write, is no part of the text.
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        return cls.from_toml(text, where=str(file)) if as_toml else cls.from_json(text, where=str(file))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back to an equal config. Raises QuantizationError if it is not valid."""
        self.validate()
        return {
            "method": spec_of(self.method),
            "per_layer": {name: spec_of(method) for name, method in self.per_layer.items()},
        }

    def to_json(self) -> str:
        """The JSON form."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def to_toml(self) -> str:
        """The TOML form."""
        return write_toml(self.to_dict())

    def to_file(self, path: str | Path) -> None:
        """Write a `.toml` or `.json` file (UTF-8)."""
        file = Path(path)
        text = self.to_toml() if _is_toml(file) else self.to_json()
        try:
            file.write_text(text, encoding="utf-8", newline="\n")
        except (OSError, ValueError) as error:
            found = getattr(error, "strerror", None) or error
            raise OutputError(f"{file}: cannot be written: {found}") from error


def _is_toml(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise ConfigError(f"{file}: expected the name of a .toml or .json file")
    return suffix == ".toml"


def _check_key(key: object) -> None:
    if not isinstance(key, str) or not key:
        raise ConfigError(f"per_layer keys must be layer names or patterns, got {key!r}")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"per_layer key {key!r} is no text that a file can hold: {error.reason}") from error
    if is_pattern(key):
        compiled(key)
