"""The Typer app: all commands, and the one place where errors become sentences and exit codes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from aligncurate import __version__
from aligncurate.cli import curate, usage
from aligncurate.errors import NonFiniteError, RunError, UserError
from aligncurate.progress import make_console, safe_text

_MISTAKES = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Every error meant for the user ends as one sentence and an exit code: 2 usage error, 1 runtime error."""
    try:
        yield
    except UserError as error:
        _print_error(str(error))
        raise typer.Exit(2) from None
    except usage.UsageError as error:
        if usage.shows_help(error):
            raise
        _print_error(usage.sentence(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        what = f": {interrupt}." if str(interrupt) else ". Finished work is kept; rerun to resume."
        make_console(stderr=True).print(Text(f"Interrupted{safe_text(what)}"), soft_wrap=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read all it wants
        raise typer.Exit(0) from None
    except NonFiniteError as error:
        _print_error(str(error))
        raise typer.Exit(1) from None
    except RunError as error:  # no other RuntimeError: those are bugs, whose traceback helps
        _print_error(f"{str(error).rstrip('.')}. Finished parts are kept; rerun to resume.")
        raise typer.Exit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}.")
        raise typer.Exit(2 if isinstance(error, _MISTAKES) else 1) from None


def _print_error(sentence: str) -> None:
    lines = "\n  ".join(safe_text(line) for line in sentence.split("\n  "))  # several shards have a line each
    make_console(stderr=True).print(Text.assemble(("error: ", "bold red"), lines), soft_wrap=True)


class _Commands(TyperGroup):
    """All commands. Those of `aligntrain` are added when one of them, or the list, is asked for."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _one_sentence():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _one_sentence():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        self._add_training()
        return super().list_commands(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            self._add_training()
        return super().resolve_command(ctx, args)

    def _add_training(self) -> None:
        from aligntrain.cli import app as training

        self.commands.update(typer.main.get_command(training).commands)  # type: ignore[attr-defined]


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(curate.app)


def _print_version(on: bool) -> None:
    if on:
        print(f"aligncurate {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Score image-text pairs with CLIP, give them alignment levels, curate, export and train on them."""


def main() -> None:
    """Entry point of the `aligncurate` command."""
    try:
        app()
    except SystemExit as end:
        if end.code == 130 and any(not thread.daemon for thread in threading.enumerate()[1:]):
            sys.stdout.flush()
            os._exit(130)  # the interpreter would wait for threads that hang in a read
        raise
