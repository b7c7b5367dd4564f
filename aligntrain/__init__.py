"""Train and run AlignGPT (arXiv 2405.14129): a LLaVA-like model that knows how well its texts fit their images.

Importing the package costs nothing: a name is loaded from its module when it is first used. Every name but StageConfig
registers AlignGPT with transformers' Auto classes; so does ``import aligntrain.model.auto`` alone.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AlignGPTConfig": "model.configuration",
    "AlignGPTForConditionalGeneration": "model.modeling",
    "AlignGPTProcessor": "inputs.processor",
    "StageConfig": "stage",
    "Summary": "training.loop",
    "train": "training.loop",
}

__all__ = ["AlignGPTConfig", "AlignGPTForConditionalGeneration", "AlignGPTProcessor", "StageConfig", "Summary", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "StageConfig":
        import_module(f"{__name__}.model.auto")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
