"""The model's code beside its weights, so that transformers loads it where this package is not installed.

``AutoConfig`` and ``AutoModelForImageTextToText`` find it by the configuration's ``auto_map``, with
``trust_remote_code=True``. The files are those of this folder; only the imports between them are made relative.
"""

from __future__ import annotations

import re
from pathlib import Path

_MODULES = (
    "alignment",
    "card",
    "configuration",
    "llm",
    "loss",
    "modeling",
    "packing",
    "prompt_lookup",
    "remote_code",
    "vision",
)
_SUFFIX = "_aligngpt"

AUTO_MAP = {
    "AutoConfig": f"configuration{_SUFFIX}.AlignGPTConfig",
    "AutoModelForImageTextToText": f"modeling{_SUFFIX}.AlignGPTForConditionalGeneration",
}


def write_code(folder: Path) -> None:
    """Write the model's code to ``folder``."""
    here = Path(__file__).parent
    inside_package = Path(__file__).stem == "remote_code"  # else this is such a copy
    for name in _MODULES:
        source = here / f"{name}{'' if inside_package else _SUFFIX}.py"
        if not source.is_file():  # transformers copies to its cache only what a class imports: for the model, all
            continue
        code = source.read_text("utf-8")
        code = re.sub(
            r"^(\s*from )aligntrain\.model\.(\w+) import", rf"\1.\2{_SUFFIX} import", code, flags=re.MULTILINE
        )
        (folder / f"{name}{_SUFFIX}.py").write_text(code, "utf-8")
