"""The histogram of scores as text: bins coloured by level, with the thresholds marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from aligncurate.levels import assign_levels
from aligncurate.progress import count
from aligncurate.verbs.inspect.result import Inspection

_HEIGHT, _MISMATCHED_HEIGHT = 8, 4  # lines of the two panels
_WIDEST_BIN = 4  # characters
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_RAMP = np.array([(214, 76, 84), (235, 160, 62), (104, 171, 117), (46, 134, 193)])  # from the worst level to the best


def format_score(value: float | None) -> str:
    """A score with three decimals; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 1_000 else f"{value:.4g}"


def level_style(level: int, levels: int) -> Style:
    """The colour of a level, on a ramp from red over amber and green to blue."""
    place = (level - 1) / max(1, levels - 1) * (len(_RAMP) - 1)
    red, green, blue = (int(np.interp(place, range(len(_RAMP)), _RAMP[:, channel])) for channel in range(3))
    return Style(color=f"#{red:02x}{green:02x}{blue:02x}")


@dataclass(frozen=True)
class _Axis:
    """The scores along the width of the drawing.

    Attributes:
        low, high: scores at the left and the right end.
        width: characters.
    """

    low: float
    high: float
    width: int

    @classmethod
    def of(cls, edges: Sequence[float], width: int) -> _Axis:
        """For the edges of all bins; the end bins are drawn as wide as the others, however far out they reach."""
        if len(edges) < 4:
            return cls(edges[0], edges[-1], width)
        step = (edges[-2] - edges[1]) / (len(edges) - 3)
        return cls(edges[1] - step, edges[-2] + step, width)

    @property
    def scores(self) -> NDArray[np.float64]:
        """The score at the middle of each character."""
        return self.low + (np.arange(self.width) + 0.5) * (self.high - self.low) / self.width

    def place(self, score: float) -> int:
        """The character in which a score lies."""
        share = (score - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return min(max(int(share * self.width), 0), self.width - 1)


class HistogramDrawing:
    """The histogram: scores coloured by level, below them those of mismatched pairs, thresholds and levels under both.

    A bin is one to four characters wide; on a terminal too narrow for that, neighbouring bins are drawn as one. Each
    panel has its own scale. A character has the colour of the level at its middle, and a threshold is marked in the
    character where it lies.
    """

    def __init__(self, inspection: Inspection) -> None:
        assert inspection.histogram is not None
        self._inspection, self._histogram = inspection, inspection.histogram

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        histogram, mismatched = self._histogram, self._inspection.mismatched
        labels = [_short(max(_merged(counts, 1))) for counts in (histogram.counts, histogram.mismatched) if counts]
        margin = max(len(label) for label in labels)
        room = max(8, options.max_width - margin - 3)
        merge = -(-len(histogram.counts) // room)
        bins = _merged(histogram.counts, merge)
        per_bin = min(_WIDEST_BIN, room // len(bins))
        axis = _Axis.of(histogram.edges, per_bin * len(bins))
        levels = self._levels_at(axis)
        total = len(self._inspection.cuts) + 1
        styles = [level_style(level, total) for level in levels] or [Style(color="cyan")] * axis.width

        yield Text("rows per bin, coloured by level" if levels else "rows per bin", style="dim")
        yield from _panel(np.repeat(bins, per_bin), _HEIGHT, styles, margin)
        if mismatched is not None:
            pairs = count(mismatched.pairs, "mismatched pair")
            yield Text(f"{pairs}: each image with another row's caption", style="dim")
            others = np.repeat(_merged(histogram.mismatched, merge), per_bin)
            yield from _panel(others, _MISMATCHED_HEIGHT, [Style(color="bright_black")] * axis.width, margin)
        yield from self._scale(axis, levels, styles, margin)

    def _levels_at(self, axis: _Axis) -> list[int]:
        """The level at the middle of each character; empty without thresholds."""
        values = np.array([cut.score for cut in self._inspection.cuts], np.float32)
        return assign_levels(axis.scores.astype(np.float32), values).tolist() if len(values) else []

    def _scale(self, axis: _Axis, levels: list[int], styles: Sequence[Style], margin: int) -> RenderResult:
        """A line of levels with the thresholds marked, and the axis with round numbers."""
        pad = " " * (margin + 3)
        if levels:
            line = ["━"] * axis.width
            starts = [axis.place(cut.score) for cut in self._inspection.cuts]
            for start in starts:
                line[start] = "┷"
            for number, (start, end) in enumerate(zip([-1, *starts], [*starts, axis.width], strict=True), 1):
                name = str(number)
                if end - start > len(name):
                    first = start + 1 + (end - start - 1 - len(name)) // 2
                    line[first : first + len(name)] = name
            yield Text.assemble(pad, *zip(line, styles, strict=True))
        ticks, names = ["─"] * axis.width, [" "] * (axis.width + 12)
        for score, name in _ticks(axis):
            place = axis.place(score)
            ticks[place] = "┬"
            names[place : place + len(name)] = name
        yield Text(f"{pad}{''.join(ticks)}", style="dim")
        yield Text(f"{pad}{''.join(names).rstrip()}", style="dim")
        edges, little = self._histogram.edges, 1e-3 * (axis.high - axis.low)  # more than rounding moves an edge
        outside = [f"down to {format_score(edges[0])}"] if edges[0] < axis.low - little else []
        outside += [f"up to {format_score(edges[-1])}"] if edges[-1] > axis.high + little else []
        if outside:
            yield Text(f"{pad}the end bins reach {' and '.join(outside)}", style="dim")


def _merged(counts: Sequence[int], merge: int) -> NDArray[np.int64]:
    """Counts of bins, of which `merge` neighbours become one."""
    return np.add.reduceat(np.asarray(counts, np.int64), np.arange(0, len(counts), merge))


def _panel(heights: NDArray[np.int64], lines: int, styles: Sequence[Style], margin: int) -> RenderResult:
    """Columns of the given heights, in eighths of a line; whatever is not zero shows."""
    largest = int(heights.max())
    eighths = np.ceil(heights * (8 * lines / largest)).astype(int) if largest else heights
    for line in reversed(range(lines)):
        label = _short(largest) if line == lines - 1 else ("0" if line == 0 else "")
        blocks = [_EIGHTHS[min(8, max(0, tall - 8 * line))] for tall in eighths]
        yield Text.assemble((f"{label:>{margin}} {'┤' if label else '│'} ", "dim"), *zip(blocks, styles, strict=True))


def _ticks(axis: _Axis) -> list[tuple[float, str]]:
    """Round numbers along the axis, at least eight characters apart."""
    if not axis.high > axis.low:
        return [(axis.low, format_score(axis.low))]
    rough = (axis.high - axis.low) * 8 / axis.width
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    digits = max(0, -int(np.floor(np.log10(step))))
    numbers = np.arange(np.ceil(axis.low / step), np.floor(axis.high / step) + 1) * step
    return [(float(n), f"{n + 0.0:.{digits}f}" if abs(n) < 1e6 else f"{n:.3g}") for n in numbers]


def _short(number: int) -> str:
    """A count in at most six characters: 999,999 or 1.2M."""
    number = int(number)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            scale = 1e3 if unit == "k" else size
            return f"{number / scale:.0f}{unit}" if number >= 100 * scale else f"{number / scale:.1f}{unit}"
    return f"{number:,}"
