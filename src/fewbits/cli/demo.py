"""`fewbits demo`: a real small model, every method, one table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbits.cli.options import Json
from fewbits.cli.units import bytes_text, seconds_text
from fewbits.cli.watch import watcher

if TYPE_CHECKING:
    from fewbits.demo import DemoRow


def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep the quantized checkpoints in this folder.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Another checkpoint in place of the demo's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize a real small model with every method, measure each, and show the table."""
    from fewbits.demo import demo as run

    rows = run(keep, model_dir=model, progress=watcher(quiet=as_json))
    if as_json:
        print(json.dumps([row_dict(row) for row in rows]))
    else:
        show(rows)


def row_dict(row: DemoRow) -> dict[str, object]:
    """One row as plain data."""
    return {
        "method": row.label,
        "size_bytes": row.size_bytes,
        "bits": row.bits,
        "elapsed_s": None if row.report is None else row.report.elapsed_s,
        "evaluation": None if row.evaluation is None else asdict(row.evaluation),
        "sentence": row.sentence,
        "tokens_per_s": row.tokens_per_s,
    }


def show(rows: list[DemoRow]) -> None:
    """The table: size, time and loss of each method, and what it says."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for title in ("size", "bits", "time", "perplexity", "KL", "top-1", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("it says")
    reference = next(row.evaluation.perplexity_reference for row in rows if row.evaluation is not None)
    for row in rows:
        if row.evaluation is None or row.report is None:
            figures = ["", f"{reference:.2f}", "0", "100 %"]
        else:
            e = row.evaluation
            figures = [seconds_text(row.report.elapsed_s), f"{e.perplexity:.2f}", f"{e.kl:.4f}", f"{e.top1:.1%}"]
        table.add_row(
            row.label, bytes_text(row.size_bytes), f"{row.bits:.2f}", *figures,
            f"{row.tokens_per_s:.0f}", " ".join(row.sentence.split()),
        )  # fmt: skip
    Console().print(table)
