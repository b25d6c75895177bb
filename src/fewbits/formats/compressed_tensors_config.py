"""The `quantization_config` of a compressed-tensors checkpoint: written from schemes, and read back to schemes.

Nested objects refuse unknown keys, and older readers know fewer: only what is needed is written.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fewbits.errors import CheckpointError
from fewbits.formats.targets import matches, targets_by_label
from fewbits.schemes import Activations, Kind, Scheme

# A tied head has no tensor of its own, yet readers find it among the model's linears.
TIED_HEAD = "lm_head"
LINEAR = "Linear"
PACKED = "pack-quantized"
MIXED = "mixed-precision"
_HINT = "use a checkpoint made by fewbits, or by another tool with int weights, or fp8 per channel"


def format_of(scheme: Scheme) -> str:
    """The name of the storage format of one scheme.

    >>> format_of(Scheme("int", 4, symmetric=False, group_size=128))
    'pack-quantized'
    """
    if scheme.kind == "float":
        return "float-quantized" if scheme.activations else "naive-quantized"
    return "int-quantized" if scheme.activations else PACKED


def quantization_config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The config for a model.

    Args:
        schemes: every linear module of the model by name; None where it is not quantized.
    """
    distinct = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    if not distinct:
        raise ValueError("no layer is quantized")
    ignored = [name for name, scheme in schemes.items() if scheme is None]
    if TIED_HEAD not in schemes:
        ignored.append(TIED_HEAD)
    mixed = len(distinct) > 1
    targets = targets_by_label({**schemes, **dict.fromkeys(ignored)}) if mixed else {distinct[0]: [LINEAR]}
    groups = {f"group_{number}": _group(scheme, targets[scheme], mixed) for number, scheme in enumerate(distinct)}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": MIXED if mixed else format_of(distinct[0]),
        "quantization_status": "compressed",
        "ignore": ignored + _towers(ignored, [name for name, scheme in schemes.items() if scheme is not None]),
        "config_groups": groups,
    }
    if not mixed and not distinct[0].symmetric:
        # transformers reads this: it then decodes while loading, the one way that takes packed zero points there.
        config["dequantize"] = True
    return config


def _towers(ignored: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Patterns for whole towers that stay unquantized: readers move them to other places in the tree of modules."""
    taken = {part for name in quantized for part in name.split(".")}
    towers: dict[str, None] = {}
    for name in ignored:
        containers = itertools.takewhile(lambda part: not part.isdigit(), name.split(".")[:-1])
        tower = next((part for part in containers if part not in taken), None)
        if tower is not None:
            towers[f"re:(.*[.])?{re.escape(tower)}[.]"] = None
    return list(towers)


def _group(scheme: Scheme, targets: list[str], mixed: bool) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        **({"group_size": scheme.group_size} if scheme.group_size else {}),
        "dynamic": False,
    }
    activations = None
    if scheme.activations is not None:
        activations = {
            "num_bits": scheme.bits,
            "type": scheme.kind,
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {
        "targets": targets,
        "input_activations": activations,
        "output_activations": None,
        "weights": weights,
        **({"format": format_of(scheme)} if mixed else {}),
    }


def schemes_from_config(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme | None]:
    """The scheme of each linear module by name; None where the config leaves it unquantized.

    An exact name beats a regular expression, which beats the class `Linear`; `ignore` beats all.

    Raises:
        CheckpointError: the config is no compressed-tensors config, or asks for what fewbits does not know.
    """
    schemes: dict[str, Scheme] = {}
    for name, group in _config_groups(config).items():
        scheme = _scheme(name, group, str(config.get("format")))
        for target in _strings(name, "targets", group.get("targets")):
            schemes.setdefault(target, scheme)
    ignored = _strings("quantization_config", "ignore", config.get("ignore") or [])
    return _assign(schemes, ignored, modules)


def _assign(schemes: Mapping[str, Scheme], ignored: Iterable[str], modules: Iterable[str]) -> dict[str, Scheme | None]:
    patterns = sorted(target for target in schemes if target.startswith("re:"))
    ignored_names, ignored_patterns = set(ignored), [name for name in ignored if name.startswith("re:")]

    def scheme_of(module: str) -> Scheme | None:
        if module in ignored_names or any(matches(pattern, module) for pattern in ignored_patterns):
            return None
        if module in schemes:
            return schemes[module]
        for pattern in patterns:
            if matches(pattern, module):
                return schemes[pattern]
        return schemes.get(LINEAR)

    return {module: scheme_of(module) for module in modules}


def _config_groups(config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    if config.get("quant_method") != "compressed-tensors":
        raise _unknown("quantization_config", "quant_method", config.get("quant_method"), '"compressed-tensors"')
    if config.get("transform_config"):
        raise _unknown("quantization_config", "transform_config", "a transform", "none")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _unknown("quantization_config", "config_groups", groups, "an object with at least one group")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise _unknown("config_groups", name, group, "an object")
    return groups


def _scheme(name: str, group: Mapping[str, Any], default_format: str) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _unknown(name, "weights", weights, "an object")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if kind not in ("int", "float"):
        raise _unknown(name, "weights.type", kind, '"int" or "float"')
    if type(bits) is not int or not 1 <= bits <= 8 or (kind == "float" and bits != 8):
        raise _unknown(name, "weights.num_bits", bits, "1 to 8 for int, 8 for float")
    if weights.get("dynamic"):
        raise _unknown(name, "weights.dynamic", weights["dynamic"], "false")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise _unknown(name, "weights.actorder", weights["actorder"], 'null, "weight" or "static"')
    scheme = Scheme(
        kind,
        bits,
        symmetric=bool(weights.get("symmetric", True)),
        group_size=_group_size(name, weights),
        activations=_activations(name, group, kind),
    )
    _check_format(name, scheme, group.get("format") or default_format)
    return scheme


def _group_size(name: str, weights: Mapping[str, Any]) -> int:
    size = weights.get("group_size")
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "channel":
        return 0
    if strategy != "group":
        raise _unknown(name, "weights.strategy", strategy, '"group" or "channel"')
    if type(size) is not int or size <= 0:
        raise _unknown(name, "weights.group_size", size, "a positive number")
    return size


def _activations(name: str, group: Mapping[str, Any], kind: Kind) -> Activations:
    if group.get("output_activations") is not None:
        raise _unknown(name, "output_activations", "an object", "null")
    inputs = group.get("input_activations")
    if inputs is None:
        return None
    if not isinstance(inputs, dict):
        raise _unknown(name, "input_activations", inputs, "null or an object")
    dynamic = (inputs.get("num_bits", 8), inputs.get("type", "int"), inputs.get("strategy"), inputs.get("dynamic"))
    if dynamic != (8, kind, "token", True) or not inputs.get("symmetric", True):
        found = f"{dynamic[0]}-bit {dynamic[1]} per {dynamic[2]}{'' if dynamic[3] else ', static'}"
        raise _unknown(name, "input_activations", found, f"8-bit {kind}, symmetric, dynamic per token")
    return "dynamic"


def _check_format(name: str, scheme: Scheme, found: str) -> None:
    """Refuse a layout that does not go with the scheme; the three plain layouts are one and the same."""
    expected = format_of(scheme)
    plain = ("int-quantized", "float-quantized", "naive-quantized")
    if found != expected and not (found in plain and expected in plain):
        raise _unknown(name, "format", found, f'"{expected}" for {scheme}')


def _strings(where: str, key: str, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _unknown(where, key, value, "a list of module names")
    return value


def _unknown(where: str, key: str, found: object, expected: str) -> CheckpointError:
    shown = "nothing" if found is None else repr(found) if not isinstance(found, str) else f'"{found}"'
    return CheckpointError(f"config.json: {key} of {where} is {shown}; expected {expected}.", _HINT)
