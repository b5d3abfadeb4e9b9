"""The application: its commands, and how errors become one sentence and an exit code."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from typing import Annotated, Any

import typer

from autoft.cli import (
    cache,
    data,
    doctor,
    export,
    leaderboard,
    plan,
    plugins,
    predict,
    resume,
    search,
    weights,
)
from autoft.cli.text import clean
from autoft.errors import AutoftError

EPILOG = """\
Start here:

  autoft search --dataset sample:digits --time 2m
  autoft data scan ./data
  autoft plan --dataset ./data --time 15m
  autoft search --dataset ./data --time 15m --out runs/mine
  autoft leaderboard runs/mine
  autoft predict runs/mine photo.jpg

Exit codes: 0 ok, 1 bug, 2 usage, 3 data, 4 environment, 5 no usable trial, 130 interrupted."""

app = typer.Typer(name="autoft", rich_markup_mode="rich", pretty_exceptions_enable=False)
for module in (search, plan, resume, leaderboard, predict, export):
    app.command(epilog=module.EPILOG)(getattr(module, module.__name__.rpartition(".")[2]))
for group in (data, weights, cache, plugins):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])
app.command(epilog=doctor.EPILOG)(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        import autoft

        typer.echo(f"autoft {autoft.__version__}")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            metavar="",
            help="Show the version.",
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show tracebacks (AUTOFT_DEBUG=1).")
    ] = False,
) -> None:
    """Find the best fine-tuned model for a folder of labelled images."""
    if debug:
        os.environ["AUTOFT_DEBUG"] = "1"  # in the environment, so that workers know it too


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; never raise."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code: Any = app(arguments or ["--help"], prog_name="autoft", standalone_mode=False)
        sys.stdout.flush()
    except AutoftError as error:
        return _report(str(error), error.exit_code)
    except typer.TyperException as error:
        return _report(_usage(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _report("Interrupted.", 130)
    except BrokenPipeError:
        # The reader of our output has left. What is still buffered must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  the last resort, which is to report a bug of ours
        return _report(_bug(error, arguments), 1)
    return code if isinstance(code, int) else 0


def _report(message: str, code: int) -> int:
    if os.environ.get("AUTOFT_DEBUG") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    lines = (clean(line) for line in message.splitlines())
    typer.echo("Error: " + " ".join(lines), err=True)
    return code


def _usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "autoft"
    message = error.format_message().rstrip(".")
    end = "" if message.endswith(("?", "!", ")")) else "."
    return f"{message}{end} See `{command} --help`."


def _bug(error: Exception, arguments: list[str]) -> str:
    return (
        f"This is a bug of autoft: {type(error).__name__}: {error}. Run it again as "
        f"`autoft --debug {shlex.join(arguments)}` and report what that prints, please."
    )
