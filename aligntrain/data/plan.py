"""The samples of every step: a pure function of lengths, levels and a seed.

    order    one shuffled pass over the samples, by seed and epoch
    step     the next `batch_size` of them, for any number of ranks
    packs    the step's samples, grouped into micro-batches of at most `token_budget` tokens
    ranks    the packs in rounds, one pack per rank and round

Packs are made before they are dealt to ranks, so every optimizer step has the same samples on any number of ranks, and
a run can resume on a different number.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Pack = tuple[int, ...]
ROW_MULTIPLE = 8  # rows are padded to a multiple of this, for the matrix units of GPUs
_SHARED = 8  # steps with at least this many packs have a multiple of it, so that 2, 4 or 8 ranks share them evenly


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        ranks: packs of every rank, the same number for each; the rank idles in a round with an empty pack.
    """

    ranks: tuple[tuple[Pack, ...], ...]

    @property
    def samples(self) -> list[int]:
        """The step's samples, in ascending order."""
        return sorted(index for packs in self.ranks for pack in packs for index in pack)


@dataclass(frozen=True)
class Plan:
    """One epoch; steps are computed on access.

    Attributes:
        order: int64, samples in the order of training.
        lengths: int64, tokens of every sample in the data.
        images: int64, images of every sample in the data.
        batch_size: samples per step; the last step may have fewer.
        token_budget: maximum tokens per micro-batch, padding between rows included.
        world_size: number of ranks.
        packed: whether the samples of a micro-batch share one row.
    """

    order: NDArray[np.int64]
    lengths: NDArray[np.int64]
    images: NDArray[np.int64]
    batch_size: int
    token_budget: int
    world_size: int
    packed: bool

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, number: int) -> Step:
        if not 0 <= number < len(self):
            raise IndexError(f"step {number} is outside the plan of {len(self)} steps.")
        chosen = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        samples = [(int(self.lengths[i]), int(i)) for i in chosen]
        make = _pack_rows if self.packed else _group_rows
        return Step(self._deal(make(samples, self.token_budget)))

    @cached_property
    def hash(self) -> str:
        """Digest of what the steps consist of; the same for any number of ranks."""
        digest = hashlib.sha256(f"{self.batch_size} {self.token_budget} {self.packed}".encode())
        for array in (self.order, self.lengths, self.images):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def computed(self, pack: Pack) -> int:
        """Tokens computed for a micro-batch, padding included."""
        if not pack:
            return 0
        lengths = [int(self.lengths[i]) for i in pack]
        return row_length(sum(lengths)) if self.packed else len(lengths) * max(lengths)

    def efficiency(self, steps: Sequence[int] | None = None) -> float:
        """Tokens of samples / (ranks x tokens of each round's largest micro-batch), over some or all steps.

        Padding lowers it, and so does waiting for the rank with the most tokens.
        """
        useful = computed = 0
        for number in range(len(self)) if steps is None else steps:
            for packs in zip(*self[number].ranks, strict=True):
                useful += sum(int(self.lengths[i]) for pack in packs for i in pack)
                computed += self.world_size * max(self.computed(pack) for pack in packs)
        return useful / computed if computed else 1.0

    def _deal(self, packs: list[Pack]) -> tuple[tuple[Pack, ...], ...]:
        """Put packs of similar size in the same round; the most images go to the rank with the fewest."""
        packs = sorted(packs, key=lambda pack: (-self.computed(pack), pack))
        ranks: list[list[Pack]] = [[] for _ in range(self.world_size)]
        images_of = [0] * self.world_size
        for start in range(0, len(packs), self.world_size):
            dealt = packs[start : start + self.world_size]
            dealt += [()] * (self.world_size - len(dealt))
            dealt.sort(key=lambda pack: -sum(int(self.images[i]) for i in pack))
            fewest_first = sorted(range(self.world_size), key=images_of.__getitem__)
            for rank, pack in zip(fewest_first, dealt, strict=True):
                ranks[rank].append(pack)
                images_of[rank] += sum(int(self.images[i]) for i in pack)
        return tuple(map(tuple, ranks))


def plan(
    lengths: ArrayLike,
    levels: ArrayLike,
    images: ArrayLike,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    token_budget: int,
    world_size: int = 1,
    packed: bool = True,
    level_weights: Mapping[int, float] | None = None,
    stratified: bool = False,
) -> Plan:
    """The steps of one epoch.

    Args:
        lengths: tokens of every sample.
        levels: alignment level of every sample, 0 for none.
        images: images of every sample, 0 or 1.
        seed, epoch: determine the order.
        batch_size: samples per optimizer step.
        token_budget: maximum tokens per micro-batch.
        world_size: number of ranks.
        packed: pack the samples of a micro-batch into one row; otherwise pad rows of similar length.
        level_weights: how often samples of a level are used per epoch, 1 by default. 0.5 uses a random half of them
            in every epoch; 2.5 uses all twice and half a third time.
        stratified: give every step the same mix of levels as the whole data.

    Raises:
        ValueError: a sample is longer than the budget, the budget is not a multiple of 8, or no samples are left.
    """
    lengths_n, levels_n, images_n = (np.asarray(a, np.int64) for a in (lengths, levels, images))
    if token_budget % ROW_MULTIPLE:
        raise ValueError(f"token_budget is {token_budget}; it must be a multiple of {ROW_MULTIPLE}.")
    if len(lengths_n) and lengths_n.max() > token_budget:
        worst = int(lengths_n.argmax())
        raise ValueError(f"sample {worst} has {lengths_n[worst]} tokens, more than token_budget {token_budget}.")
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = rng.permutation(len(lengths_n)).astype(np.int64)
    if level_weights:
        order = _weighted(order, levels_n[order], level_weights, rng)
    if stratified:
        order = _stratified(order, levels_n[order], rng)
    if not len(order):
        raise ValueError("no samples are left.")
    return Plan(order, lengths_n, images_n, batch_size, token_budget, world_size, packed)


def row_length(tokens: int) -> int:
    """Length of a packed row after padding."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def _weighted(
    order: NDArray[np.int64], levels: NDArray[np.int64], weights: Mapping[int, float], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Exactly round(weight x n) of the n samples of every level; their repeat counts differ by at most one."""
    taken = []
    for level in np.unique(levels):
        own = order[levels == level]
        count = round(weights.get(int(level), 1.0) * len(own))
        taken.append(np.resize(own, count))  # repeats `own`, which is shuffled already
    result = np.concatenate(taken) if taken else order
    return rng.permutation(result)


def _stratified(order: NDArray[np.int64], levels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Spread each level's n samples evenly: the i-th lies somewhere in the i-th of n equal parts of the order."""
    places = np.empty(len(order))
    for level in np.unique(levels):
        own = np.flatnonzero(levels == level)
        places[own] = (np.arange(len(own)) + rng.random(len(own))) / len(own)
    return order[np.argsort(places, kind="stable")]


def _pack_rows(samples: list[tuple[int, int]], budget: int) -> list[Pack]:
    """As few rows as first-fit-decreasing needs, filled evenly."""
    samples = sorted(samples, key=lambda s: (-s[0], s[1]))
    places = first_fit([length for length, _ in samples], budget)
    rows: list[list[int]] = [[] for _ in range(max(places) + 1)]
    for row, (_, index) in zip(places, samples, strict=True):
        rows[row].append(index)
    even = _evenly(samples, min(_shareable(len(rows)), len(samples)), budget)
    return [tuple(sorted(row)) for row in even or rows]


def first_fit(lengths: list[int], budget: int) -> list[int]:
    """The first row with room for each length.

    Node k of a binary tree holds the largest room in the rows below it, and its children are 2k and 2k + 1. So finding
    the first row takes log2(rows) steps; a linear search would make packing quadratic.
    """
    leaves = 1 << (len(lengths) - 1).bit_length()
    room = [budget] * (2 * leaves)
    rows = []
    for length in lengths:
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        rows.append(node - leaves)
        room[node] -= length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def _shareable(rows: int) -> int:
    """The next larger number of rows that 2, 4 or 8 ranks can share evenly."""
    return -(-rows // _SHARED) * _SHARED if rows >= _SHARED else 1 << (rows - 1).bit_length()


def _evenly(samples: list[tuple[int, int]], rows: int, budget: int) -> list[list[int]] | None:
    """Longest sample first, each into the emptiest row; None if one does not fit."""
    heap = [(0, row) for row in range(rows)]
    filled: list[list[int]] = [[] for _ in range(rows)]
    for length, index in samples:
        used, row = heap[0]
        if used + length > budget:
            return None
        filled[row].append(index)
        heapq.heapreplace(heap, (used + length, row))
    return filled


def _group_rows(samples: list[tuple[int, int]], budget: int) -> list[Pack]:
    """Group samples of similar length, each in its own row padded to the longest."""
    groups: list[list[int]] = []
    width = 0
    for length, index in sorted(samples, key=lambda s: (-s[0], s[1])):
        if not groups or (len(groups[-1]) + 1) * width > budget:
            groups.append([])
            width = length
        groups[-1].append(index)
    return [tuple(sorted(group)) for group in groups]
