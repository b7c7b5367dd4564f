"""LLMs and vision towers of other families: each trains, generates, packs and round-trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from aligntrain.model.llm import decoder_of, head_of
from aligntrain.model.packing import can_pack
from tests.support import naive_alignment
from tests.support.small_models import SIDE, Sample, batch, gradients, packed, tiny

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLMS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "phi": {"model_type": "phi"},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 12, "final_logit_softcapping": 3.0},
    "mistral": {"model_type": "mistral", "sliding_window": 12, "head_dim": 8},
    "llama3": {"model_type": "llama", "rope_parameters": {**ROPE, "original_max_position_embeddings": 64}},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25},
    "granite": {"model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 12},
    "gpt2": {"model_type": "gpt2", **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)},
    "opt": {"model_type": "opt", "dropout": 0.0, "word_embed_proj_dim": 32, "ffn_dim": 48},
    "gpt-oss": {"model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1},
}
# Their masks ignore positions, so packed samples would attend to each other.
UNPACKABLE = {"opt", "gpt-oss"}


@pytest.mark.parametrize("family", LLMS)
def test_llm(family: str, samples: list[Sample], pixels: torch.Tensor, tmp_path: Path) -> None:
    model = tiny({**SMALL, **LLMS[family]}, attention=None)
    inputs = batch(samples)
    output = model(**inputs, pixel_values=pixels)
    output.loss.backward()
    separate = gradients(model)
    assert separate["gate.mlp.0.weight"].any()
    assert separate["projector.0.weight"].any()

    # The loss uses the LLM's own head, including scaling, capping and bias.
    labels = inputs.pop("labels")
    mask = (labels == -100).cumprod(1).bool()
    logits = model(**inputs, pixel_values=pixels, gate_mask=mask).logits
    torch.testing.assert_close(output.token_losses, naive_alignment.token_losses(logits, labels), rtol=1e-5, atol=1e-5)

    assert can_pack(model.language_model) == (family not in UNPACKABLE)
    if family not in UNPACKABLE:
        together = model(**packed(samples), pixel_values=pixels)
        together.loss.backward()
        torch.testing.assert_close(together.token_losses, output.token_losses, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, separate[name], rtol=1e-4, atol=1e-5, msg=name)

    model.eval()
    rows = batch(samples, "left")
    del rows["labels"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = model.generate(**rows, pixel_values=pixels, **options)
    alone = model.generate(input_ids=torch.tensor([samples[2].ids]), pixel_values=pixels[1:], **options)
    assert ids[2, -4:].tolist() == alone[0, -4:].tolist()

    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_siglip_and_projectors(projector: str, samples: list[Sample], pixels: torch.Tensor, tmp_path: Path) -> None:
    model = tiny(vision={"model_type": "siglip_vision_model"}, projector_type=projector, vision_layer=-1)
    assert model.config.num_patches == 9  # SigLIP has no class token to drop
    linears = [module for module in model.projector if isinstance(module, torch.nn.Linear)]
    assert len(linears) == {"linear": 1, "mlp1x_gelu": 1, "mlp3x_gelu": 3}[projector]
    model(**batch(samples), pixel_values=pixels).loss.backward()
    assert gradients(model)["projector.0.weight"].any()
    rows = batch(samples, "left")
    del rows["labels"]
    ids = model.eval().generate(**rows, pixel_values=pixels, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.generate(**rows, pixel_values=pixels, max_new_tokens=3, do_sample=False).tolist() == ids.tolist()
    with pytest.raises(ValueError, match="no class token"):
        tiny(vision={"model_type": "siglip_vision_model"}, vision_select="cls_patch")


def test_multi_scale_equals_the_loop(samples: list[Sample]) -> None:
    model = tiny(s2_scales=[24, 48, 72])
    assert (model.config.num_patches, model.config.vision_feature_size) == (9, 48)
    pixels = torch.randn(2, 3, 72, 72)
    seen: list[torch.Tensor] = []
    model.projector.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(**batch(samples), pixel_values=pixels).loss.backward()
    expected = naive_alignment.s2(model.vision_tower, pixels, [24, 48, 72], -2, 8)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    rows = batch(samples, "left")
    del rows["labels"]
    model.eval().generate(**rows, pixel_values=pixels, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"expected \[images, 3, 72, 72\]"):
        model(**rows, pixel_values=torch.zeros(2, 3, SIDE, SIDE))


def test_llms_without_a_separate_decoder_are_refused() -> None:
    class Bypass(LlamaForCausalLM):
        """Computes logits without running its decoder."""

        def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
            return CausalLMOutputWithPast(logits=self.lm_head(inputs_embeds))

    llm = tiny().language_model
    with pytest.raises(ValueError, match="Bypass does not compute its logits from its decoder"):
        head_of(Bypass(llm.config))(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="LlamaModel has no decoder that can be run on its own"):
        decoder_of(llm.model)
