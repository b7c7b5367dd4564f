"""Train and run AlignGPT (arXiv 2405.14129): a LLaVA-like model that also learns how well a text fits its image.

Importing the package is cheap: torch and transformers load when a name is first used. Every name except StageConfig
also registers AlignGPT with transformers' Auto classes; so does ``import aligntrain.auto`` alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligntrain.inputs.processor import AlignGPTProcessor
    from aligntrain.model.configuration import AlignGPTConfig
    from aligntrain.model.modeling import AlignGPTForConditionalGeneration
    from aligntrain.stage import StageConfig
    from aligntrain.training.loop import TrainResult, train

_HOMES = {
    "AlignGPTConfig": "model.configuration",
    "AlignGPTForConditionalGeneration": "model.modeling",
    "AlignGPTProcessor": "inputs.processor",
    "StageConfig": "stage",
    "TrainResult": "training.loop",
    "train": "training.loop",
}

__all__ = [
    "AlignGPTConfig",
    "AlignGPTForConditionalGeneration",
    "AlignGPTProcessor",
    "StageConfig",
    "TrainResult",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "StageConfig":
        import_module(f"{__name__}.auto")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
