"""What goes to the encoders and what comes back: arrays for many pairs at once, in one process or between two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aligncurate.encoders.tokenizer import Tokenize
from aligncurate.engines.processes import Memories
from aligncurate.engines.shared_memory import Spec
from aligncurate.engines.worker import parent
from aligncurate.images.preprocess import Preprocess


@dataclass(frozen=True)
class EncoderInputs:
    """What the encoders of a run take, without the encoders; none of it if images are only measured and hashed.

    Attributes:
        columns: the column for each encoder's scores.
        preprocesses: each kind of preprocessing once: encoders may take the same pixels.
        tokenizers: one per encoder.
        batch: pairs that are encoded at once.
    """

    columns: Sequence[str]
    preprocesses: Sequence[Preprocess]
    tokenizers: Sequence[Tokenize]
    batch: int


@dataclass(frozen=True)
class Packet:
    """n pairs to encode.

    Attributes:
        pixels: decoded, per kind of preprocessing, uint8 (or a transform's own floats) [n, 3, H, W].
        tokens: int32 [n, context] per encoder.
        files: JPEGs for the GPU to decode, by their row, which is empty in `pixels`.
        compared: rows that were decoded exactly too, to compare fast decoding with.
        exact_pixels: for the first encoder, [len(compared), 3, H, W]; None if there are none.
        memory: number of the shared memory that `pixels` are in.
    """

    pixels: list[NDArray[Any]]
    tokens: list[NDArray[np.int32]]
    files: Mapping[int, bytes]
    compared: list[int]
    exact_pixels: NDArray[Any] | None
    memory: int = 0


@dataclass(frozen=True)
class Scores:
    """What the encoders found for the n pairs of a packet.

    Attributes:
        columns: cosines, float32 [encoders, n].
        exact: the first encoder's of the exact pixels, float32 [len(compared)].
        images, texts: the first encoder's unit embeddings, float16 [n, D], if they are kept.
        failures: status and cause of JPEGs that could not be decoded, by row.
        batch: the smallest batch size that memory left to an encoder.
    """

    columns: NDArray[np.float32]
    exact: NDArray[np.float32]
    images: NDArray[np.float16] | None
    texts: NDArray[np.float16] | None
    failures: dict[int, tuple[str, str]]
    batch: int


@dataclass(frozen=True)
class Progress:
    """Rows of a shard that are done: all, scored now, failed, and taken over from an earlier run."""

    shard: int
    rows: int
    ok: int
    failed: int
    taken_over: int


class Link(Protocol):
    """How the maker of packets reaches the encoders of its run, and tells of its progress."""

    def arrays(self, specs: Sequence[Spec]) -> tuple[int, list[NDArray[Any]]]:
        """Arrays for a packet's pixels and the number of their memory; waits for an earlier packet if need be."""

    def submit(self, packet: Packet) -> Future[Scores]:
        """Encode a packet; until that is done its arrays are in use."""

    def report(self, progress: Progress) -> None:
        """Tell how far a shard is."""


@dataclass
class LocalLink:
    """The encoders are in this process."""

    encode: Callable[[Packet], Future[Scores]]
    report: Callable[[Progress], None]

    def arrays(self, specs: Sequence[Spec]) -> tuple[int, list[NDArray[Any]]]:
        return 0, [np.empty(shape, dtype) for shape, dtype in specs]

    def submit(self, packet: Packet) -> Future[Scores]:
        return self.encode(packet)


MEMORIES = 2
"""Shared memories of a worker: one is filled while the other is encoded."""


@dataclass
class WorkerLink:
    """The encoders are in the parent of this worker process: pixels go there through shared memory."""

    _free: SimpleQueue[int] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        for number in range(len(parent().memories)):
            self._free.put(number)

    def arrays(self, specs: Sequence[Spec]) -> tuple[int, list[NDArray[Any]]]:
        number = self._free.get()
        return number, parent().memories[number].arrays(specs)

    def submit(self, packet: Packet) -> Future[Scores]:
        specs = [(array.shape, array.dtype.str) for array in packet.pixels]
        future = parent().ask((replace(packet, pixels=[]), specs))
        future.add_done_callback(lambda _: self._free.put(packet.memory))
        return future

    def report(self, progress: Progress) -> None:
        parent().tell(progress)


def received(question: tuple[Packet, Sequence[Spec]], memories: Memories) -> Packet:
    """The packet that a worker has submitted, in its parent."""
    packet, specs = question
    return replace(packet, pixels=memories[packet.memory].arrays(specs))
