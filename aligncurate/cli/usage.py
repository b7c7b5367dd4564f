"""What Typer says of a command line that it cannot use, as one sentence."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import typer

from aligncurate.settings import refusal

UsageError: Any = typer.BadParameter.__mro__[1]
"""The base of what Typer raises for a command line; its home differs between versions of Typer."""


def shows_help(error: Any) -> bool:
    """Whether an error only asks for the help to be shown, because there are no arguments."""
    return type(error).__name__ == "NoArgsIsHelpError"


def sentence(error: Any) -> str:
    """What is wrong with a command line: the option, the value, what is allowed, the closest name."""
    kind, told = type(error).__name__, error.format_message().rstrip(".")
    help = f"`{error.ctx.command_path} --help`" if error.ctx is not None else "`--help`"
    if kind == "NoSuchOption":
        names = _options(error.ctx.command) if error.ctx is not None else error.possibilities or ()
        return f"{error.option_name}: there is no such option; {_hint(error.option_name, names, help)}"
    if kind == "BadOptionUsage":  # "Option '--limit' requires an argument"
        told = told.removeprefix(f"Option {error.option_name!r} ").replace("requires an argument", "needs a value")
        return f"{error.option_name} {told}."
    if kind == "MissingParameter":
        return f"{_name(error.param)} is missing; see {help}."
    if kind == "BadParameter" and error.param is not None:
        return _bad_value(error)
    if unknown := re.match(r"No such command '(.*?)'", told, re.DOTALL):
        return f"{unknown[1]}: there is no such command; {_hint(unknown[1], error.ctx.command.commands, help)}"
    return f"{told[:1].lower()}{told[1:]}; see {help}."


def _bad_value(error: Any) -> str:
    option = _name(error.param)
    if not hasattr(error.__cause__, "errors"):
        return f"{option}: {error.message.rstrip('.')}."
    fault = error.__cause__.errors()[0]  # Pydantic's
    if (least := fault.get("ctx", {}).get("ge")) is not None:
        return f"{option} {fault['input']}: use a number of at least {least:g}."
    return refusal(option, fault["input"], typing.get_type_hints(error.ctx.command.callback)[error.param.name])


def _hint(name: str, names: Iterable[str], help: str) -> str:
    bare = {each.lstrip("-"): each for each in names}  # two dashes that agree are no likeness
    close = get_close_matches(name.lstrip("-"), bare, n=1)
    return f"did you mean {bare[close[0]]}?" if close else f"{help} lists them."


def _name(param: Any) -> str:
    return str(
        param.opts[0] if param.param_type_name == "option" else (param.metavar or param.name.upper()).rstrip(".")
    )


def _options(command: Any) -> list[str]:
    return [name for param in command.params for name in (*param.opts, *param.secondary_opts) if name[0] == "-"]
