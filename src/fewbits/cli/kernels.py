"""`fewbits kernels`: what each kind of layer runs on here, and why the better kernels can't."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.cli.generate import Device, Dtype, torch_dtype
from fewbits.cli.options import Json

if TYPE_CHECKING:
    from fewbits.explain import Explanation, LayerKind


def kernels(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A quantized checkpoint; the methods' defaults without.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show which kernels run at 1, 16 and 512 tokens, and why the better ones can't."""
    import torch

    from fewbits.explain import explain

    found = explain(directory, device, torch_dtype(dtype) or torch.bfloat16)
    if as_json:
        print(json.dumps(explanation_dict(found)))
    else:
        show(found)


def explanation_dict(found: Explanation) -> dict[str, Any]:
    """The explanation as plain data."""
    plain = asdict(found)
    for kind, layer in zip(plain["kinds"], found.kinds, strict=True):
        kind["scheme"] = str(layer.scheme)
    return plain


def show(found: Explanation) -> None:
    """A row for each kind of layer; then every reason once, with the kinds and tokens it holds for."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layers", no_wrap=True)
    table.add_column("count", justify="right")
    table.add_column("out × in", justify="right", no_wrap=True)
    table.add_column("numbers")
    for choice in found.kinds[0].choices:
        table.add_column(f"{choice.tokens} token{'s' if choice.tokens > 1 else ''}")
    for kind in found.kinds:
        names = [choice.kernel or "none" for choice in kind.choices]
        table.add_row(kind.name, str(kind.count), f"{kind.shape[0]} × {kind.shape[1]}", str(kind.scheme), *names)
    console = Console()
    console.print(table)
    for (kernel, reason), where in reasons(found.kinds).items():
        console.print(f"[dim]not[/] {kernel}: {reason} [dim]({where})[/]", highlight=False)
    features = ", ".join(found.features) or "none that kernels ask for"
    console.print(f"[bold]{found.device}[/], {found.dtype}: {features}", highlight=False)


def reasons(kinds: tuple[LayerKind, ...]) -> dict[tuple[str, str], str]:
    """Each kernel's reasons, with the kinds of layers and the numbers of tokens that they hold for."""
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for kind in kinds:
        for choice in kind.choices:
            for kernel, reason in choice.reasons.items():
                found.setdefault((kernel, reason), {}).setdefault(kind.name, []).append(choice.tokens)
    described = {}
    for key, layers in found.items():
        by_tokens: dict[tuple[int, ...], list[str]] = {}
        for name, tokens in layers.items():
            by_tokens.setdefault(tuple(dict.fromkeys(tokens)), []).append(name)
        parts = [f"{', '.join(dict.fromkeys(names))} at {', '.join(map(str, n))}" for n, names in by_tokens.items()]
        described[key] = "; ".join(parts)
    return described
