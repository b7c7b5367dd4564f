"""Thresholds and levels compared with numpy, torch and scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aligncurate.errors import UserError
from aligncurate.levels import (
    Counts,
    Thresholds,
    WrongCounts,
    assign_levels,
    find_thresholds,
    key_scores,
    order_statistics,
    quantile_ranks,
    score_keys,
    uniform_thresholds,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
SCORES = arrays(np.float32, st.integers(1, 400), elements=FLOATS)
# Few distinct values, so that nearly every threshold is a tie; with both zeros and subnormals.
TIED = arrays(np.float32, st.integers(1, 400), elements=st.sampled_from([-1.0, -1e-45, -0.0, 0.0, 1e-45, 0.25, 1.0]))


def split(scores: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(scores, sorted(c % (len(scores) + 1) for c in cuts))


@given(SCORES)
def test_keys_sort_like_scores_and_convert_back(scores: np.ndarray) -> None:
    order = np.argsort(score_keys(scores), kind="stable")
    np.testing.assert_array_equal(scores[order], np.sort(scores))
    np.testing.assert_array_equal(key_scores(score_keys(scores)), scores)


@settings(deadline=None)
@given(SCORES | TIED, st.integers(2, 127), st.lists(st.integers(0, 400), max_size=5), st.permutations(range(6)))
def test_quantile_thresholds_are_sorted_ranks(scores, levels, cuts, order) -> None:
    parts = split(scores, cuts)
    parts = [parts[i] for i in order if i < len(parts)]  # in any order
    found, count, low, high = find_thresholds(lambda: parts, levels, "quantile")
    ranks = [min(int(np.ceil(k * len(scores) / levels - 1e-12)), len(scores) - 1) for k in range(1, levels)]
    np.testing.assert_array_equal(found, np.sort(scores)[ranks])
    assert (count, low, high) == (len(scores), scores.min(), scores.max())


@given(SCORES, st.lists(st.integers(0, 400), max_size=4))
def test_counts_merge_by_addition(scores, cuts) -> None:
    merged = sum((Counts.of([part]) for part in split(scores, cuts)), Counts.of([]))
    np.testing.assert_array_equal(merged.bins, Counts.of([scores]).bins)
    assert merged.total == len(scores)


@settings(deadline=None)
@given(arrays(np.float32, st.integers(1, 400), elements=st.floats(width=32)), st.integers(2, 20))
def test_values_that_are_not_finite_are_ignored(scores, levels) -> None:
    finite = scores[np.isfinite(scores)]
    np.testing.assert_array_equal(Counts.of([scores]).bins, Counts.of([finite]).bins)
    if len(finite):
        assert Counts.of([scores]).total == len(finite)
        found, *rest = find_thresholds(lambda: [scores], levels, "quantile")
        np.testing.assert_array_equal(found, np.sort(finite)[quantile_ranks(len(finite), levels)])
        assert rest == [len(finite), finite.min(), finite.max()]


@settings(deadline=None)
@given(SCORES | TIED)
def test_given_counts_save_the_first_pass(scores) -> None:
    scans = []

    def scan() -> list[np.ndarray]:
        scans.append(1)
        return [scores]

    ranks = list(range(len(scores)))
    np.testing.assert_array_equal(order_statistics(scan, ranks, Counts.of([scores])), np.sort(scores))
    assert len(scans) == 1


def test_counts_of_other_scores_raise_an_error() -> None:
    scores = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    with pytest.raises(WrongCounts):
        find_thresholds(lambda: [scores], 8, "quantile", Counts.of([scores + 1]))


@given(SCORES | TIED)
def test_counts_round_trip_through_json_without_empty_bins(scores) -> None:
    counts = Counts.of([scores])
    saved = json.loads(json.dumps(counts.to_json()))
    keys = np.sort(score_keys(scores)) >> 16
    assert saved["bins"] == sorted(set(keys.tolist()))
    assert saved["counts"] == [int((keys == b).sum()) for b in saved["bins"]]
    np.testing.assert_array_equal(Counts.from_json(saved).bins, counts.bins)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"bins": [1]},
        {"bins": [1, 2], "counts": [1]},
        {"bins": [2, 1], "counts": [1, 1]},
        {"bins": [1, 1], "counts": [1, 1]},
        {"bins": [-1], "counts": [1]},
        {"bins": [65536], "counts": [1]},
        {"bins": [1], "counts": [0]},
        {"bins": ["a"], "counts": [1]},
        {"bins": [[1]], "counts": [[1]]},
        {"bins": 1, "counts": 1},
    ],
)
def test_bad_counts_are_refused(data) -> None:
    with pytest.raises(ValueError, match="invalid score counts"):
        Counts.from_json(data)


@pytest.mark.parametrize("scores", [np.full(1000, 0.3, np.float32), np.array([-0.7], np.float32)])
def test_constant_scores(scores) -> None:
    values, *_ = find_thresholds(lambda: [scores], 8, "quantile")
    assert set(values) == {scores[0]}
    assert set(assign_levels(scores, values)) == {8}


def test_a_million_scores_make_equal_levels() -> None:
    scores = np.random.default_rng(0).normal(0.2, 0.1, 1_000_003).astype(np.float32)
    values, *_ = find_thresholds(lambda: np.array_split(scores, 7), 8, "quantile")
    ranks = [-(-k * len(scores) // 8) for k in range(1, 8)]
    np.testing.assert_array_equal(values, np.sort(scores)[ranks])
    sizes = np.bincount(assign_levels(scores, values))[1:]
    ties = len(scores) - len(np.unique(scores))
    assert sizes.max() - sizes.min() <= 1 + ties


@given(SCORES | TIED, arrays(np.float32, st.integers(1, 20), elements=FLOATS).map(np.sort))
def test_labels_equal_the_naive_count(scores, values) -> None:
    naive = [1 + sum(bool(score >= t) for t in values) for score in scores]
    assert assign_levels(scores, values).tolist() == naive
    assert assign_levels(scores, values).dtype == np.int8


@settings(deadline=None)
@given(SCORES, st.integers(2, 64))
def test_uniform_equals_bucketize_on_double_edges(scores, levels) -> None:
    low, high = float(scores.min()), float(scores.max())
    edges = torch.from_numpy(np.linspace(low, high, levels + 1)[1:-1])  # float64
    expected = torch.bucketize(torch.from_numpy(scores).double(), edges, right=True) + 1
    assert assign_levels(scores, uniform_thresholds(low, high, levels)).tolist() == expected.tolist()


@pytest.mark.parametrize("levels", [2, 5, 8, 20])
def test_uniform_equals_scikit_learn(levels) -> None:
    from sklearn.preprocessing import KBinsDiscretizer

    scores = np.random.default_rng(levels).normal(0.2, 0.1, 20_000).astype(np.float32)
    binner = KBinsDiscretizer(levels, encode="ordinal", strategy="uniform", subsample=None)
    expected = binner.fit_transform(scores[:, None].astype(np.float64))[:, 0].astype(int) + 1
    values, *_ = find_thresholds(lambda: [scores], levels, "uniform")
    assert assign_levels(scores, values).tolist() == expected.tolist()


def test_ranks_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="out of range for 3 scores"):
        order_statistics(lambda: [np.zeros(3, np.float32)], [3])


def test_fewer_scores_than_levels() -> None:
    assert quantile_ranks(1, 8) == [0] * 7
    assert quantile_ranks(3, 8) == [1, 1, 2, 2, 2, 2, 2]


def test_thresholds_round_trip_through_json() -> None:
    saved = Thresholds("quantile", (0.1, 0.25), "score", 10, -0.5, 0.5, {"model": "tiny"})
    assert Thresholds.from_json(saved.to_json(), "here") == saved


@pytest.mark.parametrize("change", [{"values": []}, {"values": [0.5, 0.1]}, {"values": [float("nan")]}, {"values": 3}])
def test_bad_thresholds_are_refused(change) -> None:
    saved = Thresholds("quantile", (0.1, 0.25), "score", 10, -0.5, 0.5).to_json()
    with pytest.raises(UserError, match="here"):
        Thresholds.from_json({**saved, **change}, "here")
