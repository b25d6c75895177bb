"""The `fewbits` command: one file a command, and one place where errors become messages and exit statuses."""

from __future__ import annotations

import gc
import os
import sys

import typer

from fewbits.cli.bench import bench
from fewbits.cli.demo import demo
from fewbits.cli.evaluate import evaluate
from fewbits.cli.generate import generate
from fewbits.cli.inspect import inspect
from fewbits.cli.kernels import kernels
from fewbits.cli.plan import plan
from fewbits.cli.quantize import quantize
from fewbits.cli.verify import verify
from fewbits.errors import FewbitsError, Interrupted

app = typer.Typer(
    name="fewbits",
    help="Makes transformer models small and runs them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
for command in (quantize, plan, inspect, verify, evaluate, generate, kernels, bench, demo):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        from fewbits import __version__

        print(f"fewbits {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Makes transformer models small and runs them."""


def run() -> None:
    """Entry point. The user's mistakes exit with 2, failures with 1, Ctrl-C with 130; none shows a traceback."""
    # A path or a figure broken in two cannot be copied; only a terminal's own width is a reason to wrap.
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "120")
    # What is imported stays, a hundred thousand objects; to look for garbage among them takes a fifth of the start.
    gc.set_threshold(100_000)
    # NumPy's matrix products are not used, and their threads would spin while the first weights are read.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        app()
    except FewbitsError as error:
        print(f"{public_name(type(error))}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(Interrupted.exit_status)
    except BrokenPipeError:
        sys.exit(1)


def public_name(kind: type[FewbitsError]) -> str:
    """The name under which users know an error: that of the nearest class in `fewbits.errors`."""
    return next(base.__name__ for base in kind.__mro__ if base.__module__ == FewbitsError.__module__)
