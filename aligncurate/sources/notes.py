"""Short notices on the inputs of a run: what is read, which splits are mixed, what is left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from aligncurate.io import storage
from aligncurate.sources.base import Shard, Source

_EXAMPLES = 3
_SPLIT = re.compile(
    r"(?:^|[^a-z])(train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?|dev|eval(?:uation)?)(?:[^a-z]|$)", re.IGNORECASE
)


def some(items: Sequence[str]) -> str:
    """The items in a sentence: all of a few, else the first and how many more."""
    more = len(items) - _EXAMPLES
    return f"{', '.join(items[:_EXAMPLES])} and {more:,} more" if more > 0 else ", ".join(items)


def files_read(files: Mapping[str, int | None]) -> str:
    """The files that are read, with their rows where these are known."""
    names = _below(list(files))
    known = ["" if rows is None else f" ({_count(rows, 'row')})" for rows in files.values()]
    total = sum(rows or 0 for rows in files.values())
    with_rows = f" with {_count(total, 'row')}" if total else ""
    return f"reading {len(files):,} inputs{with_rows}: {some([a + b for a, b in zip(names, known, strict=True)])}."


def splits_mixed(files: Mapping[str, int | None]) -> list[str]:
    """A notice if the files belong to several splits, such as train and test."""
    counts: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for name, number in zip(_below(list(files)), files.values(), strict=True):
        if match := _SPLIT.search(name):
            counts[match[1].lower()] += 1
            rows[match[1].lower()] += number or 0
    if len(counts) < 2:
        return []
    listed = [f"{n} ({_count(rows[n], 'row') if rows[n] else _count(c, 'file')})" for n, c in counts.items()]
    return [f"the splits {', '.join(listed)} become one dataset; to keep them apart, give one of them by name."]


def skipped(causes: Sequence[str]) -> list[str]:
    """Notices of the files that are skipped: a few with their cause, and the number of the others."""
    more = len(causes) - _EXAMPLES
    rest = [f"skipped {more:,} more files."] if more > 0 else []
    return [f"skipped {cause}." for cause in causes[:_EXAMPLES]] + rest


def left_out(path: str, others: Sequence[str], below: Sequence[str]) -> list[str]:
    """Notices of what a folder has beside its data: zip archives, which may hold the images, and folders with data."""
    notices = []
    if zips := [storage.basename(file) for file in others if file.lower().endswith(".zip")]:
        notices.append(f"{path}: {some(zips)} {'is' if len(zips) == 1 else 'are'} not read; unpack the images there.")
    if below:
        notices.append(
            f"{path}: folders inside it that hold data are not read: {some(below)}; to read them, give their names."
        )
    return notices


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _below(files: Sequence[str]) -> list[str]:
    """The files without the folder that they have in common."""
    first, last = min(files).split("/")[:-1], max(files).split("/")[:-1]
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    depth = 0 if depth == 1 and files[0].startswith("/") else depth  # they have only the root in common
    return ["/".join(file.split("/")[depth:]) for file in files]


def limit_taken(source: Source, shards: Sequence[Shard], limit: int) -> str | None:
    """What `--limit` takes, if some of the files are not read."""
    taken = list(dict.fromkeys(shard.uri for shard in shards))
    all_files = list(dict.fromkeys(shard.uri for shard in source.shards))
    if len(taken) == len(all_files):
        return None
    names = some([storage.basename(file) for file in taken])
    return f"--limit {limit:,} takes the first pairs, from {len(taken):,} of {len(all_files):,} files ({names})."
