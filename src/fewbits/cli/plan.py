"""`fewbits plan`: what would be done, layer by layer, and what it would take."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.cli.options import Format, Json, Model, with_method_options
from fewbits.cli.units import bytes_text
from fewbits.config import QuantConfig
from fewbits.formats import DEFAULT_FORMAT

if TYPE_CHECKING:
    from rich.table import Table

    from fewbits.plan import Plan, PlannedLayer


@with_method_options
def plan(
    model: Model,
    config: QuantConfig,
    format: Format = DEFAULT_FORMAT,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration samples, for peak memory.")] = 128,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a sample, for peak memory.")] = 2048,
    all_layers: Annotated[bool, typer.Option("--all", help="A row for each layer, not for each kind.")] = False,
    as_json: Json = False,
) -> None:
    """Show what `quantize` would do and what it would take; reads headers only."""
    from rich.console import Console

    from fewbits.plan import plan as make_plan

    planned = make_plan(model, config, format=format, samples=samples, length=length)
    if as_json:
        print(json.dumps(plan_dict(planned)))
        return
    console = Console()
    console.print(layer_table(planned, all_layers=all_layers))
    console.print(engine_table(planned))
    for note in planned.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    console.print(totals_line(planned), highlight=False)


def totals_line(planned: Plan) -> str:
    """Bytes before and after, bits and peak memory in one line."""
    before, after = planned.bytes_before, planned.bytes_after
    memory = bytes_text(planned.peak_memory_bytes)
    if planned.needs_calibration:
        memory = f"about {memory} for {planned.calibration.samples} × {planned.calibration.length:,} tokens"
    return (
        f"{before:,} → {after:,} bytes ({bytes_text(before)} → {bytes_text(after)}, {before / after:.2f}× smaller) · "
        f"{planned.effective_bits:.3f} bits per quantized weight · peak memory {memory}"
    )


def _row_key(layer: PlannedLayer) -> tuple[str, tuple[int, int], str]:
    return layer.layer.kind, layer.shape, str(layer.method or layer.reason)


def layer_table(planned: Plan, *, all_layers: bool) -> Table:
    """Layers grouped by kind, shape and method, or one by one."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer")
    for title in ("count", "out × in", "bits", "before", "after"):
        table.add_column(title, justify="right")
    table.add_column("method")
    groups: dict[object, list[PlannedLayer]] = {}
    for layer in planned.layers:
        groups.setdefault(layer.name if all_layers else _row_key(layer), []).append(layer)
    for members in groups.values():
        first = members[0]
        scheme = "" if first.method is None else f" [dim]{first.method.scheme}[/]"
        table.add_row(
            first.name if all_layers or len(members) == 1 else first.layer.kind,
            str(len(members)),
            f"{first.shape[0]} × {first.shape[1]}",
            f"{first.bits:.3g}",
            bytes_text(sum(layer.bytes_before for layer in members)),
            bytes_text(sum(layer.bytes_after for layer in members)),
            f"{first.method}{scheme}" if first.method is not None else f"[dim]{first.reason}[/]",
        )
    return table


def engine_table(planned: Plan) -> Table:
    """Who loads the result, and on what kind of kernel."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("engine", "loads", "why not, or why slowly"):
        table.add_column(title)
    for support in planned.engines:
        table.add_row(support.engine, support.verdict, "; ".join(support.reasons))
    return table


def plan_dict(planned: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    return {
        "model": str(planned.source.path),
        "format": planned.format,
        "bytes_before": planned.bytes_before,
        "bytes_after": planned.bytes_after,
        "effective_bits": planned.effective_bits,
        "peak_memory_bytes": planned.peak_memory_bytes,
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "method": None if layer.method is None else str(layer.method),
                "scheme": None if layer.method is None else str(layer.method.scheme),
                "reason": layer.reason,
                "bits": layer.bits,
                "bytes_before": layer.bytes_before,
                "bytes_after": layer.bytes_after,
            }
            for layer in planned.layers
        ],
        "engines": [
            {"engine": e.engine, "loads": e.loads, "fast": e.fast, "reasons": list(e.reasons)} for e in planned.engines
        ],
        "notes": [str(note) for note in planned.notes],
    }
