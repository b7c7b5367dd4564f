"""DataComp's uids: those of a dataset's rows, and the lists of them that DataComp publishes as `.npy` files.

A uid is 32 hex digits; in an array it is two u8, its first and its last 16 digits.
"""

from __future__ import annotations

import hashlib
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aligncurate.errors import UserError
from aligncurate.io.files import as_path, local_copy
from aligncurate.io.paths import AnyPath

Uids = NDArray[Any]

UID = np.dtype("u8,u8")
UID_COLUMNS = ("sha256", "caption", "uid")
"""The columns that `row_uids` needs, as far as a dataset has them."""

_DIGITS = "^[0-9a-fA-F]{32}$"
# What numpy raises for a header, which is Python source.
_HEADER_ERRORS = (ValueError, TypeError, EOFError, OverflowError, SyntaxError, RecursionError, MemoryError, TokenError)
_CHECKED = 1 << 20  # uids looked at at once


def row_uids(table: pa.Table) -> tuple[Uids, NDArray[np.bool_]]:
    """The uid of each row, [rows] of UID, and which rows have one.

    It is the row's own (32 hex digits in its column `uid`), or else the first half of sha256(image sha256 + caption).
    """
    uids = np.zeros(table.num_rows, UID)
    own = np.zeros(table.num_rows, bool)
    if "uid" in table.schema.names and _is_text(table.schema.field("uid").type):
        texts = table["uid"].combine_chunks().cast(pa.large_string())
        own = np.array(pc.fill_null(pc.match_substring_regex(texts, _DIGITS), False))
        digits = bytes.fromhex("".join(texts.filter(pa.array(own)).to_pylist()))
        uids[own] = np.frombuffer(digits, ">u8").astype(np.uint64).view(UID)
    made = ~own & np.asarray(pc.is_valid(table["sha256"]))
    rows = table.select(["sha256", "caption"]).filter(pa.array(made)).to_pylist()
    hashes = (hashlib.sha256(row["sha256"] + (row["caption"] or "").encode()).digest()[:16] for row in rows)
    uids[made] = np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64).view(UID)
    return uids, own | made


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


class UidList:
    """A file of uids, which stays on disk if it is sorted, as DataComp's are; else it is sorted in memory.

    Raises UserError if the file is not there or holds something else.
    """

    def __init__(self, path: str | AnyPath) -> None:
        try:
            with local_copy(as_path(path)) as file:  # which stays readable when it has been deleted
                uids = np.lib.format.open_memmap(file, mode="r")
        except FileNotFoundError:
            raise UserError(f"--uids {path}: there is no such file.") from None
        except IsADirectoryError:
            raise UserError(f"--uids {path}: this is a folder; give a .npy file.") from None
        except _HEADER_ERRORS as error:
            raise UserError(f"--uids {path}: not a .npy file of uids ({str(error).partition(chr(10))[0]}).") from None
        if uids.ndim != 1 or uids.dtype != UID:
            kind = f"{uids.dtype}, {uids.ndim} dimensions"
            raise UserError(f"--uids {path}: not a list of uids (it holds {kind}); DataComp's are pairs of u8.")
        self._uids = uids if _is_sorted(uids) else np.sort(uids)

    def holds(self, uids: Uids) -> NDArray[np.bool_]:
        """Which of `uids`, [n] of UID, are in the list: a binary search for all at once."""
        low = np.zeros(len(uids), np.int64)
        high = np.full(len(uids), len(self._uids), np.int64)
        while (searching := low < high).any():
            middle = (low + high) // 2
            smaller = searching & _less(self._uids[np.minimum(middle, len(self._uids) - 1)], uids)
            low = np.where(smaller, middle + 1, low)
            high = np.where(searching & ~smaller, middle, high)
        found = low < len(self._uids)
        found[found] = self._uids[low[found]] == uids[found]
        return found


def _less(left: Uids, right: Uids) -> NDArray[np.bool_]:
    return np.asarray((left["f0"] < right["f0"]) | ((left["f0"] == right["f0"]) & (left["f1"] < right["f1"])))


def _is_sorted(uids: Uids) -> bool:
    pieces = (uids[start : start + _CHECKED + 1] for start in range(0, len(uids), _CHECKED))
    return not any(_less(piece[1:], piece[:-1]).any() for piece in pieces)
