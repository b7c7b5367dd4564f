"""What reaches the terminal: consoles that print safe text, and progress as a bar, or as plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment
from rich.text import Text

_LINE_EVERY = 10.0  # seconds between plain lines

PIPED_WIDTH = 100
"""Characters in a line when the output is not a terminal and COLUMNS is not set."""


def safe_text(text: str, *, keep: str = "") -> str:
    """Text of a file, row or path that cannot command a terminal or look like other text than it is.

    Control characters (ESC, C1, newlines), bidirectional and zero-width ones, and whatever else is not printable
    become escapes such as `\\x1b`.

    Args:
        keep: characters that stay; all spaces do.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


class _Safe:
    """A renderable whose text is safe, however it came in; newlines are the layout's and stay."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self._inner, options):
            yield Segment(text if control else safe_text(text, keep="\n"), style, control)


class _SafeHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Safe(each) for each in renderables]


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints safe text as it is: no markup, no highlighting, and `:bug:` stays.

    Text on one line (a key, a path) goes through `safe_text` too, which the console cannot do for newlines.
    """
    made = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    made.push_render_hook(_SafeHook())
    if not made.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        made.width = PIPED_WIDTH
    return made


console = make_console(stderr=True)
"""Where progress and notices go; results go to standard output."""


class Meter:
    """Counts the rows of a run and shows the progress; this one is quiet.

    Args:
        verb: what is being done.
        total: number of rows; None if it is not known beforehand.
        unit: what is counted.
    """

    def __init__(self, verb: str, total: int | None, unit: str = "pairs") -> None:
        self.verb, self.total, self.unit = verb, total, unit
        self.done = self.ok = self.failed = self.skipped = 0
        self.started = time.monotonic()
        self._lock = Lock()

    def skip(self, rows: int) -> None:
        """Count rows that an earlier run committed; they are part of the total, but not of the rate."""
        with self._lock:
            self.skipped += rows

    def add(self, rows: int, ok: int, failed: int) -> None:
        """Count rows that this run has done."""
        with self._lock:
            self.done += rows
            self.ok += ok
            self.failed += failed
            self._show()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """This run's rows per second."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    def _show(self) -> None:
        """Show the progress, in the way of the subclass."""

    def close(self) -> None:
        """Stop showing progress."""

    def text(self) -> str:
        """The progress in words: `120 of 500 pairs, 40/s, 3 failed, 9.5 s left`."""
        share = f" of {self.total:,}" if self.total is not None else ""
        failed = f", {self.failed:,} failed" if self.failed else ""
        left = ""
        if self.total is not None and self.done and self.total > self.done + self.skipped:
            rest = (self.total - self.done - self.skipped) / max(self.rate, 1e-9)
            left = f", {duration(rest)} left"
        return f"{self.done + self.skipped:,}{share} {self.unit}, {self.rate:,.0f}/s{failed}{left}"


class _Lines(Meter):
    """Prints a line every few seconds."""

    def __init__(self, verb: str, total: int | None, unit: str) -> None:
        super().__init__(verb, total, unit)
        self._last = self.started

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY:
            self._last = now
            print(f"{self.verb}: {self.text()}", file=sys.stderr, flush=True)


class _Bar(Meter):
    """A rich progress bar."""

    def __init__(self, verb: str, total: int | None, unit: str) -> None:
        super().__init__(verb, total, unit)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28, complete_style="cyan", finished_style="cyan"),
            TextColumn("{task.fields[text]}"),  # not rich's own estimate, which would count skipped rows
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(verb, total=total, text="")
        self._progress.start()

    def _show(self) -> None:
        self._progress.update(self._task, completed=self.done + self.skipped, text=self.text())

    def close(self) -> None:
        self._progress.stop()


@contextmanager
def meter(verb: str, total: int | None, *, quiet: bool = False, unit: str = "pairs") -> Iterator[Meter]:
    """A meter for where the output goes: a bar, lines, or nothing if `quiet`."""
    kind: Any = Meter if quiet else (_Bar if console.is_terminal else _Lines)
    progress: Meter = kind(verb, total, unit)
    try:
        yield progress
    finally:
        progress.close()


def notice(text: str, *, quiet: bool = False) -> None:
    """Print a note for the user, unless `quiet`, on one line. Markup and control characters are printed as text."""
    if not quiet:
        console.print(Text.assemble(("note: ", "yellow"), safe_text(text)), soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in words: `9.5 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {seconds % 60:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min"


def count(number: int, noun: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
