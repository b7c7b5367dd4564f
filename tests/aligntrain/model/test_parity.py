"""Parity with the official code: the same losses, gradients, gate weights and generated tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aligntrain import AlignGPTForConditionalGeneration
from aligntrain.tools.convert.convert import load_any

TOLERANCE = {"rtol": 0, "atol": 1e-5}
NAMES = {
    "levels": "level_embeddings.weight",
    "embed_tokens": "language_model.model.embed_tokens.weight",
    "layers.0.q_proj": "language_model.model.layers.0.self_attn.q_proj.weight",
    "lm_head": "language_model.lm_head.weight",
}


class Official:
    """One of the two official models, with the numbers that the official code computed."""

    def __init__(self, folder: Path) -> None:
        self.model = load_any(folder / "checkpoint")
        self.expected = load_file(folder / "expected.safetensors")
        self.seeds = json.loads((folder / "meta.json").read_text())["image_seeds"]

    def pixels(self, stage: str) -> Tensor:
        """One image per row with an image; the official loader invents one for text rows, which its model ignores."""
        rows = len(self.expected[f"{stage}.input_ids"])
        generator = np.random.default_rng(self.seeds[stage])
        pixels = torch.from_numpy(generator.standard_normal((rows, 3, 336, 336), dtype=np.float32))
        return pixels[(self.expected[f"{stage}.input_ids"] == -200).any(1)]

    def inputs(self, stage: str) -> dict[str, Tensor]:
        """The official token ids, with placeholders instead of -200 for the image."""
        config = self.model.config
        ids = self.expected[f"{stage}.input_ids"]
        labels = self.expected.get(f"{stage}.labels", torch.full_like(ids, -100))
        rows = []
        for row_ids, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
            row = [*zip(row_ids, row_labels, strict=True)]
            while row[-1] == (0, -100):
                row.pop()
            if -200 in row_ids:
                row.insert(1, (config.align_token_id, -100))
                at = row.index((-200, -100))
                row[at : at + 1] = [(config.image_token_id, -100)] * config.num_patches
            rows.append(row)
        length = max(map(len, rows))
        filled = torch.tensor([row + [(0, -100)] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {"input_ids": filled[..., 0], "labels": filled[..., 1], "attention_mask": mask}

    def check_gradients(self, stage: str) -> None:
        prefix = f"{stage}.grad."
        given = [name for name in self.expected if name.startswith(prefix)]
        assert given
        for name in given:
            short = name.removeprefix(prefix)
            ours = NAMES.get(short, f"gate.{short}" if short.startswith("mlp") else short)
            gradient = self.model.get_parameter(ours).grad
            torch.testing.assert_close(gradient, self.expected[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")

    def supervised_logits(self, inputs: dict[str, Any]) -> Tensor:
        """The logits that predict each label, row by row."""
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = self.model(**inputs).logits
        return logits[:, :-1][labels[:, 1:] != -100]


@pytest.fixture(scope="module", params=["parity-a", "parity-b"])
def official(parity: Path, request: pytest.FixtureRequest) -> Official:
    return Official(parity / request.param)


def test_pretraining(official: Official) -> None:
    official.model.zero_grad()
    # Levels count from 0 in the official code.
    inputs = official.inputs("s1") | {
        "pixel_values": official.pixels("s1"),
        "levels": official.expected["s1.levels"] + 1,
    }
    loss = official.model(**inputs).loss
    torch.testing.assert_close(loss, official.expected["s1.loss"][0], **TOLERANCE)
    loss.backward()
    official.check_gradients("s1")
    logits = official.supervised_logits(inputs)
    torch.testing.assert_close(logits, official.expected["s1.caption_logits"], **TOLERANCE)


def test_finetuning_with_and_without_images(official: Official) -> None:
    official.model.zero_grad()
    inputs = official.inputs("s2") | {"pixel_values": official.pixels("s2")}
    output = official.model(**inputs)
    torch.testing.assert_close(output.gate_dots, official.expected["s2.gate_dots"], **TOLERANCE)
    torch.testing.assert_close(output.gate_weights, official.expected["s2.gate_alpha"], **TOLERANCE)
    torch.testing.assert_close(output.loss, official.expected["s2.loss"][0], **TOLERANCE)
    output.loss.backward()
    official.check_gradients("s2")
    logits = official.supervised_logits(inputs)
    torch.testing.assert_close(logits, official.expected["s2.answer_logits"], **TOLERANCE)


def test_official_gate_is_not_ours(official: Official) -> None:
    # Our default leaves the answers out of the gate's text, so the official numbers need gate_text "all".
    assert official.model.config.gate_text == "all"
    official.model.config.gate_text = "instruction"
    try:
        with torch.no_grad():
            output = official.model(**official.inputs("s2"), pixel_values=official.pixels("s2"))
    finally:
        official.model.config.gate_text = "all"
    assert (output.gate_weights - official.expected["s2.gate_alpha"]).abs().max() > 1e-3


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation(official: Official, use_cache: bool) -> None:
    model: AlignGPTForConditionalGeneration = official.model.eval()
    inputs = official.inputs("inf") | {"pixel_values": official.pixels("inf")}
    del inputs["labels"]
    with torch.no_grad():
        last = model(**inputs, logits_to_keep=1).logits[:, 0]
    torch.testing.assert_close(last, official.expected["inf.last_logits"].reshape(last.shape), **TOLERANCE)
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False, use_cache=use_cache)
    assert ids[:, inputs["input_ids"].shape[1] :].tolist() == official.expected["inf.generated"].tolist()
    model.train()
