"""`fewbits inspect`: what is in a checkpoint, quantized or not, by fewbits or by others."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fewbits.cli.options import Json, Model
from fewbits.cli.units import bytes_text

if TYPE_CHECKING:
    from fewbits.inspect import Inspection


def inspect(model: Model, as_json: Json = False) -> None:
    """Show what is in a checkpoint: layers, numbers, sizes, ranges of scales."""
    from fewbits.inspect import inspect as look

    found = look(model)
    if as_json:
        print(json.dumps(inspection_dict(found)))
    else:
        show(found)


def inspection_dict(found: Inspection) -> dict[str, Any]:
    """The inspection as plain data."""
    return asdict(found) | {"path": str(found.path), "parameters": found.parameters, "bits": found.bits}


def show(found: Inspection) -> None:
    """A row for each kind of layer, then the whole."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layers", overflow="fold", min_width=26)
    for title in ("count", "shape"):
        table.add_column(title, justify="right")
    table.add_column("numbers")
    for title in ("bits", "bytes", "scales"):
        table.add_column(title, justify="right")
    for group in found.groups:
        scales = "" if group.scales is None else f"{group.scales[0]:.2g} to {group.scales[1]:.2g}"
        shape = " × ".join(str(size) for size in group.shape)
        table.add_row(
            group.name, str(group.count), shape, group.numbers, f"{group.bits:.3g}", bytes_text(group.nbytes), scales
        )
    console = Console()
    console.print(table)
    for note in found.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)
    console.print(
        f"[bold]{found.path}[/]: {found.architecture}, {found.quantization}, {found.parameters:,} parameters in "
        f"{found.nbytes:,} bytes ({found.bits:.2f} bits each), {found.tensors} tensors in {found.files} files",
        highlight=False,
    )
