"""`fewbits evaluate`: what is left of a model, as perplexity, KL divergence and next-token agreement."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.options import Json, Model, Quiet
from fewbits.cli.watch import watcher


def evaluate(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the quantized checkpoint.")],
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="Text to measure on; Python's own documentation if not given."),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of text.")] = 16,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a window.")] = 1024,
    device: Annotated[str, typer.Option("--device", help="Where both models run.")] = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a quantized checkpoint with the original, on the same text."""
    from fewbits.demo import python_documentation
    from fewbits.evaluate import evaluate as run

    content = python_documentation()[0] if text is None else text
    result = run(
        model, out, content, windows=windows, length=length, device=device, progress=watcher(quiet=quiet or as_json)
    )
    if as_json:
        print(json.dumps(asdict(result)))
        return
    from rich.console import Console

    change = result.perplexity / result.perplexity_reference - 1
    Console().print(
        f"KL divergence  {result.kl:.4f} ± {result.kl_error:.4f} nats per token\n"
        f"perplexity     {result.perplexity_reference:.3f} → {result.perplexity:.3f} ({change:+.1%})\n"
        f"same top token {result.top1:.1%} of {result.tokens:,} positions",
        highlight=False,
    )
