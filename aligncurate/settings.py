"""Settings of a verb or a training stage, each stated once: as a field of a frozen dataclass.

The command line makes an option of every field, the Python function takes the fields as keyword arguments, and the
manifest records them. Types, choices and ranges are checked when the dataclass is made, so all three give the same
error.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar

from aligncurate.errors import UserError

_MISSING: Any = dataclasses.MISSING
_MAX_INT = 2**63 - 1  # what other libraries take

Settings = TypeVar("Settings")
Function = TypeVar("Function", bound=Callable[..., Any])


def setting(
    help: str,
    default: Any = _MISSING,
    *,
    group: str = "",
    recorded: bool = True,
    at_least: float | None = None,
    at_most: float | None = None,
    shown: str | None = None,
    flag: str | None = None,
    none_is_value: bool = False,
) -> Any:
    """A dataclass field that is a setting.

    Args:
        help: one sentence for `--help`.
        default: its value where none is given; without one it must be given.
        group: heading under which `--help` lists it; that of the field before by default.
        recorded: whether it changes the result, so that a resumed run must have the same.
        at_least, at_most: smallest and largest number allowed.
        shown: the default as `--help` shows it, where the value itself says little.
        flag: the option's name, where it is not that of the field.
        none_is_value: `none` is one of its values, so it does not clear the setting.
    """
    metadata = {
        "help": help,
        "group": group,
        "recorded": recorded,
        "at_least": at_least,
        "at_most": at_most,
        "shown": shown,
        "flag": flag,
        "none_is_value": none_is_value,
    }
    return dataclasses.field(default=default, metadata=metadata)


def option_name(name: str) -> str:
    """How a setting is called on the command line, and in errors: `--batch-size`."""
    return f"--{name.replace('_', '-')}"


@cache
def field_types(settings: type) -> dict[str, Any]:
    """The type of every setting of a dataclass, by name, in order."""
    hints = typing.get_type_hints(settings)
    return {f.name: hints[f.name] for f in dataclasses.fields(settings)}


def check(settings: Any) -> None:
    """Check every field of a settings dataclass and bring it to its type; for its `__post_init__`.

    Lists become tuples, whole numbers become floats, paths become strings. Raises UserError that names the option.
    """
    types = field_types(settings.__class__)
    for field in dataclasses.fields(settings):
        value = _typed(field.name, types[field.name], getattr(settings, field.name))
        least, most = field.metadata.get("at_least"), field.metadata.get("at_most")
        largest = _MAX_INT if isinstance(value, int) else sys.float_info.max
        low, high = (-inf if least is None else least), (largest if most is None else most)
        if value is not None and (least, most) != (None, None) and not low <= value <= high:  # refuses NaN too
            bounded = most is not None or value > high
            allowed = f"from {_readable(low)} to {_readable(high)}" if bounded else f"of at least {_readable(low)}"
            raise UserError(f"{option_name(field.name)} {value}: use a number {allowed}.")
        object.__setattr__(settings, field.name, value)


def check_names(settings: type, given: Mapping[str, Any], where: str = "") -> None:
    """Raises UserError for a name that is no setting, with the closest one; `where` begins the sentence."""
    names = list(field_types(settings))
    for name in given:
        if name not in names:
            close = get_close_matches(name.replace("-", "_"), names, n=1)
            hint = f"; did you mean {close[0]}?" if close else f". Settings: {', '.join(names)}."
            raise UserError(f"{where}unknown setting {name!r}{hint}")


def make(settings: type[Settings], given: Mapping[str, Any]) -> Settings:
    """The settings dataclass made of keyword arguments. Raises UserError for unknown names and unusable values."""
    check_names(settings, given)
    return settings(**given)


def lists_settings(settings: type) -> Callable[[Function], Function]:
    """A decorator: the function's signature names the settings that it takes as `**settings`, for `help`."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        listed = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in dataclasses.fields(settings)
        ]
        function.__signature__ = signature.replace(parameters=[*own, *listed])  # type: ignore[attr-defined]
        return function

    return decorate


def recorded(settings: Any) -> dict[str, Any]:
    """The settings that change the result, as a JSON object."""
    chosen = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.metadata.get("recorded")}
    found: dict[str, Any] = json.loads(json.dumps(chosen))
    return found


def parse(settings: type, name: str, text: str, *, clears: bool = True) -> Any:
    """A setting's value as written on a command line: `3`, `1e-4`, `true`, `a,b`, `1:0,2:0.5`.

    Args:
        clears: `none` and `null` stand for None in an optional setting that has no value of that name.

    Raises UserError when the text is not a value of the setting's type. An unknown name is left to `check_names`.
    """
    kind = field_types(settings).get(name)
    if kind is None:
        return text
    optional, kind = NoneType in typing.get_args(kind), without_none(kind)
    none_is_value = settings.__dataclass_fields__[name].metadata["none_is_value"]  # type: ignore[attr-defined]
    if clears and optional and not none_is_value and text.lower() in ("none", "null"):
        return None
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        if choices(kind):
            return text
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if typing.get_origin(kind) is dict:
            return {int(key): float(value) for key, value in (part.split(":") for part in parts)}
        return tuple(typing.get_args(kind)[0](part) for part in parts)
    except (ValueError, KeyError):
        raise UserError(refusal(option_name(name), text, kind)) from None


def refusal(option: str, value: Any, kind: Any) -> str:
    """A sentence for a value that is not of its option's type: what is allowed, and the closest choice."""
    close = get_close_matches(str(value), choices(kind), n=1)
    return f"{option} {value}: use {_describe(without_none(kind))}{f'; did you mean {close[0]}?' if close else '.'}"


def without_none(kind: Any) -> Any:
    """`int` of `int | None`; any other type as it is."""
    if isinstance(kind, UnionType) or typing.get_origin(kind) is typing.Union:
        return next(k for k in typing.get_args(kind) if k is not NoneType)
    return kind


def choices(kind: Any) -> tuple[str, ...]:
    """The values of a Literal, also of an optional one; empty for any other type."""
    kind = without_none(kind)
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _readable(number: float) -> str:
    """A bound as it is said: `1,000`, `0.5`, `2^64 - 1`."""
    if number in (inf, -inf) or number != int(number):
        return f"{number:g}"
    whole = int(number)
    power = (whole + 1).bit_length() - 1
    return f"2^{power} - 1" if power >= 32 and whole + 1 == 1 << power else f"{whole:,}"


def _describe(kind: Any) -> str:
    if allowed := choices(kind):
        return f"one of {', '.join(allowed)}"
    origin = typing.get_origin(kind)
    if origin is tuple:
        return "a list of integers" if typing.get_args(kind)[0] is int else "a list of strings"
    if origin is dict:
        return "weights by level, such as 1:0,2:0.5"
    return {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "a string")


def _typed(name: str, kind: Any, value: Any) -> Any:
    if value is None and NoneType in typing.get_args(kind):
        return None
    kind = without_none(kind)
    origin = typing.get_origin(kind)
    try:
        if origin is dict and isinstance(value, Mapping):
            return {int(k): float(v) for k, v in value.items()}
        if origin is tuple and isinstance(value, list | tuple):
            inner = typing.get_args(kind)[0]
            return tuple(_typed(name, inner, str(item) if isinstance(item, Path) else item) for item in value)
    except (TypeError, ValueError):
        pass
    else:
        if choices(kind):
            if value in choices(kind):
                return value
        elif kind is str and isinstance(value, Path):
            return _typed(name, kind, str(value))
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif origin is None and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            if isinstance(value, str) and value != (text := value.encode("utf-8", "replace").decode()):
                raise UserError(f"{option_name(name)} {text}: this is not UTF-8.")
            return value
    shown = value if isinstance(value, (str, int, float)) else repr(value)
    raise UserError(refusal(option_name(name), shown, kind))
