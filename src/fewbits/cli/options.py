"""The options that several commands share, and the configuration they add up to."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fewbits.config import QuantConfig, method_from_spec
from fewbits.errors import ConfigError
from fewbits.methods import METHODS, method_options

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face checkpoint (safetensors).")]
Method = Annotated[str | None, typer.Option("--method", "-m", metavar="NAME", help=f"One of {', '.join(METHODS)}.")]
Bits = Annotated[int | None, typer.Option("--bits", help="Bits per weight, for gptq (default 4).")]
GroupSize = Annotated[
    str | None,
    typer.Option("--group-size", "-g", metavar="N", help="Input channels per scale, or 'channel' (default 128)."),
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Zero points, for gptq.")]
Alpha = Annotated[str | None, typer.Option("--alpha", metavar="α", help="0 to 1, or 'auto', for smoothquant.")]
Solver = Annotated[str | None, typer.Option("--solver", metavar="NAME", help="rtn (default) or gptq, for awq.")]
WeightOnly = Annotated[bool, typer.Option("--weight-only", help="Leave activations alone, for int8 and fp8.")]
Recipe = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="A recipe: methods by layer, in TOML or JSON.")
]
# What each field of a method is called on the command line.
OPTION_OF = {
    "bits": "--bits",
    "group_size": "--group-size",
    "symmetric": "--asymmetric",
    "alpha": "--alpha",
    "solver": "--solver",
    "activations": "--weight-only",
}
Format = Annotated[
    str,
    typer.Option("--format", "-f", metavar="NAME", help="How OUT lies on disk: compressed-tensors, gptq or awq."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]


def quant_config(
    method: Method = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    asymmetric: Asymmetric = False,
    alpha: Alpha = None,
    solver: Solver = None,
    weight_only: WeightOnly = False,
    recipe: Recipe = None,
) -> QuantConfig:
    """The configuration that the options add up to; a recipe and method options exclude each other."""
    options: dict[str, Any] = {}
    if bits is not None:
        options["bits"] = bits
    if group_size is not None:
        options["group_size"] = _number_or_word("--group-size", group_size, "channel", int)
    if asymmetric:
        options["symmetric"] = False
    if alpha is not None:
        options["alpha"] = _number_or_word("--alpha", alpha, "auto", float)
    if solver is not None:
        options["solver"] = solver
    if weight_only:
        options["activations"] = None
    if recipe is not None:
        if method is not None or options:
            given = "--method" if method is not None else OPTION_OF[next(iter(options))]
            raise ConfigError(f"--config and {given} both choose methods.", "put everything into the recipe")
        return QuantConfig.from_file(recipe)
    if method is None:
        raise ConfigError(
            "no method given.", f"choose one: --method {' | '.join(METHODS)}, or give a recipe with --config"
        )
    _refuse_foreign(method, options)
    config = QuantConfig(method_from_spec({"name": method, **options}, where="--method"))
    config.validate()
    return config


def _refuse_foreign(method: str, options: dict[str, Any]) -> None:
    """Options that the method does not take, named as they were typed."""
    method_class = METHODS.get(method.lower())
    if method_class is None:
        return
    known = method_options(method_class)
    for name in options:
        if name not in known:
            takers = [short for short, taker in METHODS.items() if name in method_options(taker)]
            own = ", ".join(OPTION_OF[option] for option in known if option in OPTION_OF)
            raise ConfigError(
                f"{OPTION_OF[name]} is no option of {method}; it belongs to {', '.join(takers)}.",
                f"{method} takes {own or 'no options'}",
            )


def _number_or_word(option: str, text: str, word: str, number: type[int] | type[float]) -> int | float | str:
    if text == word:
        return word
    try:
        return number(text)
    except ValueError:
        kind = "whole number" if number is int else "number"
        raise ConfigError(f"{option}: expected a {kind} or '{word}', got {text!r}.") from None


def with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `config` is made of the options of `quant_config`, which stand in its place."""
    options = signature(quant_config).parameters
    hints = get_type_hints(quant_config, include_extras=True) | get_type_hints(command, include_extras=True)
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        parameters += options.values() if parameter.name == "config" else [parameter]
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]

    @wraps(command)
    def run(**given: Any) -> None:
        chosen = quant_config(**{name: given.pop(name) for name in options})
        command(config=chosen, **given)

    run.__dict__["__signature__"] = Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
