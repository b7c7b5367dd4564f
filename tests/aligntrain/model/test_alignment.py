"""Level embeddings and gate against their naive twins."""

from __future__ import annotations

import pytest
import torch

from aligntrain.model.alignment import AlignmentGate, LevelEmbeddings, gate_dots, mean_text
from tests.support import naive_alignment
from tests.support.small_models import PATCHES, Sample, batch, gradients, packed, tiny

MODES = ["gated", "local", "global", "average", "fixed:1", "fixed:3", "fixed:5"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_levels", "num_patches"), [(5, 9), (8, 16)])
def test_every_mode_equals_the_loop(mode: str, num_levels: int, num_patches: int) -> None:
    torch.manual_seed(3)
    table, gate = LevelEmbeddings(num_levels, 6), AlignmentGate(num_patches, num_levels, 7)
    features = torch.randn(3, num_patches, 6)
    # The third image has no text; a negative owner means no image.
    text, owner = torch.randn(8, 6), torch.tensor([0, 1, 1, -1, 0, 1, -1, 0])
    lists = [[t for t, o in zip(text, owner.tolist(), strict=True) if o == i] for i in range(3)]
    dots = gate_dots(features, mean_text(text, owner, 3))
    torch.testing.assert_close(dots, naive_alignment.gate_dots(features, lists))
    alpha = gate(dots)
    torch.testing.assert_close(alpha, naive_alignment.alpha(gate, dots))
    torch.testing.assert_close(table.mix(mode, alpha, 3), naive_alignment.align(mode, table.weight, alpha))


def test_levels_count_from_one() -> None:
    table = LevelEmbeddings(4, 5)
    assert torch.equal(table(torch.tensor([4, 1])), table.weight[[3, 0]])
    for outside in (0, 5):
        with pytest.raises(ValueError, match="levels must be 1 to 4"):
            table(torch.tensor([2, outside]))


def test_table_starts_xavier_uniform() -> None:
    table = tiny(num_levels=8).level_embeddings.weight.detach() / 4  # ``tiny`` multiplies its weights by 4
    bound = (6 / (8 + 32)) ** 0.5
    assert 0.9 * bound < table.abs().max() <= bound
    assert abs(float(table.std()) - bound / 3**0.5) < 0.05 * bound


@pytest.mark.parametrize("gate_text", ["instruction", "all"])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_gate_text(gate_text: str, layout: str, samples: list[Sample], pixels: torch.Tensor) -> None:
    """The gate averages the text before the first answer, or all; never BOS, placeholders, padding or neighbours."""
    model = tiny(gate_text=gate_text)
    inputs = packed(samples) if layout == "packed" else batch(samples, layout)
    output = model(**inputs, pixel_values=pixels)
    words = {"instruction": [[5, 6, 7, 8, 9], [30, 31, 32]], "all": [[5, 6, 7, 8, 9, 10, 11, 12, 13], [30, 31, 32, 33]]}
    table = model.get_input_embeddings().weight
    features = model.projector(model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    expected = naive_alignment.gate_dots(features, [[table[word] for word in row] for row in words[gate_text]])
    torch.testing.assert_close(output.gate_dots, expected, rtol=1e-5, atol=1e-5)
    assert output.gate_dots.shape == (2, PATCHES)


def test_explicit_gate_mask_wins(samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny()
    inputs = batch(samples)
    # Shorter than the row: later tokens do not count. BOS never counts.
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, :3] = True
    output = model(**inputs, pixel_values=pixels, gate_mask=mask)
    table = model.get_input_embeddings().weight
    features = model.projector(model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    torch.testing.assert_close(output.gate_dots, naive_alignment.gate_dots(features, [[table[5]], []]))


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_in_the_model(mode: str, samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny(align_mode=mode, num_levels=5)
    seen: list[torch.Tensor] = []
    model.language_model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    output = model(**batch(samples), pixel_values=pixels)
    weights = output.gate_weights if mode in ("gated", "local") else torch.zeros(2, 4)
    expected = naive_alignment.align(mode, model.level_embeddings.weight, weights)
    torch.testing.assert_close(seen[0][[0, 2], 1], expected)


def test_stage_chooses_what_learns(samples: list[Sample], pixels: torch.Tensor) -> None:
    model = tiny()
    tops = {name.split(".")[0] for name in model.set_stage("pretrain")}
    assert tops == {"projector", "level_embeddings"}
    model(**batch(samples), pixel_values=pixels, levels=torch.tensor([2, 8])).loss.backward()
    grads = gradients(model)
    assert set(grads) == set(model.set_stage("pretrain"))
    assert grads["level_embeddings.weight"].abs().sum(1).nonzero().flatten().tolist() == [1, 7]
    tops = {name.split(".")[0] for name in model.set_stage("finetune")}
    assert tops == {"projector", "language_model", "gate"}
    model(**batch(samples), pixel_values=pixels).loss.backward()
    assert set(gradients(model)) == set(model.set_stage("finetune"))
    assert {name.split(".")[0] for name in tiny(align_mode="global").set_stage("finetune")} == {
        "projector",
        "language_model",
    }
    with pytest.raises(ValueError, match="pretrain or finetune"):
        model.set_stage("align")
