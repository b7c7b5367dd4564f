"""Strict JSON, which has no NaN and no bytes."""

from __future__ import annotations

import json
import math
from typing import Any


def _plain(value: Any) -> Any:
    """JSON for what JSON has no type for: bytes as hex, the rest as text."""
    return value.hex() if isinstance(value, bytes) else str(value)


_encode = json.JSONEncoder(ensure_ascii=False, default=_plain, allow_nan=False).encode


def strict_json(value: Any) -> str:
    """Strict JSON; floats that are not finite, which it does not have, are null."""
    try:
        return _encode(value)
    except ValueError:  # rare, so that only such rows are gone through in Python
        return _encode(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
