"""`fewbits bench`: prompt and decoding speed here, against bf16 and against what memory allows."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fewbits.cli.generate import Device, Directory, Dtype, torch_dtype
from fewbits.cli.options import Json, Quiet
from fewbits.cli.units import bytes_text
from fewbits.cli.watch import watcher

if TYPE_CHECKING:
    from fewbits.speed import SpeedReport


def bench(
    directory: Directory,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens to write.")] = 64,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs, after one that warms up.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure prompt and decoding speed, and where the time goes."""
    from fewbits.speed import measure_speed

    report = measure_speed(
        directory, prompt_tokens=prompt, tokens=tokens, runs=runs, device=device, dtype=torch_dtype(dtype),
        progress=watcher(quiet=quiet or as_json),
    )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(report) | {"limit": report.limit}))
    else:
        show(report)


def show(report: SpeedReport) -> None:
    """Rates, then where the time goes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tokens/s")
    table.add_column(f"prompt of {report.prompt_tokens}", justify="right")
    table.add_column(f"writing {report.tokens}", justify="right")
    table.add_row("this checkpoint", f"{report.rates.prompt:.1f}", f"{report.rates.decode:.1f}")
    if report.bf16 is not None:
        table.add_row("decoded to bf16, transformers", f"{report.bf16.prompt:.1f}", f"{report.bf16.decode:.1f}")
        times = (report.rates.prompt / report.bf16.prompt, report.rates.decode / report.bf16.decode)
        table.add_row("times bf16", f"{times[0]:.2f}", f"{times[1]:.2f}")
    table.add_row("limit by memory", "", f"{report.limit:.1f}")
    table.add_row("share of the limit", "", f"{report.rates.decode / report.limit:.0%}")
    shares = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("where the time goes", "prompt", "writing"):
        shares.add_column(title, justify="left" if "time" in title else "right")
    whole = [sum(report.prompt_shares.values()), sum(report.decode_shares.values())]
    for kernel in dict.fromkeys((*report.decode_shares, *report.prompt_shares)):
        parts = [side.get(kernel, 0.0) for side in (report.prompt_shares, report.decode_shares)]
        shares.add_row(kernel, *(f"{part / total:.0%}" for part, total in zip(parts, whole, strict=True)))
    console = Console()
    console.print(table)
    console.print(shares)
    for note in report.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    console.print(
        f"{bytes_text(report.token_bytes)} of weights a token, read at {report.bandwidth / 1e9:.1f} GB/s; "
        f"{bytes_text(report.weight_bytes)} of weights in all; medians of {report.runs} runs",
        highlight=False,
    )
