"""The exported model: where generation stops, and settings of the LLM that transformers would not save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from aligntrain import train
from aligntrain.tools.generate import answer, load
from tests.support.stage_data import captions, finetuning, make_models, pretraining, questions

ENDS_IN_ITS_OWN_WAY = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM whose chat template ends answers with <|end|>, though its tokenizer's end token is </s>, like Phi."""
    path = tmp_path_factory.mktemp("export")
    make_models(path)
    tokenizer = AutoTokenizer.from_pretrained(path / "llm")
    tokenizer.chat_template = ENDS_IN_ITS_OWN_WAY
    unused = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)  # the LLM's table has no row to spare
    text = (path / "llm" / "tokenizer.json").read_text("utf-8")
    tokenizer.save_pretrained(path / "llm")
    data = json.loads(text)
    data["model"]["vocab"]["<|end|>"] = data["model"]["vocab"].pop(unused)
    (path / "llm" / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    again = AutoTokenizer.from_pretrained(path / "llm")
    again.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    again.save_pretrained(path / "llm")
    return path


@pytest.mark.parametrize(("template", "token"), [("chat", "<|end|>"), ("v1", "</s>")])
def test_generation_stops_at_the_end_that_was_learned(folder: Path, tmp_path: Path, template: str, token: str) -> None:
    start = {"llm": str(folder / "llm"), "vision": str(folder / "vision")}
    data = questions(tmp_path / "q.tar", 8)
    train(finetuning(start, data, tmp_path / "out", template=template, max_steps=1, max_length=256, token_budget=256))
    model, processor = load(tmp_path / "out")
    end = processor.tokenizer.convert_tokens_to_ids(token)
    said = [processor.tokenizer.convert_tokens_to_ids("a"), end]
    steps: list[int] = []

    def says(_: torch.nn.Module, __: object, logits: Tensor) -> Tensor:  # "a", then the end token, for ever
        steps.append(said[min(len(steps), 1)])
        return torch.nn.functional.one_hot(torch.tensor(steps[-1]), logits.shape[-1]).expand_as(logits).float()

    model.language_model.lm_head.register_forward_hook(says)
    assert answer(model, processor, [{"role": "user", "content": "what"}], max_new_tokens=20) == "a"
    assert len(steps) == 2
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(saved) >= {end, processor.tokenizer.eos_token_id}


def test_generation_settings_that_transformers_would_not_save(folder: Path, tmp_path: Path) -> None:
    """Vicuna's: the run would fail after its last step."""
    (tmp_path / "llm").mkdir()
    for file in (folder / "llm").iterdir():
        (tmp_path / "llm" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "llm" / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6})
    )
    start = {"llm": str(tmp_path / "llm"), "vision": str(folder / "vision")}
    train(pretraining(start, captions(tmp_path / "c.tar", 8), tmp_path / "out"))
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.temperature, saved.top_p) == (0.9, 0.6)


def test_a_model_that_does_not_fit_on_the_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, no model that looks complete, and a rerun that writes it."""
    start = {"llm": str(folder / "llm"), "vision": str(folder / "vision")}
    config = pretraining(start, captions(tmp_path / "c.tar", 8), tmp_path / "out")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match=r"the model cannot be written \(.*No space left on device\)"):
        train(config)
    assert not (tmp_path / "out/config.json").exists()
    monkeypatch.undo()
    train(config)
    assert (tmp_path / "out/model.safetensors").is_file()
