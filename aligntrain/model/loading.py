"""Loading models through transformers: silences its output and turns its errors into UserErrors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from aligncurate.errors import UserError

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off transformers' progress bars and its warnings: new weights, old settings in others' checkpoints."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def model_errors(*sources: str | Path) -> Iterator[None]:
    """Turn any error while a model is loaded into a UserError that names its sources."""
    try:
        yield
    except UserError:
        raise
    except _LOAD_ERRORS as error:
        names = " and ".join(map(str, sources))
        raise UserError(f"{names}: the model cannot be loaded ({_first_line(error)}).") from error


def check_model_exists(name: str) -> None:
    """Raise UserError unless ``name`` is a folder or a model on the Hugging Face Hub.

    Asks the Hub once, and only if the model is not cached; loading would ask five times, with waits in between.
    """
    if Path(name).is_dir():
        return
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such folder; pass the folder of a model.")
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # anything can be wrong with the network
        raise UserError(
            f"{name}: no such folder, and not found on the Hugging Face Hub ({_first_line(error)})."
        ) from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
