"""Options: those that commands share, and those made from settings dataclasses, so that each is stated once."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from aligncurate.io.files import as_path
from aligncurate.settings import choices, field_types, option_name, parse, without_none

Command = Callable[..., None]

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="Tars, Parquet, JSON, JSONL, CSV or TSV files, folders of these, or a dataset; braces and * expand.",
        show_default=False,
    ),
]
DatasetFolder = Annotated[
    Path, typer.Argument(metavar="DATASET", help="Dataset folder.", show_default=False, callback=as_path)
]
DatasetFolders = Annotated[
    list[Path],
    typer.Argument(
        metavar="DATASET...",
        help="Dataset folders.",
        show_default=False,
        callback=lambda folders: [as_path(folder) for folder in folders],
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="Output folder or URI (s3://, gs://, …); created if missing.",
        show_default=False,
        callback=as_path,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be read and done; write nothing.")]
ScoreColumn = Annotated[str, typer.Option(help="Column with the scores.")]


def with_settings(
    *classes: type, leave_out: Collection[str] = (), over_file: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command gets an option for every field of the settings dataclasses.

    The command takes them as `**options`: by field name, only those that the user gave, in their types.

    Args:
        classes: dataclasses whose fields are `aligncurate.settings.setting`s.
        leave_out: fields that get no option.
        over_file: the options go over those of a settings file, so each switch can be turned off too, and `none` clears
            an optional setting.
    """

    def decorate(command: Command) -> Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        own = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
        homes = {name: cls for cls in classes for name in field_types(cls) if name not in leave_out}
        quiet = [p for p in own if p.name == "quiet"]  # last, as everywhere
        parameters = [p for p in own if p.name != "quiet"] + _parameters(homes, over_file) + quiet
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]

        @wraps(command)
        def wrapped(**given: Any) -> None:
            options = {}
            for name, value in given.items():
                if name not in homes:
                    options[name] = value
                elif value is not None:
                    options[name] = (
                        parse(homes[name], name, value, clears=over_file) if isinstance(value, str) else value
                    )
            command(**options)

        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


def _parameters(homes: dict[str, type], over_file: bool) -> list[inspect.Parameter]:
    """A Typer option for each field; None where the user does not give it."""
    parameters, group = [], None
    for name, cls in homes.items():
        field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
        group = field.metadata["group"] or group
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_annotation(field, field_types(cls)[name], group, over_file),
            )
        )
    return parameters


def _annotation(field: dataclasses.Field[Any], kind: Any, group: str | None, over_file: bool) -> Any:
    plain = without_none(kind)
    flag = field.metadata["flag"] or option_name(field.name)
    names = [flag]
    if plain is bool:
        names = [flag] if field.default is False and not over_file else [f"{flag}/--no-{flag.removeprefix('--')}"]
    elif field.name == "out":
        names = [flag, "-o"]
    repeated = typing.get_origin(plain) is tuple and typing.get_args(plain)[0] is str and field.name in _REPEATED
    value: Any = list[str] if repeated else plain if plain in (bool, int, float) or choices(plain) else str
    default = field.default if isinstance(field.default, str | int | float) and field.default != "" else None
    shown = field.metadata["shown"]
    if shown is None and default is not None and default is not False:
        shown = "on" if default is True else str(default)
    help = field.metadata["help"] + (rf" [dim]\[default: {shown}][/]" if shown else "")  # Typer would put it in ()
    option = typer.Option(*names, help=help, show_default=False, rich_help_panel=group)
    return Annotated[value | None, option]


_REPEATED = {"model_config"}
"""Settings whose option is given once per value; any other list is separated by commas."""
