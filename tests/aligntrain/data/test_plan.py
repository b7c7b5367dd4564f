"""The plan: every sample once, within the budget, the same for any number of ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntrain.data.plan import Plan, first_fit, plan


@st.composite
def inputs(draw: Any) -> dict[str, Any]:
    count = draw(st.integers(1, 80))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    budget = 8 * draw(st.integers(4, 40))
    return {
        "lengths": rng.integers(1, budget + 1, count),
        "levels": rng.integers(0, 5, count),
        "images": rng.integers(0, 2, count),
        "seed": seed,
        "epoch": draw(st.integers(0, 3)),
        "batch_size": draw(st.integers(1, 40)),
        "token_budget": budget,
        "world_size": draw(st.integers(1, 9)),
        "packed": draw(st.booleans()),
        "stratified": draw(st.booleans()),
    }


def samples(made: Plan) -> list[int]:
    return [index for number in range(len(made)) for index in made[number].samples]


@given(inputs())
@settings(deadline=None, max_examples=150)
def test_every_sample_once_within_the_budget(given: dict[str, Any]) -> None:
    made = plan(**given)
    assert sorted(samples(made)) == list(range(len(given["lengths"])))
    for number in range(len(made)):
        step = made[number]
        assert len(step.ranks) == given["world_size"]
        assert len({len(packs) for packs in step.ranks}) == 1
        assert len(step.samples) == (given["batch_size"] if number < len(made) - 1 else len(step.samples))
        for pack in (pack for packs in step.ranks for pack in packs):
            lengths = [int(given["lengths"][i]) for i in pack]
            cost = sum(lengths) if given["packed"] else len(lengths) * max(lengths, default=0)
            assert cost <= made.computed(pack) <= given["token_budget"]
    assert 0 < made.efficiency() <= 1


@given(inputs(), st.integers(1, 9))
@settings(deadline=None, max_examples=100)
def test_packs_do_not_depend_on_the_number_of_ranks(given: dict[str, Any], ranks: int) -> None:
    made, other = plan(**given), plan(**{**given, "world_size": ranks})
    assert made.hash == other.hash
    for number in range(len(made)):
        packs, others = (sorted(pack for own in p[number].ranks for pack in own if pack) for p in (made, other))
        assert packs == others


@given(inputs())
@settings(deadline=None, max_examples=50)
def test_the_plan_is_deterministic(given: dict[str, Any]) -> None:
    made, again = plan(**given), plan(**given)
    assert made.hash == again.hash
    assert [made[n] for n in range(len(made))] == [again[n] for n in range(len(again))]


def of(count: int, **changes: Any) -> Plan:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "lengths": rng.integers(590, 680, count), "levels": np.arange(count) % 4 + 1, "images": np.ones(count),
        "seed": 0, "epoch": 0, "batch_size": 128, "token_budget": 4096,
    }  # fmt: skip
    return plan(**{**given, **changes})


def test_seed_epoch_and_settings_change_the_plan() -> None:
    hashes = {of(200, **c).hash for c in ({}, {"seed": 1}, {"epoch": 1}, {"batch_size": 64}, {"token_budget": 2048})}
    assert len(hashes) == 5


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_daquar_packs_well(world_size: int) -> None:
    """Images of 576 patches with a question and a short answer: at most 5% padding."""
    assert of(1280, world_size=world_size).efficiency() >= 0.95


def test_mixed_lengths_pack_well() -> None:
    lengths = np.random.default_rng(1).integers(30, 2048, 1280)
    assert of(1280, lengths=lengths, world_size=4).efficiency() >= 0.95


def test_images_are_balanced() -> None:
    images = np.arange(256) % 2
    made = of(256, images=images, lengths=np.full(256, 2048), world_size=4)
    for number in range(len(made)):
        counts = [sum(int(images[i]) for pack in packs for i in pack) for packs in made[number].ranks]
        assert max(counts) - min(counts) <= 2


def test_level_weights_are_exact() -> None:
    levels = np.arange(400) % 4 + 1
    made = of(400, level_weights={1: 0, 2: 0.5, 3: 2.25})
    taken = Counter(samples(made))
    by_level = Counter(int(levels[i]) for i in made.order)
    assert by_level == {2: 50, 3: 225, 4: 100}
    assert {taken[i] for i in range(400) if levels[i] == 3} == {2, 3}
    assert {taken[i] for i in range(400) if levels[i] == 4} == {1}
    other = of(400, level_weights={1: 0, 2: 0.5, 3: 2.25}, epoch=1)
    assert {i for i in made.order if levels[i] == 2} != {i for i in other.order if levels[i] == 2}


def test_stratified_steps_have_the_mix_of_the_whole() -> None:
    levels = np.repeat([1, 2, 3], [600, 300, 100])
    made = of(1000, levels=levels, batch_size=100, stratified=True)
    for number in range(len(made)):
        counts = Counter(int(levels[i]) for i in made[number].samples)
        assert abs(counts[1] - 60) <= 2
        assert abs(counts[2] - 30) <= 2
        assert abs(counts[3] - 10) <= 2


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
@settings(deadline=None)
def test_first_fit_equals_a_linear_search(lengths: list[int]) -> None:
    free: list[int] = []
    expected = []
    for length in lengths:
        row = next((row for row, room in enumerate(free) if length <= room), len(free))
        free += [64] * (row == len(free))
        free[row] -= length
        expected.append(row)
    assert first_fit(lengths, 64) == expected


def test_errors() -> None:
    with pytest.raises(ValueError, match="sample 3 has 700 tokens, more than token_budget 640"):
        of(4, lengths=[600, 600, 600, 700], token_budget=640)
    with pytest.raises(ValueError, match="no samples are left"):
        of(4, level_weights=dict.fromkeys(range(1, 5), 0.0))
    with pytest.raises(ValueError, match="multiple of 8"):
        of(4, token_budget=1001)
    with pytest.raises(IndexError, match="step 2 is outside the plan"):
        of(200)[2]
