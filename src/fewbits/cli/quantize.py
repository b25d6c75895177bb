"""`fewbits quantize`: a checkpoint in, a quantized checkpoint and an account of the loss out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.cli.options import Format, Json, Model, Quiet, with_method_options
from fewbits.cli.units import bytes_number, bytes_text, seconds_text
from fewbits.cli.watch import watcher
from fewbits.config import QuantConfig
from fewbits.errors import Interrupted
from fewbits.formats import DEFAULT_FORMAT

if TYPE_CHECKING:
    from rich.table import Table

    from fewbits.notes import Note
    from fewbits.report import LayerRecord, Report


class Importance(StrEnum):
    """How calibration tokens are weighed."""

    auto = "auto"
    loss = "loss"
    none = "none"


@with_method_options
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    config: QuantConfig,
    format: Format = DEFAULT_FORMAT,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text, JSON lines, Parquet or token ids to calibrate with; 'self' has the model write its own text.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")] = 128,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a sample.")] = 2048,
    importance: Annotated[
        Importance,
        typer.Option(
            "--importance", help="Weigh tokens by how much the loss cares about them; auto: where GPTQ solves."
        ),
    ] = Importance.auto,
    seed: Annotated[int, typer.Option("--seed", help="Of the labels that importance draws.")] = 0,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Memory for hidden states (2GiB, 500MB, bytes); past it they wait in a file and it takes longer.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where calibration runs: cpu or cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Carry layers with NaN or infinite weights over unquantized.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat every note as an error.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint. Interrupted, the same command goes on where it stopped."""
    from fewbits.quantize import quantize as run

    try:
        report = run(
            model,
            out,
            config,
            calibration,
            format=format,
            samples=samples,
            length=length,
            importance=importance.value,
            seed=seed,
            memory_limit=None if memory is None else bytes_number("--memory", memory),
            device=device,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            strict=strict,
            progress=watcher(quiet=quiet or as_json),
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"{out}: not finished, so nothing stands under that name.", "the same command goes on where it stopped"
        ) from None
    if as_json:
        print(json.dumps(report_dict(report)))
    elif not quiet:
        show(report)


def show(report: Report) -> None:
    """What was lost, by kind of layer; the worst layer by name; sizes, time and memory."""
    from rich.console import Console

    console = Console()
    console.print(loss_table(report))
    worst = report.worst
    console.print(f"worst layer: {worst.name}, relative error {_error_text(worst)}", highlight=False)
    if report.folds:
        scaled = sum(len(fold["layers"]) for fold in report.folds)
        console.print(f"input channels of {scaled} layers scaled, {len(report.folds)} folds", highlight=False)
    for line in note_lines(report.notes):
        console.print(f"[yellow]note[/] {line}", highlight=False, soft_wrap=True)
    if report.calibration is not None:
        console.print(calibration_line(report), highlight=False, soft_wrap=True)
    resumed = f" · shards finished before: {report.resumed_shards}" if report.resumed_shards else ""
    before, after = report.plan.bytes_before, report.plan.bytes_after
    console.print(
        f"[bold]{report.out_dir}[/]: {bytes_text(before)} → {bytes_text(after)} ({before / after:.2f}× smaller, "
        f"{report.plan.effective_bits:.2f} bits per quantized weight) in {seconds_text(report.elapsed_s)}, "
        f"peak memory {bytes_text(report.peak_memory_bytes)}{resumed}",
        highlight=False,
        soft_wrap=True,
    )


def note_lines(notes: Sequence[Note]) -> list[str]:
    """Notes as they are shown: those that differ in the layer alone on one line."""
    layers: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        layers.setdefault((note.what, note.why), []).append(note.layer)
    lines = []
    for (what, why), names in layers.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more}: {what} ({why})")
    return lines


STAGES = {
    "importance_s": "importance", "files_s": "reading weights", "forward_s": "forward", "statistics_s": "statistics",
    "solve_s": "solving",
}  # fmt: skip


def calibration_line(report: Report) -> str:
    """What was calibrated with, and how long each stage took."""
    facts = report.calibration
    assert facts is not None
    stages = [f"{STAGES[name]} {seconds_text(spent)}" for name, spent in report.stages.items() if name in STAGES]
    return (
        f"calibrated with {facts['tokens']:,} tokens of {facts['source']} ({facts['samples']} samples of "
        f"{facts['length']:,}), forward in {facts['forward']}{': ' if stages else ''}{', '.join(stages)}"
    )


def _error_text(record: LayerRecord) -> str:
    text = f"{record.relative_error:.4f} of its weights"
    return text if record.output_error is None else f"{record.output_error**0.5:.4f} of its output, {text}"


def loss_table(report: Report) -> Table:
    """Mean and worst relative error by kind of layer and method."""
    from rich.table import Table

    with_outputs = any(record.output_error is not None for record in report.layers)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layers")
    table.add_column("method")
    titles = ["count", "bits", "weight error", "worst"] + (["output error", "worst"] if with_outputs else [])
    for title in [*titles, "before", "after"]:
        table.add_column(title, justify="right")
    groups: dict[tuple[str, str], list[LayerRecord]] = {}
    for record in report.layers:
        groups.setdefault((record.kind, record.method), []).append(record)
    for (kind, method), records in groups.items():
        errors = [record.relative_error for record in records]
        cells = [f"{sum(errors) / len(errors):.4f}", f"{max(errors):.4f}"]
        if with_outputs:
            outputs = [record.output_error**0.5 for record in records if record.output_error is not None]
            cells += [f"{sum(outputs) / len(outputs):.4f}", f"{max(outputs):.4f}"] if outputs else ["", ""]
        parameters = sum(record.shape[0] * record.shape[1] for record in records)
        before, after = sum(record.bytes_before for record in records), sum(record.bytes_after for record in records)
        bits = f"{8 * after / parameters:.2f}"
        table.add_row(kind, method, str(len(records)), bits, *cells, bytes_text(before), bytes_text(after))
    return table


def report_dict(report: Report) -> dict[str, Any]:
    """The report as plain data: the manifest, and what differs from run to run."""
    return report.manifest() | {
        "out": str(report.out_dir),
        "elapsed_s": report.elapsed_s,
        "stages_s": report.stages,
        "peak_memory_bytes": report.peak_memory_bytes,
        "resumed_shards": report.resumed_shards,
    }
