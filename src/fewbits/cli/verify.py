"""`fewbits verify`: the checkpoint is whole and decodes to what was recorded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.cli.options import Json, Quiet
from fewbits.cli.units import bytes_text
from fewbits.cli.watch import watcher

if TYPE_CHECKING:
    from fewbits.verify import VerifyReport


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a quantized checkpoint.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="MODEL", help="The checkpoint it was made from.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a quantized checkpoint is whole, and equal to what was recorded when it was written."""
    from fewbits.errors import VerificationError
    from fewbits.verify import verify as run

    report = run(out, against, progress=watcher(quiet=quiet or as_json))
    if as_json:
        print(json.dumps(report_dict(report)))
    elif not quiet:
        show(report)
    if not report.ok:
        count = len(report.problems)
        raise VerificationError(
            f"{out}: {count} problem{'s' if count > 1 else ''} found: {report.problems[0]}",
            "do not serve this checkpoint: copy it again, or quantize the model again",
        )


def report_dict(report: VerifyReport) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "path": str(report.path),
        "against": None if report.against is None else str(report.against),
        "ok": report.ok,
        "problems": [asdict(problem) for problem in report.problems],
        "unchecked": list(report.unchecked),
        "layers": [asdict(layer) for layer in report.layers],
        "tensors": report.tensors,
        "quantized_layers": report.quantized_layers,
        "bytes_checked": report.bytes_checked,
    }


def show(report: VerifyReport) -> None:
    """What was checked; every problem on a line of its own."""
    from rich.console import Console

    console = Console()
    for problem in report.problems:
        console.print(f"[red]problem[/] {problem}", highlight=False)
    for unchecked in report.unchecked:
        console.print(f"[yellow]unchecked[/] {unchecked}", highlight=False)
    checked = (
        f"{report.tensors} tensors, {report.quantized_layers} quantized layers, {bytes_text(report.bytes_checked)}"
    )
    against = "" if report.against is None else f", errors equal to those recorded against {report.against}"
    if report.ok:
        console.print(f"[green]whole[/] {report.path}: {checked}{against}", highlight=False)
