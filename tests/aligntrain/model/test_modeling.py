"""The model as a Hugging Face model: padding, packing, loss, generation, saving, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from aligntrain import AlignGPTConfig, AlignGPTForConditionalGeneration
from aligntrain.model.loss import token_losses
from aligntrain.model.packing import can_pack, positions_of, sequence_ids_of
from tests.support import naive_alignment
from tests.support.small_models import ALIGN, BOS, IMAGE, PATCHES, SIDE, Sample, batch, gradients, packed, tiny

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("levels", [None, torch.tensor([1, 7])], ids=["finetune", "pretrain"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_equals_right_and_alone(
    attention: str, levels: torch.Tensor | None, samples: list[Sample], pixels: torch.Tensor
) -> None:
    model = tiny(attention=attention)
    results = []
    for side in ("right", "left"):
        output = model(**batch(samples, side), pixel_values=pixels, levels=levels)
        output.loss.backward()
        results.append((output.token_losses, gradients(model)))
    alone = []
    for number, sample in enumerate(samples):
        own = slice(number // 2, number // 2 + sample.has_image)
        output = model(
            **batch([sample]),
            pixel_values=pixels[own],
            levels=None if levels is None else levels[own],
            num_items_in_batch=7,
        )
        output.loss.backward()
        alone.append(output.token_losses)
    results.append((torch.cat(alone), gradients(model)))
    for losses, grads in results[1:]:
        torch.testing.assert_close(losses, results[0][0], **CLOSE)
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(grads.get(name, torch.zeros_like(gradient)), gradient, **CLOSE, msg=name)


@pytest.mark.parametrize(
    ("attention", "window"),
    [("eager", None), ("eager", 12), ("sdpa", None), ("sdpa", 12), ("flex_attention", 12)],
)
# transformers' own use of flex attention.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_packed_equals_separate(
    attention: str, window: int | None, samples: list[Sample], pixels: torch.Tensor
) -> None:
    text: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
    if window is not None:
        text |= {"model_type": "mistral", "sliding_window": window}
    model = tiny(text, attention=attention)
    rows, row = batch(samples), packed(samples)
    if attention != "flex_attention":  # no backward pass on CPUs
        results = []
        for inputs in (rows, row):
            output = model(**inputs, pixel_values=pixels)
            output.loss.backward()
            results.append((output.token_losses, gradients(model)))
        torch.testing.assert_close(results[1][0], results[0][0], **CLOSE)
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(results[1][1][name], gradient, **CLOSE, msg=name)
    for inputs in (rows, row):
        del inputs["labels"]
    # Compiling flex attention takes a minute on a CPU and does not change its mask.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(**rows, pixel_values=pixels).logits[rows["attention_mask"].bool()]
        logits = model(**row, pixel_values=pixels).logits[row["sequence_ids"] > 0]
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_packed_equals_separate_in_gradients_of_flex_attention(
    samples: list[Sample], pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch refuses because it has no compiled backward pass for CPUs; the uncompiled one works there too."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    model = tiny({"hidden_size": 64, "intermediate_size": 64}, attention="flex_attention")
    results = []
    with torch.compiler.set_stance("force_eager"):
        for inputs in (batch(samples), packed(samples)):
            output = model(**inputs, pixel_values=pixels)
            output.loss.backward()
            results.append((output.token_losses, gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], **CLOSE)
    assert any(name.endswith("k_proj.weight") and grad.any() for name, grad in results[0][1].items())
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, **CLOSE, msg=name)


def test_can_pack_runs_on_a_cpu_whatever_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention needs a GPU, and can_pack runs before the model is moved there; flex attention takes a minute."""
    model = tiny(attention="flex_attention").language_model
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it ran")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", refuse)
    assert can_pack(model)
    assert model.config._attn_implementation == "flex_attention"


def test_packed_rows_of_a_batch(samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny(attention="sdpa")
    first, second = packed(samples[:2], padding=0), packed(samples[2:], padding=0)
    length = first["input_ids"].shape[1]
    rows = {
        name: torch.stack(
            [a[0], torch.cat([second[name][0], second[name].new_full((length - second[name].shape[1],), filler)])]
        )
        for (name, a), filler in zip(first.items(), (0, -100, 0), strict=True)
    }
    output = model(**rows, pixel_values=pixels)
    expected = model(**batch(samples), pixel_values=pixels)
    torch.testing.assert_close(output.token_losses, expected.token_losses, **CLOSE)
    torch.testing.assert_close(output.gate_weights, expected.gate_weights, **CLOSE)


def test_no_label_crosses_samples(samples: list[Sample], pixels: torch.Tensor) -> None:
    # The first token of a sample is not predicted from the sample before it, even if it is labelled.
    model = tiny()
    samples[1].labels[0] = samples[1].ids[0]
    assert len(model(**packed(samples), pixel_values=pixels).token_losses) == 7


def test_positions() -> None:
    ids = torch.tensor([sequence_ids_of([3, 1, 2], 8), [0, 0, 1, 1, 1, 2, 2, 2]])
    assert ids[0].tolist() == [1, 1, 1, 2, 3, 3, 0, 0]
    assert positions_of(ids).tolist() == [[0, 1, 2, 0, 0, 1, 0, 0], [0, 0, 0, 1, 2, 0, 1, 2]]
    with pytest.raises(ValueError, match="do not fit"):
        sequence_ids_of([3, 4], 6)


def test_can_pack_detects_recurrent_llms() -> None:
    assert can_pack(tiny().language_model)
    mamba = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert not can_pack(AutoModelForCausalLM.from_config(mamba))


def test_loss_is_over_the_step(samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny()
    inputs = batch(samples) | {"pixel_values": pixels}
    labels = inputs["labels"]
    output = model(**inputs)
    full = model(**{k: v for k, v in inputs.items() if k != "labels"}, gate_mask=before_answers(samples)).logits
    expected = naive_alignment.token_losses(full, labels)
    torch.testing.assert_close(output.token_losses, expected, **CLOSE)
    torch.testing.assert_close(output.loss, expected.mean(), **CLOSE)
    assert output.logits is None
    torch.testing.assert_close(model(**inputs, num_items_in_batch=100).loss, expected.sum() / 100, **CLOSE)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=torch.tensor(1)).loss, expected.sum(), **CLOSE)


def before_answers(samples: list[Sample]) -> torch.Tensor:
    mask = torch.zeros(len(samples), max(len(s.ids) for s in samples), dtype=torch.bool)
    for row, sample in zip(mask, samples, strict=True):
        row[: next(i for i, label in enumerate(sample.labels) if label != -100)] = True
    return mask


def test_chunks_change_only_the_memory() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden, labels = torch.randn(2, 30, 8), torch.randint(0, 50, (2, 30))
    labels[0, :9] = -100
    results, rows = [], []

    def counted(chunk: torch.Tensor) -> torch.Tensor:
        rows.append(len(chunk))
        return head(chunk)

    for chunk_tokens in (1000, 7):
        own = hidden.clone().requires_grad_()
        losses = token_losses(own, labels, None, counted, chunk_tokens)
        losses.sum().backward()
        results.append((losses.detach(), own.grad, head.weight.grad))
        head.zero_grad()
    torch.testing.assert_close(results[0], results[1])
    assert rows[0] == 21 + 29 - 1 + 1
    assert max(rows[1:]) == 7


def test_without_labels_the_loss_is_zero_and_learns_nothing(samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny()
    inputs = batch(samples)
    inputs["labels"][:] = -100
    loss = model(**inputs, pixel_values=pixels).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("mode", ["gated", "none"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_text_only_batches_leave_no_parameter_without_gradient(mode: str, stage: str, samples: list[Sample]) -> None:
    model = tiny(align_mode=mode)
    learning = model.set_stage(stage)
    model(**batch(samples[1:2])).loss.backward()
    grads = gradients(model)
    assert set(grads) == set(learning)
    for name in learning:
        if not name.startswith("language_model"):
            assert not grads[name].any(), name
    model.eval()
    calls: list[int] = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=torch.tensor([samples[1].ids]))
    assert not calls, "inference on text does not pay for a blank image"


def test_gradient_checkpointing_changes_nothing(samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny()
    inputs = batch(samples) | {"pixel_values": pixels}
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.activation_checkpointing_enable()
    model(**inputs).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=name)


def prompts(samples: list[Sample]) -> list[Sample]:
    return [Sample(s.ids[:-1], [-100] * (len(s.ids) - 1), s.has_image) for s in samples]


def generate(model: AlignGPTForConditionalGeneration, samples: list[Sample], side: str, **inputs: Any) -> torch.Tensor:
    rows = batch(samples, side)
    del rows["labels"]
    ids = model.generate(**rows, **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return ids[:, rows["input_ids"].shape[1] :]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_batch_generation_equals_single(attention: str, samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny(attention=attention).eval()
    asked = prompts(samples)
    together = generate(model, asked, "left", pixel_values=pixels)
    assert len({tuple(row) for row in together.tolist()}) == 3
    for number, sample in enumerate(asked):
        own = pixels[number // 2 : number // 2 + sample.has_image]
        for extra in ({}, {"use_cache": False}):
            alone = generate(model, [sample], "left", pixel_values=own if len(own) else None, **extra)
            assert alone.tolist() == together[number : number + 1].tolist()
    right = batch(asked, "right")
    del right["labels"]
    with torch.no_grad():
        logits = model(**right, pixel_values=pixels).logits
    firsts = [int(logits[row, len(sample.ids) - 1].argmax()) for row, sample in enumerate(asked)]
    assert firsts == [int(token) for token in right_first(model, asked, pixels)]


def right_first(model: AlignGPTForConditionalGeneration, asked: list[Sample], pixels: torch.Tensor) -> torch.Tensor:
    """The first greedy token of each left-padded prompt; the end token is allowed."""
    rows = batch(asked, "left")
    del rows["labels"]
    return model.generate(**rows, pixel_values=pixels, max_new_tokens=1, do_sample=False)[:, -1]


def test_beams_and_penalties(samples: list[Sample], pixels: torch.Tensor) -> None:
    # Placeholder ids lie beyond the vocabulary, and a batch has fewer images than rows.
    model = tiny().eval()
    asked = prompts(samples)
    extra = {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    together = generate(model, asked, "left", pixel_values=pixels, **extra)
    for number, sample in enumerate(asked):
        own = pixels[number // 2 : number // 2 + sample.has_image]
        alone = generate(model, [sample], "left", pixel_values=own if len(own) else None, **extra)
        assert alone.tolist() == together[number : number + 1].tolist()


@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_save_and_load(text: dict[str, Any], tmp_path: Path, samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny(text, num_levels=5, align_mode="average", gate_text="all").eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    saved = AutoConfig.from_pretrained(tmp_path)
    assert saved.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    # With the same attention as the first model: backends agree only up to rounding.
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert isinstance(again, AlignGPTForConditionalGeneration)
    assert again.config.align_mode == "average"
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    if text:
        assert again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    inputs = batch(samples)
    losses = [m(**inputs, pixel_values=pixels).loss for m in (model, again)]
    torch.testing.assert_close(*losses, **CLOSE)


def test_half_precision(samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny()
    expected = model(**batch(samples), pixel_values=pixels).loss
    output = model.to(torch.bfloat16)(**batch(samples), pixel_values=pixels)
    assert output.loss.dtype == output.gate_weights.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=5e-2, atol=0)
    output.loss.backward()


def test_from_components(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    clip = CLIPModel(
        CLIPConfig(
            vision_config={
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            text_config={
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 50,
                "eos_token_id": 2,
            },
        )
    )
    llm.save_pretrained(tmp_path / "llm")
    clip.save_pretrained(tmp_path / "clip")
    for parts in ((llm, clip), (tmp_path / "llm", tmp_path / "clip")):
        model = AlignGPTForConditionalGeneration.from_components(*parts, num_levels=3, attn_implementation="eager")
        assert model.config.num_patches == 4
        assert model.config.text_config._attn_implementation == "eager"
        assert torch.equal(model.language_model.lm_head.weight, llm.lm_head.weight)
        tower = model.vision_tower.state_dict()
        for name, tensor in clip.vision_model.state_dict().items():
            assert torch.equal(tower[name], tensor), name
        # New parts are initialised as in the official code: Xavier-uniform embeddings, torch's default linear layers.
        assert 0.8 * (6 / (3 + 16)) ** 0.5 < model.level_embeddings.weight.detach().abs().max() < (6 / (3 + 16)) ** 0.5
        for linear in (model.projector[0], model.gate.mlp[0]):
            for parameter in linear.parameters():
                assert 0.7 * linear.in_features**-0.5 < parameter.detach().abs().max() < linear.in_features**-0.5
        assert not torch.equal(model.gate.mlp[0].bias, torch.zeros_like(model.gate.mlp[0].bias))


@pytest.mark.parametrize("select", ["patch", "cls_patch"])
def test_mode_none_is_llava(select: str) -> None:
    """Equal to transformers' LLaVA with the same weights: loss, logits, gradients, generation."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=70,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    strategy = "default" if select == "patch" else "full"
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text, vision_config=vision, image_token_index=69, vision_feature_select_strategy=strategy
        )
    )
    llava.config._attn_implementation = "eager"
    ours = AlignGPTForConditionalGeneration(
        AlignGPTConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=69,
            align_mode="none",
            vision_select=select,
        )
    )
    ours.vision_tower.load_state_dict(llava.model.vision_tower.state_dict())
    ours.language_model.model.load_state_dict(llava.model.language_model.state_dict())
    ours.language_model.lm_head.load_state_dict(llava.lm_head.state_dict())
    for index, linear in enumerate(
        (llava.model.multi_modal_projector.linear_1, llava.model.multi_modal_projector.linear_2)
    ):
        ours.projector[2 * index].load_state_dict(linear.state_dict())
    image = [69] * ours.config.num_patches
    ids = torch.tensor([[1, 5, *image, 6, 7, 8], [1, *image, 9, 10, 0, 0]])
    mask = torch.tensor([[1] * len(ids[0]), [1] * (len(ids[0]) - 2) + [0, 0]])
    labels = ids.masked_fill((ids == 69) | (mask == 0), -100)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    theirs_out, ours_out = llava(**inputs, labels=labels), ours(**inputs, labels=labels)
    torch.testing.assert_close(ours_out.loss, theirs_out.loss, **CLOSE)
    real = mask.bool()
    torch.testing.assert_close(ours(**inputs).logits[real], llava(**inputs).logits[real], **CLOSE)
    theirs_out.loss.backward()
    ours_out.loss.backward()
    torch.testing.assert_close(
        ours.projector[0].weight.grad, llava.model.multi_modal_projector.linear_1.weight.grad, **CLOSE
    )
    torch.testing.assert_close(
        ours.get_input_embeddings().weight.grad, llava.get_input_embeddings().weight.grad, **CLOSE
    )
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert ours.eval().generate(**first, **options).tolist() == llava.eval().generate(**first, **options).tolist()


IDS = torch.tensor([[BOS, ALIGN, *[IMAGE] * PATCHES, 5]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": IDS}, "has 0 images of 9 patches each, but 9 image placeholders"),
        ({"input_ids": IDS[:, :-3], "pixel_values": torch.zeros(1, 3, SIDE, SIDE)}, "but 7 image placeholders"),
        (
            {"input_ids": IDS[:, [0, *range(2, 12)]], "pixel_values": torch.zeros(1, 3, SIDE, SIDE)},
            "0 align placeholders",
        ),
        ({"input_ids": IDS, "pixel_values": torch.zeros(1, 3, 16, 16)}, r"has shape \(1, 3, 16, 16\)"),
        (
            {"input_ids": IDS, "pixel_values": torch.zeros(1, 3, SIDE, SIDE), "levels": torch.tensor([9])},
            "levels must be 1 to 8",
        ),
        (
            {"input_ids": IDS, "pixel_values": torch.zeros(1, 3, SIDE, SIDE), "levels": torch.tensor([1, 2])},
            "has 1 images",
        ),
        ({"input_ids": torch.cat([IDS, IDS], 1), "pixel_values": torch.zeros(2, 3, SIDE, SIDE)}, "exactly one image"),
        (
            {"input_ids": IDS, "sequence_ids": torch.ones_like(IDS), "attention_mask": torch.ones_like(IDS)},
            "cannot be used with attention_mask",
        ),
        ({}, "either input_ids or inputs_embeds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradicting_inputs_are_errors(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(**inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"align_mode": "magic"}, "align_mode is 'magic'"),
        ({"align_mode": "fixed:9"}, "levels are 1 to 8"),
        ({"num_levels": 1}, "num_levels is 1; it must be at least 2"),
        ({"gate_text": "answers"}, "gate_text"),
        ({"projector_type": "mlp0x_gelu"}, "projector_type"),
        ({"vision_select": "cls"}, "vision_select"),
        ({"s2_scales": [16, 48]}, "start with the tower's 24 px"),
        ({"s2_scales": [24, 60]}, "multiple of 24"),
        ({"s2_scales": [24, 48], "vision_select": "cls_patch"}, "s2_scales needs"),
        ({"image_token_id": 70, "align_token_id": 70}, "both 70"),
    ],
)
def test_bad_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_levels_without_alignment_vector() -> None:
    ids = torch.tensor([[BOS, *[IMAGE] * PATCHES, 5]])
    with pytest.raises(ValueError, match="no alignment vector"):
        tiny(align_mode="none")(input_ids=ids, pixel_values=torch.zeros(1, 3, SIDE, SIDE), levels=torch.tensor([1]))
