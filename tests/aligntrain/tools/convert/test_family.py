"""Official checkpoints of other LLMs than Llama, with other projectors, several scales, or LoRA adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from aligncurate.errors import UserError
from aligntrain import AlignGPTForConditionalGeneration
from aligntrain.tools.convert.convert import convert, load_any
from aligntrain.tools.convert.official import save_official
from aligntrain.tools.convert.projector import load_projector, save_projector
from aligntrain.tools.convert.tensors import read_tensors
from tests.support.small_models import ALIGN, IMAGE, PATCHES, SIDE, tiny

LLMS = {
    "aligngpt": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}},
    "aligngpt_gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "aligngpt_mistral": {"model_type": "mistral", "sliding_window": 16},
    "aligngpt_phi": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "aligngpt_qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
}
IDS = torch.tensor([[1, ALIGN, 5, *[IMAGE] * PATCHES, 6, 7, 8]])


def logits_of(model: AlignGPTForConditionalGeneration) -> torch.Tensor:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    size = model.config.pixel_size
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS, pixel_values=pixels, use_cache=False).logits
    return logits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert float(b.std()) > 0.05  # not all near zero, which would make any two alike
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LLMS)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    model = tiny(LLMS[kind], gate_text="all")
    save_official(model, tmp_path / "official")
    written = json.loads((tmp_path / "official" / "config.json").read_text())
    assert (written["model_type"], written["n_indicators"]) == (kind, 8)
    assert not any(
        re.match("projector|level_emb|gate[.]|language_model", name) for name in read_tensors(tmp_path / "official")
    )
    back = load_any(tmp_path / "official")
    assert back.config.text_config.model_type == LLMS[kind]["model_type"]
    for name in ("sliding_window", "partial_rotary_factor", "rope_parameters", "head_dim", "hidden_act"):
        before, after = (getattr(m.config.text_config, name, None) for m in (model, back))
        assert before == after, name
    close(logits_of(back), logits_of(model))


def test_gemma_scales_all_inputs_in_the_official_code(tmp_path: Path) -> None:
    """The naive twin: official weights, every input of the decoder times sqrt(hidden size), as in transformers 4."""
    model = tiny(LLMS["aligngpt_gemma"], gate_text="all").eval()
    save_official(model, tmp_path)
    official = {name: tensor.float() for name, tensor in read_tensors(tmp_path).items()}
    tower = CLIPVisionModel.from_pretrained(tmp_path / "clip_vision_tower").eval()
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        hidden = torch.nn.functional.linear(patches, official["mm_projector.0.weight"], official["mm_projector.0.bias"])
        hidden = torch.nn.functional.gelu(hidden)
        hidden = torch.nn.functional.linear(hidden, official["mm_projector.2.weight"], official["mm_projector.2.bias"])
        words = official["model.embed_tokens.weight"]
        text = words[torch.tensor([5, 6, 7, 8])]
        dots = hidden @ text.mean(0)
        gate = [official[f"gated_weight_layer.mlp.{i}.{kind}"] for i in (0, 2) for kind in ("weight", "bias")]
        alpha = (torch.nn.functional.gelu(dots @ gate[0].T + gate[1]) @ gate[2].T + gate[3]).softmax(-1)
        table = official["align_indicators.indicator_embs"]
        align = table[-1] + alpha @ table[:-1]
        inputs = torch.cat([words[[1]], align[None], words[[5]], hidden, words[[6, 7, 8]]])
        scale = model.config.text_config.hidden_size**0.5
        expected = model.language_model(inputs_embeds=inputs[None] * scale, use_cache=False).logits
    close(logits_of(load_any(tmp_path)), expected)


@pytest.mark.parametrize("llm", ["aligngpt", "aligngpt_gemma"])
@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_projectors(projector_type: str, llm: str, tmp_path: Path) -> None:
    model = tiny(LLMS[llm], projector_type=projector_type, gate_text="all")
    save_official(model, tmp_path / "official")
    names = {name for name in read_tensors(tmp_path / "official") if name.startswith("mm_projector")}
    if projector_type == "linear":
        assert names == {"mm_projector.weight", "mm_projector.bias"}
    back = load_any(tmp_path / "official")
    assert back.config.projector_type == projector_type
    close(logits_of(back), logits_of(model))
    # The projector alone, as the official pretraining saves it.
    save_projector(model, tmp_path / "projector.bin")
    model.language_model.save_pretrained(tmp_path / "llm")
    model.vision_tower.save_pretrained(tmp_path / "tower")
    ready = load_projector(tmp_path / "projector.bin", llm=tmp_path / "llm", vision=tmp_path / "tower")
    for name in ("projector.0.weight", "level_embeddings.weight"):
        torch.testing.assert_close(ready.state_dict()[name], model.state_dict()[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["fixed:1", "average", "local"])
def test_other_modes_come_back(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny(align_mode=mode, gate_text="instruction")
    save_official(model, tmp_path)
    assert "always mixes levels with the gate" in " ".join(capsys.readouterr().err.split())
    back = load_any(tmp_path)
    assert (back.config.align_mode, back.config.gate_text) == (mode, "instruction")
    close(logits_of(back), logits_of(model))


@pytest.mark.parametrize("key", ["s2", "use_s2"])
def test_several_scales(key: str, tmp_path: Path) -> None:
    model = tiny(s2_scales=[SIDE, 2 * SIDE], gate_text="all")
    save_official(model, tmp_path)
    change(tmp_path, {"s2": None, "use_s2": None, key: True, "s2_scales": f"{2 * SIDE},{SIDE}"})
    back = load_any(tmp_path)
    assert back.config.s2_scales == [SIDE, 2 * SIDE]
    close(logits_of(back), logits_of(model))


def change(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_siglip_has_no_class_token_whatever_the_setting(tmp_path: Path) -> None:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    model = AlignGPTForConditionalGeneration.from_components(
        tiny().language_model, SiglipVisionModel(vision), gate_text="all"
    )
    save_official(model, tmp_path)
    assert (tmp_path / "siglip_vision_tower" / "config.json").is_file()
    change(tmp_path, {"mm_vision_select_feature": "cls_patch"})
    assert load_any(tmp_path).config.num_patches == 9


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model_type": "llava_mpt"}, "model type 'llava_mpt' is not supported; supported are aligngpt, "),
        ({"model_type": None}, "model type 'None' is not supported"),
        ({"mm_use_im_start_end": True}, "start and end tokens around the image"),
        ({"image_aspect_ratio": "anyres_max_9"}, "cuts an image into tiles"),
        ({"mm_projector_type": "identity"}, "projector_type is 'identity'"),
    ],
)
def test_what_is_not_supported_is_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    save_official(tiny(), tmp_path / "official")
    change(tmp_path / "official", settings)
    with pytest.raises(UserError, match=sentence):
        convert(tmp_path / "official", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": "x"}, {"model_type": ["a"]}, {"rope_scaling": 3}, {"mm_vision_tower": 5},
        {"mm_vision_select_layer": "x"}, {"s2": True, "s2_scales": "a,b"},
    ],
)  # fmt: skip
def test_settings_of_wrong_types_are_one_sentence(settings: dict[str, Any], tmp_path: Path) -> None:
    save_official(tiny(), tmp_path / "official")
    change(tmp_path / "official", settings)
    with pytest.raises(UserError):
        convert(tmp_path / "official", tmp_path / "ours")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    save_official(tiny(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../../etc/passwd"}}))
    with pytest.raises(UserError, match="is not the name of a file beside it"):
        convert(tmp_path, tmp_path / "ours")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be loaded"):
        convert(tmp_path, tmp_path / "ours")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="it is a list, not an object"):
        convert(tmp_path, tmp_path / "ours")


@pytest.mark.filterwarnings("ignore::FutureWarning:peft")
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_lora_adapters(file: str, tmp_path: Path) -> None:
    """Adapters as LLaVA's training saves them; the oracle adds alpha/rank B A to each weight."""
    from peft import LoraConfig, get_peft_model

    model = tiny(gate_text="all")
    model.language_model.save_pretrained(tmp_path / "llm")
    save_official(model, tmp_path / "whole")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "lora"
    adapted.save_pretrained(folder, safe_serialization=file.endswith("safetensors"))
    if file.endswith("bin") and not (folder / file).is_file():  # newer versions of peft write safetensors only
        from safetensors.torch import load_file

        torch.save(load_file(folder / "adapter_model.safetensors"), folder / file)
        (folder / "adapter_model.safetensors").unlink()
    (folder / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    whole = read_tensors(tmp_path / "whole")
    trained = {name: t for name, t in whole.items() if re.match("mm_projector|align_indicators|gated_weight", name)}
    torch.save({f"base_model.model.{name}": t for name, t in trained.items()}, folder / "non_lora_trainables.bin")
    tower = tmp_path / "whole" / "clip_vision_tower"

    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            path = name.removesuffix(".weight")
            lora = {k: v for k, v in adapted.state_dict().items() if f".{path}.lora_" in k}
            if lora:
                a = next(v for k, v in lora.items() if "lora_A" in k)
                b = next(v for k, v in lora.items() if "lora_B" in k)
                parameter += 12 / 4 * b @ a
    close(logits_of(load_any(folder, llm=tmp_path / "llm", vision=tower)), logits_of(model))

    with pytest.raises(UserError, match="pass --llm, the LLM that they were trained on"):
        load_any(folder, vision=tower)
    tiny({"num_hidden_layers": 1}).language_model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"the adapters do not fit .*other; it has no .*layers\.1"):
        load_any(folder, llm=tmp_path / "other", vision=tower)
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(UserError, match="has no non_lora_trainables"):
        load_any(folder, llm=tmp_path / "llm", vision=tower)
