"""Which samples make up every step: a pure function of lengths, levels and a seed.

    order    one shuffled pass over the samples, by seed and epoch
    step     the next ``batch_size`` of them, whatever the number of ranks
    packs    the step's samples, put together to micro-batches of at most ``token_budget`` tokens
    ranks    the packs in rounds, one pack a rank a round

Packs are made before the ranks get them. So any number of ranks sees the same samples at every optimizer step, and a
run can go on with another number of ranks.
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
ROW_MULTIPLE = 8  # rows are padded to a multiple of this, which GPUs' matrix units ask for
_SHARED = 8  # from this many packs on, a step has a multiple of it, so that 2, 4 or 8 ranks share them without rest


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        ranks: for every rank its packs, equally many for each; an empty pack is a round in which a rank idles.
    """

    ranks: tuple[tuple[Pack, ...], ...]

    @property
    def samples(self) -> list[int]:
        """The step's samples, in ascending order."""
        return sorted(index for packs in self.ranks for pack in packs for index in pack)


@dataclass(frozen=True)
class Plan:
    """One epoch. Its steps are worked out when they are asked for.

    Attributes:
        order: int64, the samples in the order in which they are taken.
        lengths: int64, tokens of every sample of the data.
        images: int64, images of every sample of the data.
        batch_size: samples of a step; the last may have fewer.
        token_budget: most tokens of a micro-batch, padding of its rows to each other included.
        world_size: number of ranks.
        packed: samples of a micro-batch lie in one row, or else each in a row of its own.
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
            raise IndexError(f"the plan has {len(self)} steps; there is no step {number}.")
        chosen = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        samples = [(int(self.lengths[i]), int(i)) for i in chosen]
        make = _pack_rows if self.packed else _group_rows
        return Step(self._deal(make(samples, self.token_budget)))

    @cached_property
    def hash(self) -> str:
        """Names what the steps consist of; the same for any number of ranks."""
        digest = hashlib.sha256(f"{self.batch_size} {self.token_budget} {self.packed}".encode())
        for array in (self.order, self.lengths, self.images):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def computed(self, pack: Pack) -> int:
        """Tokens that a micro-batch computes, padding included."""
        if not pack:
            return 0
        lengths = [int(self.lengths[i]) for i in pack]
        return row_length(sum(lengths)) if self.packed else len(lengths) * max(lengths)

    def efficiency(self, steps: Sequence[int] | None = None) -> float:
        """Tokens of samples / (ranks x tokens of each round's largest micro-batch), over some or all steps.

        So padding counts as waste, and so does waiting for the rank with the most tokens.
        """
        useful = paid = 0
        for number in range(len(self)) if steps is None else steps:
            for packs in zip(*self[number].ranks, strict=True):
                useful += sum(int(self.lengths[i]) for pack in packs for i in pack)
                paid += self.world_size * max(self.computed(pack) for pack in packs)
        return useful / paid if paid else 1.0

    def _deal(self, packs: list[Pack]) -> tuple[tuple[Pack, ...], ...]:
        """Packs of like size in the same round, and there the most images to the rank that had the fewest."""
        packs = sorted(packs, key=lambda pack: (-self.computed(pack), pack))
        ranks: list[list[Pack]] = [[] for _ in range(self.world_size)]
        had = [0] * self.world_size
        for start in range(0, len(packs), self.world_size):
            dealt = packs[start : start + self.world_size]
            dealt += [()] * (self.world_size - len(dealt))
            dealt.sort(key=lambda pack: -sum(int(self.images[i]) for i in pack))
            fewest_first = sorted(range(self.world_size), key=had.__getitem__)
            for rank, pack in zip(fewest_first, dealt, strict=True):
                ranks[rank].append(pack)
                had[rank] += sum(int(self.images[i]) for i in pack)
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
        seed, epoch: choose the order.
        batch_size: samples per optimizer step.
        token_budget: most tokens per micro-batch.
        world_size: number of ranks.
        packed: samples of a micro-batch lie in one row; otherwise samples of like length in padded rows.
        level_weights: how often a sample of a level is taken per epoch; 1 where a level is not named. Of 0.5, half
            the level's samples are taken, another half in every epoch; of 2.5, all twice and half a third time.
        stratified: every step has the levels in the shares of the whole.

    Raises:
        ValueError: a sample is longer than the budget, which must be a multiple of 8; or nothing is left to take.
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
        raise ValueError("there is no sample to take.")
    return Plan(order, lengths_n, images_n, batch_size, token_budget, world_size, packed)


def row_length(tokens: int) -> int:
    """Tokens of a packed row once it is padded."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def _weighted(
    order: NDArray[np.int64], levels: NDArray[np.int64], weights: Mapping[int, float], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Exactly round(weight x n) of the n samples of every level, none more than once oftener than another."""
    taken = []
    for level in np.unique(levels):
        own = order[levels == level]
        count = round(weights.get(int(level), 1.0) * len(own))
        taken.append(np.resize(own, count))  # goes round and round; ``own`` is shuffled already
    result = np.concatenate(taken) if taken else order
    return rng.permutation(result)


def _stratified(order: NDArray[np.int64], levels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Each level's samples spread evenly over the whole: the i-th of n somewhere in the i-th n-th of it."""
    places = np.empty(len(order))
    for level in np.unique(levels):
        own = np.flatnonzero(levels == level)
        places[own] = (np.arange(len(own)) + rng.random(len(own))) / len(own)
    return order[np.argsort(places, kind="stable")]


def _pack_rows(samples: list[tuple[int, int]], budget: int) -> list[Pack]:
    """As few rows as first-fit-decreasing finds, and these filled evenly."""
    samples = sorted(samples, key=lambda s: (-s[0], s[1]))
    places = _first_fit([length for length, _ in samples], budget)
    rows: list[list[int]] = [[] for _ in range(max(places) + 1)]
    for row, (_, index) in zip(places, samples, strict=True):
        rows[row].append(index)
    even = _evenly(samples, min(_shareable(len(rows)), len(samples)), budget)
    return [tuple(sorted(row)) for row in even or rows]


def _first_fit(lengths: list[int], budget: int) -> list[int]:
    """For every length the first row that has room for it.

    Node k of a binary tree knows the most room in the rows below it, its children are 2k and 2k + 1; so the way down
    to the first fitting row takes log2(rows) steps, where a search from the front would be quadratic.
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
    """The next number of rows that many numbers of ranks divide."""
    return -(-rows // _SHARED) * _SHARED if rows >= _SHARED else 1 << (rows - 1).bit_length()


def _evenly(samples: list[tuple[int, int]], rows: int, budget: int) -> list[list[int]] | None:
    """The longest sample first, each to the emptiest row; None where one does not fit so."""
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
    """Samples of like length together, each in a row of its own as long as the longest."""
    groups: list[list[int]] = []
    width = 0
    for length, index in sorted(samples, key=lambda s: (-s[0], s[1])):
        if not groups or (len(groups[-1]) + 1) * width > budget:
            groups.append([])
            width = length
        groups[-1].append(index)
    return [tuple(sorted(group)) for group in groups]
