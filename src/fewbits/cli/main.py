"""The `fewbits` command: one file a command, and one place where errors become messages and exit statuses."""

from __future__ import annotations

import sys

import typer

from fewbits.cli.demo import demo
from fewbits.cli.evaluate import evaluate
from fewbits.cli.inspect import inspect
from fewbits.cli.plan import plan
from fewbits.cli.quantize import quantize
from fewbits.cli.verify import verify
from fewbits.errors import FewbitsError

app = typer.Typer(
    name="fewbits",
    help="Makes transformer models small and runs them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
for command in (quantize, plan, inspect, verify, evaluate, demo):
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
    try:
        app()
    except FewbitsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("Interrupted. Nothing was left under the final name.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
