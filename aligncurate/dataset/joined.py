"""Several datasets opened as one, for verbs that take more than one."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError

