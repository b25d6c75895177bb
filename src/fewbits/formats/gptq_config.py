"""The `quantization_config` of a GPTQ checkpoint: one scheme for all layers, and rules for those that differ.

`dynamic` maps regular expressions, matched from the start of a module's name, to what differs ("+:" or nothing before
them) or to nothing at all ("-:": left unquantized). The first that matches counts, so negative ones come first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fewbits.errors import CheckpointError
from fewbits.formats.targets import targets_by_label
from fewbits.layers import FUSED_LEAVES, HEAD_LEAVES, block_index
from fewbits.schemes import Scheme

METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"
BITS = (2, 3, 4, 8)
PER_CHANNEL = -1
# What engines call the layers that they fuse; their rules must match that name as well.
FUSED_NAMES = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_HINT = "use a checkpoint of GPTQModel, AutoGPTQ or fewbits, or fetch it again if its config.json was changed"
# How a rule treats a module: a scheme of its own, or none.
Rule = Scheme | None


def quantization_config(schemes: Mapping[str, Scheme | None], checkpoint_format: str) -> dict[str, Any]:
    """The config for a model.

    Args:
        schemes: every linear module of the model by name; None where it is not quantized.
    """
    quantized = [scheme for scheme in schemes.values() if scheme is not None]
    if not quantized:
        raise ValueError("no layer is quantized")
    default = Counter(quantized).most_common(1)[0][0]
    heads = [name for name in schemes if name.rpartition(".")[2] in HEAD_LEAVES and block_index(name) is None]
    rules = _rules({name: scheme for name, scheme in schemes.items() if scheme or name not in heads}, default)
    return {
        "quant_method": METHOD,
        **_numbers(default),
        "desc_act": False,
        "lm_head": any(schemes[name] is not None for name in heads),
        "true_sequential": True,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        **({"dynamic": rules} if rules else {}),
    }


def _numbers(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size or PER_CHANNEL, "sym": scheme.symmetric}


def _rules(schemes: Mapping[str, Scheme | None], default: Scheme) -> dict[str, dict[str, Any]]:
    """Rules for the modules that differ from the default, negative ones first."""
    skip = "skip"
    labels: dict[str, Scheme | str | None] = {
        name: skip if scheme is None else None if scheme == default else scheme for name, scheme in schemes.items()
    }
    targets = targets_by_label(_with_fused_names(labels))
    rules: dict[str, dict[str, Any]] = {f"-:{_regex(target)}": {} for target in targets.pop(skip, [])}
    for scheme, listed in targets.items():
        assert isinstance(scheme, Scheme)
        rules |= {f"+:{_regex(target)}": _numbers(scheme) for target in listed}
    return rules


def _with_fused_names(labels: Mapping[str, Scheme | str | None]) -> dict[str, Scheme | str | None]:
    named = dict(labels)
    for name, label in labels.items():
        parent, _, leaf = name.rpartition(".")
        leaves = next((leaves for leaves in FUSED_LEAVES if leaf == leaves[0]), ())
        members = [f"{parent}.{other}" for other in leaves if f"{parent}.{other}" in labels]
        if leaf in FUSED_NAMES and all(labels[member] == label for member in members):
            named[f"{parent}.{FUSED_NAMES[leaf]}"] = label
    return named


def _regex(target: str) -> str:
    return target.removeprefix("re:") if target.startswith("re:") else f"^{re.escape(target)}$"


def schemes_from_config(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme | None]:
    """The scheme of each linear module by name; None where the config leaves it unquantized.

    Raises:
        CheckpointError: the config is no GPTQ config, or asks for what fewbits does not know.
    """
    _check("quant_method", config.get("quant_method"), (METHOD,))
    _check("checkpoint_format", config.get("checkpoint_format", V1), (V1, V2))
    _check("pack_dtype", config.get("pack_dtype", "int32"), ("int32",))
    default = _scheme("quantization_config", config)
    rules = _read_rules(config, default)
    inside = _inside(config.get("modules_in_block_to_quantize"))

    def scheme_of(module: str) -> Scheme | None:
        for pattern, rule in rules:
            if pattern.match(module):
                return rule
        if block_index(module) is None:
            return default if config.get("lm_head") is True else None
        if inside and not module.endswith(inside):
            return None
        return default

    return {module: scheme_of(module) for module in modules}


def _scheme(where: str, numbers: Mapping[str, Any]) -> Scheme:
    bits, size, symmetric = numbers.get("bits"), numbers.get("group_size", 128), numbers.get("sym", True)
    _check("bits", bits, BITS, where)
    if type(size) is not int or (size <= 0 and size != PER_CHANNEL):
        raise _unknown(where, "group_size", size, "a positive number, or -1 for one scale per output")
    _check("sym", symmetric, (True, False), where)
    assert isinstance(bits, int) and isinstance(symmetric, bool)
    return Scheme("int", bits, symmetric=symmetric, group_size=0 if size == PER_CHANNEL else size)


def _read_rules(config: Mapping[str, Any], default: Scheme) -> list[tuple[re.Pattern[str], Rule]]:
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise _unknown("quantization_config", "dynamic", dynamic, "an object of rules by regular expression")
    own = _numbers(default)
    rules: list[tuple[re.Pattern[str], Rule]] = []
    for key, overrides in dynamic.items():
        try:
            pattern = re.compile(key.removeprefix("+:").removeprefix("-:"))
        except re.error as error:
            raise _unknown("dynamic", key, f"no regular expression: {error}", "one") from error
        if key.startswith("-:"):
            rules.append((pattern, None))
            continue
        if not isinstance(overrides, dict):
            raise _unknown("dynamic", key, overrides, "an object")
        rules.append((pattern, _scheme(f"dynamic.{key}", own | overrides)))
    return rules


def _inside(names: object) -> tuple[str, ...]:
    """Endings of the names of all quantized modules, where a config lists them."""
    if names is None:
        return ()
    groups = names if isinstance(names, list) else [names]
    flat = [name for group in groups for name in (group if isinstance(group, list) else [group])]
    if not all(isinstance(name, str) and name for name in flat):
        raise _unknown("quantization_config", "modules_in_block_to_quantize", names, "lists of module names")
    return tuple(f".{name}" for name in flat)


def _check(key: str, found: object, known: tuple[object, ...], where: str = "quantization_config") -> None:
    # 1 is no `true` here.
    if not any(found == value and type(found) is type(value) for value in known):
        raise _unknown(where, key, found, " or ".join(repr(value) for value in known))


def _unknown(where: str, key: str, found: object, expected: str) -> CheckpointError:
    shown = "nothing" if found is None else f"{found!r:.80}"
    return CheckpointError(f"config.json: {key} of {where} is {shown}; expected {expected}.", _HINT)
