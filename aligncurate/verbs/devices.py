"""Scoring on several devices of a machine or a cluster: a process for each, which takes some shards at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from aligncurate.dataset.receipt import PartInfo
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.encoders.device import find_device, scoring_environment
from aligncurate.encoders.load import load_all
from aligncurate.engines import processes, ray
from aligncurate.engines.contract import Check, Outcome
from aligncurate.engines.worker import parent
from aligncurate.errors import ShardError, UserError
from aligncurate.images.decode import no_decoder_warnings
from aligncurate.io import retries
from aligncurate.progress import Meter
from aligncurate.scoring.options import ScoreOptions
from aligncurate.scoring.run import DeviceRun
from aligncurate.scoring.timing import STAGES, StageClock, StageTimes
from aligncurate.sources.base import Shard, Source

_CHUNKS = 8  # for each device: small enough to share the work well, large enough to start worker processes for
_RAY_CHUNK = 16  # shards at most, for actors that come and go


def device_names(given: str) -> list[str]:
    """The devices that `--devices` names. Raises UserError for those that this machine does not have."""
    import torch

    count = torch.cuda.device_count()
    if given == "all":
        if not count:
            raise UserError("--devices all: this machine has no GPU.")
        return [f"cuda:{i}" for i in range(count)]
    names = [f"cuda:{name}" if name.isdecimal() else name for name in given.replace(" ", "").split(",")]
    for name in names:
        try:
            find_device(name)
        except UserError:
            raise UserError(f"--devices {given}: this machine has no {name} ({count} GPUs found).") from None
    return names


def environments(devices: Sequence[str], *, mixed: bool) -> list[dict[str, Any]]:
    """What scores depend on, of each kind of device among these.

    Raises UserError for devices of several kinds, unless `mixed`.
    """
    kinds: list[dict[str, Any]] = []
    for name in devices:
        if (kind := scoring_environment(find_device(name))) not in kinds:
            kinds.append(kind)
    if len(kinds) > 1 and not mixed:
        raise UserError(
            f"--devices {','.join(devices)}: these are of {len(kinds)} kinds, whose scores differ in the last digits; "
            "add --mixed-devices, or use those of one kind."
        )
    return kinds


@dataclass(frozen=True)
class Chunk:
    """Some shards that a device process makes the parts of."""

    shards: tuple[Shard, ...]

    def __str__(self) -> str:
        first, last = self.shards[0], self.shards[-1]
        return str(first) if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class ChunkResult:
    """What became of a chunk: parts by shard, errors by shard, seconds by stage, and what was counted."""

    parts: dict[int, PartInfo]
    errors: dict[int, str]
    seconds: dict[str, float]
    counted: list[Any]


class _Telling(Meter):
    """Passes on what is done to the parent of a device process."""

    def __init__(self) -> None:
        super().__init__("score", None)

    def skip(self, rows: int) -> None:
        super().skip(rows)
        parent().tell(("skip", rows))

    def add(self, rows: int, ok: int, failed: int) -> None:
        super().add(rows, ok, failed)
        parent().tell(("add", rows, ok, failed))


@dataclass
class DeviceJob:
    """Makes the parts of chunks in a process of its own, with the encoders on one of `devices`, by its number.

    Without `scores` no encoder is loaded.
    """

    source: Source
    writer: DatasetWriter
    options: ScoreOptions
    devices: Sequence[str]
    timeout: float
    scores: bool
    _run: DeviceRun | None = field(default=None, init=False)

    def __call__(self, chunk: Chunk, check: Check) -> ChunkResult:
        if self._run is None:
            self._run = self._begin()
        parts, errors = {}, {}
        with no_decoder_warnings():
            for outcome in self._run.parts(chunk.shards, lambda running: False):
                check()
                if outcome.result is not None:
                    parts[outcome.shard.index] = outcome.result
                    parent().tell(("saved", outcome.result.rows))
                else:
                    errors[outcome.shard.index] = str(outcome.error)
        return ChunkResult(parts, errors, self._run.take_seconds(), self.source.take_counts())

    def _begin(self) -> DeviceRun:
        retries.set_timeout(self.timeout)
        options = self.options
        if not self.scores:
            return DeviceRun(self.source, self.writer, {}, options, _Telling())
        import torch

        device = self.devices[parent().number % len(self.devices)]
        if device == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // len(self.devices)))
        environment = scoring_environment(find_device(device))
        if environment not in self.writer.head["computed_with"]:
            hint = "start the run on a machine like the workers'" if options.engine == "ray" else "add --mixed-devices"
            raise UserError(f"{device} of a worker is of another kind than the run's first device; {hint}.")
        encoders = load_all(
            options.model,
            options.pretrained,
            options.model_config or (),
            device,
            options.precision,
            compiled=options.compiled,
        )
        head = self.writer.head
        identities = json.loads(json.dumps({column: encoder.identity for column, encoder in encoders.items()}))
        if identities != (head.get("encoders") or {"score": head["encoder"]}):
            raise UserError(
                "a worker has other weights or another config of the model; give all machines the same files."
            )
        for encoder in encoders.values():
            encoder.towers.batch = options.batch_size or encoder.towers.batch
        return DeviceRun(self.source, self.writer, encoders, options, _Telling())


class DevicesRun:
    """Makes parts on several devices; has the methods of `DeviceRun`.

    Args:
        source, writer, options, meter: as for `DeviceRun`.
        devices: a process for each; with `--engine ray`, what each actor uses.
        scores: whether encoders are needed.
    """

    def __init__(
        self,
        source: Source,
        writer: DatasetWriter,
        options: ScoreOptions,
        meter: Meter,
        devices: Sequence[str],
        *,
        scores: bool,
    ) -> None:
        each = options.workers if options.engine == "ray" else max(1, options.worker_count // len(devices))
        self._source, self._meter, self._devices = source, meter, devices
        self._job = DeviceJob(source, writer, replace(options, workers=each), devices, retries.timeout(), scores)
        self._clock = StageClock()
        self.saved = 0
        """Rows of parts that this run has committed."""

    def parts(
        self, shards: Sequence[Shard], finish: Callable[[Sequence[Shard]], bool]
    ) -> Iterator[Outcome[Shard, PartInfo]]:
        """Make and commit the parts of some shards; see `DeviceRun.parts`. After Ctrl-C none are waited for."""
        if not shards:
            return
        options = self._job.options
        on_ray = options.engine == "ray"
        number = (options.concurrency or _RAY_CHUNK) if on_ray else len(self._devices)
        size = max(1, ceil(len(shards) / (number * _CHUNKS)))
        if on_ray:
            size = min(size, _RAY_CHUNK)
        chunks = [Chunk(tuple(shards[i : i + size])) for i in range(0, len(shards), size)]
        outcomes = (
            ray.run(
                self._job,
                chunks,
                workers=options.concurrency and min(options.concurrency, len(chunks)),
                on_message=self._on_message,
                num_gpus=self._gpus(),
                address=options.address,
            )
            if on_ray
            else processes.run(self._job, chunks, workers=min(number, len(chunks)), on_message=self._on_message)
        )
        for outcome in outcomes:
            made = outcome.result or ChunkResult(
                {}, {s.index: str(outcome.error) for s in outcome.shard.shards}, {}, []
            )
            self._clock.add(made.seconds)
            if made.counted:
                self._source.add_counts(made.counted)
            for shard in outcome.shard.shards:
                error = made.errors.get(shard.index)
                yield Outcome(shard, made.parts.get(shard.index), None if error is None else ShardError(error))

    def _gpus(self) -> float:
        """GPUs of an actor."""
        if (given := self._job.options.num_gpus) is not None:
            return given
        return float(self._job.scores and find_device(self._devices[0]).type == "cuda")

    def _on_message(self, message: tuple[Any, ...]) -> None:
        what, *numbers = message
        if what == "saved":
            self.saved += numbers[0]
            return
        (self._meter.skip if what == "skip" else self._meter.add)(*numbers)

    def seconds_left(self, shards: Sequence[Shard]) -> float | None:
        """Not known."""
        return None

    def times(self, shards: int) -> StageTimes:
        """How long the stages took on all devices together."""
        number = len(self._devices)
        each = self._job.options.worker_count
        counts = dict.fromkeys(STAGES, number * each) | {"encode": number}
        return self._clock.times(self._meter.seconds, counts)

    def close(self, *, wait: bool = True) -> None:
        """Nothing is left to end."""
