"""What users of transformers expect of a model: its code and card beside it, and the usual methods and arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoProcessor, pipeline

import aligntrain
from aligntrain import AlignGPTForConditionalGeneration, AlignGPTProcessor
from tests.support.small_models import ALIGN, IMAGE, PATCHES, SIDE, tiny

PIXELS = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModelForImageTextToText
folder, inputs, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert config.num_levels == model.config.num_levels == 4, config
ours = [name for name in sys.modules if name.partition(".")[0] in ("aligntrain", "aligncurate")]
assert not ours, ours
model.save_pretrained(again)
batch = torch.load(inputs)
with torch.no_grad():
    torch.save(model(**batch).logits, inputs)
"""


def test_the_code_beside_a_model_runs_without_this_package(tmp_path: Path) -> None:
    model = tiny(num_levels=4, attention="sdpa").eval()
    # As after distributed training, where the tensors do not come from the model itself.
    model.save_pretrained(tmp_path / "model", state_dict=model.state_dict())
    batch = {"input_ids": torch.tensor([[1, ALIGN, 5, *[IMAGE] * PATCHES, 6, 7]]), "pixel_values": PIXELS}
    with torch.no_grad():
        expected = model(**batch).logits
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hub")}
    folder = tmp_path / "model"
    for again in ("again", "and-again"):  # a model that was loaded so is saved with its code too
        torch.save(batch, tmp_path / "inputs.pt")
        command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / again)]
        subprocess.run(command, check=True, cwd=tmp_path, env=environment)
        torch.testing.assert_close(torch.load(tmp_path / "inputs.pt"), expected, rtol=1e-5, atol=1e-5)
        folder = tmp_path / again


def test_model_card(tmp_path: Path) -> None:
    model = tiny(num_levels=4)
    model.config.text_config._name_or_path = "lmsys/vicuna-7b-v1.5"
    model.config.vision_config._name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert card.data.base_model == ["lmsys/vicuna-7b-v1.5"]
    assert "4 levels, mode gated" in card.text
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_image_features_are_the_projected_patches() -> None:
    model = tiny(attention="sdpa").eval()
    features = model.get_image_features(PIXELS, vision_feature_layer=-2)
    with torch.no_grad():
        patches = model.vision_tower(PIXELS, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.equal(features.last_hidden_state, patches)
        assert torch.equal(torch.stack(features.pooler_output), model.projector(patches))


def test_labels_may_be_the_input_ids() -> None:
    model = tiny().eval()
    ids = torch.tensor([[1, ALIGN, 5, *[IMAGE] * PATCHES, 6, 7]])
    labels = ids.masked_fill((ids == ALIGN) | (ids == IMAGE), -100)
    mask = torch.ones_like(ids)
    losses = [model(input_ids=ids, pixel_values=PIXELS, labels=x, gate_mask=mask).loss for x in (ids, labels)]
    assert torch.equal(*losses)


def test_prompt_lookup_never_proposes_an_image() -> None:
    """The prompt ends with a token that an image followed before, so that lookup would propose patches."""
    model = tiny(attention="sdpa").eval()
    ids = torch.tensor([[1, ALIGN, 7, *[IMAGE] * PATCHES, 6, 8, 7]])
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(input_ids=ids, pixel_values=PIXELS, **how)
    fast = model.generate(input_ids=ids, pixel_values=PIXELS, prompt_lookup_num_tokens=3, **how)
    assert torch.equal(plain, fast)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the built-in LLM and vision tower with its processor."""
    builtin = Path(aligntrain.__file__).parent / "builtin"
    llm, vision = str(builtin / "tiny-llm"), str(builtin / "tiny-vision")
    processor = AlignGPTProcessor.from_components(llm, vision)
    torch.manual_seed(0)
    model = AlignGPTForConditionalGeneration.from_components(
        llm, vision, image_token_id=processor.image_token_id, align_token_id=processor.align_token_id
    )
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_pipeline(folder: Path) -> None:
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.new("RGB", (40, 30), "red")},
                {"type": "text", "text": "what is in the picture?"},
            ],
        }
    ]
    run = pipeline("image-text-to-text", model=str(folder), processor=str(folder))
    result = run(text=messages, max_new_tokens=4, return_full_text=False)
    assert isinstance(result[0]["generated_text"], str)


def test_arguments_of_the_processor(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (40, 30), "red")
    tensors = processor(images=image, text="<image> a red square")
    arrays = processor(images=image, text="<image> a red square", return_tensors="np")
    lists = processor(images=image, text="<image> a red square", return_tensors=None)
    for name, tensor in tensors.items():
        assert arrays[name].tolist() == tensor.tolist() == lists[name]
    with pytest.raises(TypeError, match="paddingside"):
        processor(text="a", paddingside="left")
    with pytest.raises(ValueError, match="truncation is not supported"):
        processor(text="a", truncation=True)
    with pytest.raises(ValueError, match="return_tensors='tf' is not supported"):
        processor(text="a", return_tensors="tf")
    with pytest.raises(ValueError, match="different lengths"):
        processor(text=["a", "a much longer prompt"], padding=False)
    assert processor(text=["a", "b"], padding=False)["input_ids"].shape == (2, 2)


def test_arguments_of_the_chat_template(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": "hello"}]
    template = "{{ greeting }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert processor.apply_chat_template(turns, chat_template=template, greeting="oh") == "oh hello"
    with pytest.raises(ValueError, match="truncation is not supported"):
        processor.apply_chat_template(turns, tokenize=True, processor_kwargs={"truncation": True})
    with pytest.raises(ValueError, match="continue_final_message is not supported"):
        processor.apply_chat_template(turns, continue_final_message=True)
