"""The training benchmark measures what it says, on a model that is over in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligncurate.demo.scenes import make_scene, questions, write_conversations
from benchmarks.train import Shape, make_models, ours, stock

TINY = Shape(
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    pixels=28, batch_size=8, stock_batch=2, steps=2, dtype="fp32", max_length=1024, settings={"token_budget": 1024},
)  # fmt: skip


@pytest.mark.filterwarnings("default::UserWarning", "default::FutureWarning")  # of transformers and torch
def test_both_ways_train_on_all_of_their_samples(tmp_path: Path) -> None:
    data = [str(tmp_path / "data")]
    write_conversations(tmp_path / "data", 24, seed=7)
    texts = [text for number in range(24) for pair in questions(make_scene(7, number)) for text in pair]
    make_models(TINY, texts, tmp_path)
    for way in (ours, stock):
        found = way(TINY, tmp_path, data, None)
        assert len(found["tokens_per_s"]) == TINY.steps and min(found["tokens_per_s"]) > 0
        assert 0 <= found["data_wait"] < 1 and found["peak_bytes"] > 0
        # A row of ours is full but for a rest; a padded batch of unlike conversations is not.
        assert found["useful"] > 0.9 if way is ours else 0.3 < found["useful"] < 1
