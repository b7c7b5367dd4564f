"""Foreign checkpoints converted and converted back, tensor for tensor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import aligntrain
from aligncurate.errors import UserError
from aligntrain import AlignGPTForConditionalGeneration, AlignGPTProcessor
from aligntrain.inputs.tokenizer import load_tokenizer
from aligntrain.tools.convert.convert import convert, load_any
from aligntrain.tools.convert.official import save_official
from aligntrain.tools.convert.projector import load_projector, save_projector
from aligntrain.tools.convert.tensors import read_tensors
from aligntrain.tools.generate import answer, load
from tests.support.small_models import SIDE, tiny

Tensors = dict[str, torch.Tensor]


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(params=["parity-a", "parity-b"])
def official(parity: Path, request: pytest.FixtureRequest) -> Path:
    return parity / request.param / "checkpoint"


def test_official_there_and_back(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(official, tmp_path / "ours") == "official AlignGPT to a model"
    assert "no tokenizer, so the model gets no processor" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="the model has no processor"):
        load(tmp_path / "ours")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").config.gate_text == "all"
    assert convert(tmp_path / "ours", tmp_path / "official") == "a model to the official layout"
    # The official file also has inverse frequencies, which are recomputed here and must be the same.
    assert_same(read_tensors(tmp_path / "official"), read_tensors(official))
    written, read = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "official", official))
    own = {"transformers_version", "image_aspect_ratio", "tokenizer_model_max_length", "tokenizer_padding_side"}
    own |= {"mm_vision_tower", "pretraining_tp", "use_cache"}
    assert {k: written.get(k) for k in read.keys() - own} == {k: read[k] for k in read.keys() - own}
    again = load_any(tmp_path / "official", vision=official.parent / "clip-tiny-336")
    assert_same(again.state_dict(), load_any(official).state_dict())


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards(suffix: str, official: Path, tmp_path: Path) -> None:
    tensors = read_tensors(official)
    shutil.copy(official / "config.json", tmp_path)
    stem = "pytorch_model" if suffix == ".bin" else "model"
    names = sorted(tensors)
    files = {name: f"{stem}-{1 + i % 3:05d}-of-00003{suffix}" for i, name in enumerate(names)}
    for file in set(files.values()):
        shard = {name: tensors[name].contiguous() for name in names if files[name] == file}
        torch.save(shard, tmp_path / file) if suffix == ".bin" else save_file(shard, tmp_path / file)
    (tmp_path / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    model = load_any(tmp_path, vision=official.parent / "clip-tiny-336")
    assert_same(model.state_dict(), load_any(official).state_dict())


def test_projector_there_and_back(parity: Path, tmp_path: Path) -> None:
    file = parity / "parity-a" / "mm_projector_align.bin"
    config = json.loads((parity / "parity-a" / "checkpoint" / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    LlamaForCausalLM(LlamaConfig(**{size: config[size] for size in sizes})).save_pretrained(tmp_path / "llm")
    tower = parity / "parity-a" / "clip-tiny-336"
    assert "with an LLM" in convert(file, tmp_path / "ours", llm=tmp_path / "llm", vision=tower)
    convert(tmp_path / "ours", tmp_path / "back.bin")
    back, given = (torch.load(f, weights_only=True) for f in (tmp_path / "back.bin", file))
    assert_same(back, given)
    model = load_projector(file, llm=tmp_path / "llm", vision=tower, align_mode="local")
    assert (model.config.num_levels, model.config.projector_type, model.config.align_mode) == (8, "mlp2x_gelu", "local")
    with pytest.raises(UserError, match="contains only a projector"):
        convert(file, tmp_path / "x")
    torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / "other.bin")
    with pytest.raises(UserError, match="contains no mm_projector"):
        load_projector(tmp_path / "other.bin", llm=tmp_path / "llm", vision=tower)
    LlamaForCausalLM(LlamaConfig(**{s: config[s] for s in sizes} | {"hidden_size": 32})).save_pretrained(
        tmp_path / "llm2"
    )
    with pytest.raises(UserError, match=r"projector.0.weight has shape \(64, 32\), the model expects \(32, 32\)"):
        load_projector(file, llm=tmp_path / "llm2", vision=tower)


def llava(dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=2010,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=2000, image_seq_length=9)
    return LlavaForConditionalGeneration(config).to(dtype)


def same_answers(ours: Any, theirs: LlavaForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, *[2000] * 9, 6, 7, 8]])
    ids_ours = ids.masked_fill(ids == 2000, ours.config.image_token_id)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(ours(input_ids=ids_ours, pixel_values=pixels).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["old", "new"])
def test_hugging_face_llava(layout: str, parity: Path, tmp_path: Path) -> None:
    theirs = llava()
    folder = tmp_path / "llava"
    theirs.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    if layout == "old":
        renamed = {}
        for name, tensor in tensors.items():
            for new, old in (
                ("model.language_model.", "language_model.model."),
                ("lm_head.", "language_model.lm_head."),
                ("model.vision_tower.", "vision_tower.vision_model."),
                ("model.multi_modal_projector.", "multi_modal_projector."),
            ):
                if name.startswith(new):
                    renamed[old + name.removeprefix(new)] = tensor
                    break
        assert len(renamed) == len(tensors)
        tensors = renamed
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in (parity / "templates" / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    assert convert(folder, tmp_path / "ours") == "LLaVA to a model"
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert ours.config.align_mode == "none"
    same_answers(ours, theirs)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(processor, AlignGPTProcessor)
    assert (processor.align, processor.num_patches, processor.pixel_size) == (False, 9, SIDE)
    assert processor.image_token_id == ours.config.image_token_id == 2000


@pytest.mark.parametrize("tower", ["inside", "beside"])
def test_official_llava_there_and_back(tower: str, tmp_path: Path) -> None:
    theirs = llava(torch.float16)
    state = theirs.state_dict()
    official = {}
    for name, tensor in state.items():
        for new, old in (
            ("model.language_model.", "model."),
            ("lm_head.", "lm_head."),
            ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
            ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ):
            if name.startswith(new) and not (tower == "beside" and "vision_tower" in new):
                official[old + name.removeprefix(new)] = tensor
                break
    folder = tmp_path / "llava-v1.5"
    folder.mkdir()
    torch.save(official, folder / "pytorch_model.bin")
    text = theirs.config.text_config
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llava",
                "architectures": ["LlavaLlamaForCausalLM"],
                **{k: getattr(text, k) for k in ("vocab_size", "hidden_size", "intermediate_size")},
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "rope_theta": 5000.0,
                "rms_norm_eps": 1e-6,
                "mm_projector_type": "mlp2x_gelu",
                "mm_vision_select_layer": -2,
                "mm_vision_tower": "openai/tower",
                "image_aspect_ratio": "pad",
            }
        )
    )
    vision = CLIPVisionModel(theirs.config.vision_config).half()
    vision.load_state_dict(theirs.model.vision_tower.state_dict())
    vision.save_pretrained(tmp_path / "tower")
    ours = load_any(folder)
    assert (ours.config.align_mode, ours.dtype) == ("none", torch.float16)
    ours.config.image_token_id = 2000
    same_answers(ours.float(), theirs.float())
    save_official(ours.half(), tmp_path / "back")
    back = read_tensors(tmp_path / "back")
    assert {k for k in back if k not in official and "vision_tower" not in k} == {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)
    }
    for name, tensor in official.items():
        assert torch.equal(back[name], tensor), name


def test_wrong_shapes_and_names_are_named(official: Path, tmp_path: Path) -> None:
    tower = official.parent / "clip-tiny-336"
    shutil.copy(official / "config.json", tmp_path)
    tensors = read_tensors(official)
    tensors["model.norm.weight"] = torch.ones(63)
    tensors["gated_weight_layer.extra"] = torch.ones(2)
    del tensors["lm_head.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        load_any(tmp_path, vision=tower)
    for part in (
        "language_model.model.norm.weight has shape (63,), the model expects (64,)",
        "gate.extra (2,) is not in the model",
        "language_model.lm_head.weight (320, 64) is missing",
    ):
        assert part in str(error.value)
    # A model saved after pretraining has no gate; it gets a new one.
    tensors = {k: v for k, v in read_tensors(official).items() if not k.startswith("gated_weight_layer")}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert load_any(tmp_path, vision=tower).gate.mlp[0].weight.isfinite().all()


def test_not_a_checkpoint(official: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_any(tmp_path)
    shutil.copy(official / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_any(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "text_config": {}}))
    with pytest.raises(UserError, match="neither AlignGPT nor LLaVA"):
        load_any(tmp_path)


class NotATensor:
    """An object that only unsafe loading would restore."""


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "objects"])
def test_a_bin_that_is_not_tensors_is_a_user_error(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "projector.bin"
    if content is None:
        torch.save({"mm_projector.weight": NotATensor()}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"projector\.bin is damaged or contains more than tensors"):
        convert(file, tmp_path / "ours", llm=tmp_path, vision=tmp_path)


def test_transformers_errors_become_user_errors(official: Path, tmp_path: Path) -> None:
    """An error deep inside transformers, such as a missing tower, becomes one sentence that names the checkpoint."""
    tmp_path.joinpath("config.json").write_text((official / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").symlink_to(official / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"{tmp_path}: the model cannot be loaded"):
        convert(tmp_path, tmp_path / "ours", vision=Path(__file__).parent)
    with pytest.raises(UserError, match="not a name: no such folder"):
        convert(tmp_path, tmp_path / "ours", vision="not a name")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="the model cannot be loaded"):
        convert(tmp_path, tmp_path / "ours")


def test_llms_that_the_official_code_lacks(tmp_path: Path) -> None:
    model = tiny({"model_type": "granite"})
    with pytest.raises(UserError, match="supports llama, gemma, mistral, phi, qwen2, not granite"):
        save_official(model, tmp_path)
    save_projector(model, tmp_path / "p.bin")
    assert "align_indicators.indicator_embs" in torch.load(tmp_path / "p.bin", weights_only=True)
    with pytest.raises(UserError, match="supports llama, mistral, not phi"):
        save_official(tiny({"model_type": "phi"}, align_mode="none"), tmp_path)


@pytest.mark.parametrize("template", ["v1", "chat"])
def test_a_model_that_was_there_and_back_answers_as_before(template: str, tmp_path: Path) -> None:
    builtin = Path(aligntrain.__file__).parent / "builtin"
    llm, vision = str(builtin / "tiny-llm"), str(builtin / "tiny-vision")
    torch.manual_seed(0)
    tokenizer = load_tokenizer(llm)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    processor = AlignGPTProcessor.from_components(tokenizer, vision, template=template, gate_text="all")
    model = AlignGPTForConditionalGeneration.from_components(
        llm,
        vision,
        image_token_id=processor.image_token_id,
        align_token_id=processor.align_token_id,
        gate_text="all",
    )
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "official") == "a model to the official layout"
    official = AutoTokenizer.from_pretrained(tmp_path / "official")
    assert len(official) == len(AutoTokenizer.from_pretrained(llm)) <= model.config.text_config.vocab_size
    assert convert(tmp_path / "official", tmp_path / "back") == "official AlignGPT to a model"

    # In a new process, where nothing has registered the model yet: no question about custom code.
    command = [sys.executable, "-m", "aligncurate", "convert", tmp_path / "ours", tmp_path / "again"]
    run = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.stderr == "" and "custom code" not in run.stdout

    image = Image.new("RGB", (48, 48), "red")
    turns = [{"role": "user", "content": "what is in the picture?"}]
    answers = [answer(*load(tmp_path / name), turns, image, max_new_tokens=8) for name in ("ours", "back")]
    assert answers[0] == answers[1]
    read = AutoProcessor.from_pretrained(tmp_path / "back")
    assert (read.template, read.image_mode, read.chat_template) == (template, "pad", processor.chat_template)


def test_generation_settings_and_modes_of_converted_files(tmp_path: Path) -> None:
    """Vicuna has a temperature without sampling, which transformers does not save; answers end with their template's
    token; files follow the umask."""
    builtin = Path(aligntrain.__file__).parent / "builtin"
    shutil.copytree(builtin / "tiny-llm", tmp_path / "llm")
    vicuna = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(vicuna))
    towers = {"llm": tmp_path / "llm", "vision": builtin / "tiny-vision"}
    processor = AlignGPTProcessor.from_components(tmp_path / "llm", builtin / "tiny-vision")
    model = AlignGPTForConditionalGeneration.from_components(
        *towers.values(), image_token_id=processor.image_token_id, align_token_id=processor.align_token_id
    )
    save_projector(model, tmp_path / "projector.bin")
    umask = os.umask(0o022)
    try:
        convert(tmp_path / "projector.bin", tmp_path / "ours", **towers)
        convert(tmp_path / "ours", tmp_path / "official")
        (tmp_path / "official" / "generation_config.json").write_text(json.dumps(vicuna))
        convert(tmp_path / "official", tmp_path / "back")
        modes = {path.stat().st_mode & 0o777 for path in tmp_path.glob("[!l]*/**/*.safetensors")}
    finally:
        os.umask(umask)
    assert modes == {0o644} and len(list(tmp_path.glob("official/**/*.safetensors"))) == 2
    for name in ("ours", "back"):
        saved = GenerationConfig.from_pretrained(tmp_path / name)
        assert (saved.temperature, saved.top_p) == (0.9, 0.6)
        assert set(saved.eos_token_id) == {7, processor.tokenizer.eos_token_id}


def test_other_files_are_not_overwritten(official: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.txt\)"):
        convert(official, tmp_path)
    (tmp_path / "projector.bin").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert(official, tmp_path / "projector.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["projector.bin", "thesis.txt"]
    with pytest.raises(UserError, match="no such file or folder"):
        convert(tmp_path / "nothing", tmp_path / "ours")


@pytest.mark.parametrize("option", ["llm", "vision"])
def test_the_built_in_models_convert_nothing(option: str, official: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--{option} tiny: the built-in models are for new training only; pass the"):
        convert(official, tmp_path / "out", **{option: "tiny"})
    assert not (tmp_path / "out").exists()
