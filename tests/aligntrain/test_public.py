"""What `aligntrain` exports, and that importing it is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aligntrain


def test_the_public_names() -> None:
    assert aligntrain.__all__ == [
        "AlignGPTConfig",
        "AlignGPTForConditionalGeneration",
        "AlignGPTProcessor",
        "StageConfig",
        "TrainResult",
        "train",
    ]
    for name in aligntrain.__all__:
        assert getattr(aligntrain, name).__doc__
    assert set(aligntrain.__all__) <= set(dir(aligntrain))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = aligntrain.Nothing


def test_type_checkers_see_the_same_names() -> None:
    """Names are loaded on first use, so type checkers read them from imports that never run."""
    tree = ast.parse(Path(str(aligntrain.__file__)).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert sorted(typed) == aligntrain.__all__
    for name, module in typed.items():
        assert getattr(aligntrain, name).__module__ == module


def test_import_is_light() -> None:
    code = (
        "import sys, aligntrain; assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "import aligntrain.auto; from transformers import AutoConfig;"
        "assert AutoConfig.for_model('aligngpt').num_levels == 8"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
