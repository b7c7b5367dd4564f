"""Training of one stage, from top to bottom: the run (`train`), a step, forward and backward, and what is saved."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligncurate.errors import UserError
from aligncurate.progress import count, notice
from aligncurate.settings import recorded
from aligntrain.data.index import Facts
from aligntrain.data.plan import Pack
from aligntrain.data.reader import BatchReader, MicroBatch, read_ahead
from aligntrain.data.schedule import plan_epoch, total_steps
from aligntrain.model.packing import can_pack
from aligntrain.stage import StageConfig
from aligntrain.training import checkpoint
from aligntrain.training.build import build_model
from aligntrain.training.checkpoint import Position
from aligntrain.training.distributed import ParallelModel, World, attempt, world_of_environment
from aligntrain.training.export import export
from aligntrain.training.flops import Flops, trains_llm
from aligntrain.training.interrupts import stop_signals
from aligntrain.training.log import Log
from aligntrain.training.metrics import Metrics, level_cosines
from aligntrain.training.optimizer import clip_gradients, gradient_norms, make_optimizer, peak_of, schedule, total_norm
from aligntrain.training.prepare import StageData, prepare_data, warn_of_waste
from aligntrain.training.step_checks import ImageHealth, non_finite_error


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        out: folder of the model, if the run finished.
        steps: optimizer steps done, including those of earlier runs.
        total: steps of the whole stage.
        loss: in the last log line; None if this run did no steps.
        facts: statistics of the data, such as skipped rows.
        unreadable: number of images that could not be read; their samples were skipped.
        seconds: duration of this run.
        stopped: number of the signal (SIGTERM, SIGINT) that stopped the run after saving a checkpoint, or 0.
        already_done: the run had finished before, so this one did nothing.
        first_loss: loss in this run's first log line.
    """

    out: Path
    steps: int
    total: int
    loss: float | None
    facts: Facts
    unreadable: int
    seconds: float
    stopped: int = 0
    already_done: bool = False
    first_loss: float | None = None

    def raise_if_stopped(self) -> None:
        """Raise UserError if a signal stopped the run, for scripts that need the finished model."""
        if self.stopped:
            raise UserError(f"interrupted after step {self.steps:,} of {self.total:,}; rerun to resume.")


# ---- the run ---------------------------------------------------------------------------------------


def train(config: StageConfig) -> TrainResult:
    """Run one stage, resuming from its last checkpoint if there is one, and export a Hugging Face folder to `out`.

    Under torchrun or `accelerate launch` every process calls it; `out` must be a folder that all of them can see.

    Raises:
        UserError: the data, the model or the settings cannot be used.
        NonFiniteError: the loss is not finite; the last checkpoint is kept.
    """
    if not config.out:
        raise UserError("no output folder; pass --out.")
    with world_of_environment() as world, ExitStack() as claims:
        return _train(config, world, claims)


def _train(config: StageConfig, world: World, claims: ExitStack) -> TrainResult:
    """Prepare, loop over the steps, export."""
    started = time.perf_counter()
    out = Path(config.out)
    data = prepare_data(config, world, claims)
    config = data.config
    if data.earlier is not None and data.earlier.checkpoint is None:
        done, unreadable = data.earlier.position.step, data.earlier.position.unreadable
        seconds = time.perf_counter() - started
        return TrainResult(out, done, done, None, data.index.facts, unreadable, seconds, already_done=True)

    run = _Run(config, world, data)
    losses, stopped = [], 0
    with closing(run.batches()) as batches, stop_signals() as signals, Log(config, world, run.step) as log:
        run.metrics.reset()
        while run.step < run.total:
            batch, counts = run.next_batch(batches, signals)
            if counts.stopping:
                stopped = signals[0] if signals else signal.SIGTERM
                break
            norms, share = run.update(batch, counts)
            if run.step % config.log_every == 0 or run.step == run.total:
                record = run.record(norms, share)
                losses.append(record["loss"])
                log.write(record, run.total)
            if run.step % config.save_every == 0 or run.step == run.total:
                run.save()
        if stopped and run.step > run.saved:
            run.save()

    if not stopped:
        world.first_does(run.finish)
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    seconds = time.perf_counter() - started
    unreadable = run.health.unreadable
    return TrainResult(out, run.step, run.total, last, data.index.facts, unreadable, seconds, stopped, first_loss=first)


@dataclass(frozen=True)
class _StepCounts:
    """What the ranks tell each other before a step, summed over all of them."""

    labels: int  # supervised tokens
    readable: int  # images
    unreadable: int  # images
    stopping: int  # ranks that received a signal
    failed: int  # ranks that could not read their batch

    def summed(self, world: World) -> _StepCounts:
        sums = world.sum(torch.tensor(astuple(self), dtype=torch.float64, device=world.device))
        return _StepCounts(*(int(number) for number in sums))


class _Run:
    """A stage in progress: plan, model and optimizer, and the number of steps done.

    Attributes:
        step: optimizer steps done.
        total: steps of the whole stage.
        last: the last checkpoint.
        saved: step of the last checkpoint.
    """

    def __init__(self, config: StageConfig, world: World, data: StageData) -> None:
        self.config, self.world, self.data = config, world, data
        self.out, index = Path(config.out), data.index

        # The plan depends on whether the LLM can pack, so the model comes first.
        self.model, trained = world.together(lambda: build_model(config, data.processor))
        self.modules = sorted({name.partition(".")[0] for name in trained})
        self.packed = config.packing == "on"
        if config.packing == "auto":
            self.packed = world.first_does(lambda: can_pack(self.model.language_model))
        self.plan_of = lru_cache(maxsize=2)(
            lambda epoch: plan_epoch(config, index, epoch, packed=self.packed, world_size=world.size)
        )
        self.per_epoch = len(self.plan_of(0))
        self.total = total_steps(config, self.per_epoch)
        if world.first:
            warn_of_waste(config, self.plan_of(0), self.total, world.size)

        # Flops counts parameters, so it comes before the model is sharded.
        flops = Flops(self.model, trains_llm(config))
        self.parallel = ParallelModel(self.model, config, world)
        self.optimizer = make_optimizer(self.model, config, world.device)
        self.metrics = Metrics(int(index.levels.max()), data.levels, flops, world)
        self.reader = BatchReader(
            index,
            data.processor,
            packed=self.packed,
            with_levels=config.stage == "pretrain" and data.levels > 0,
            pin=world.device.type == "cuda",
        )
        position, self.last = self._resume()
        self.step = self.saved = position.step if position else 0
        self.health = ImageHealth(world, position.unreadable if position else 0, trained=self.step > 0)

    def _resume(self) -> tuple[Position | None, Path | None]:
        """Load the last checkpoint and return its position and folder; without --resume, delete all checkpoints."""
        if self.data.earlier is None:
            deleted = self.world.first_does(lambda: checkpoint.forget(self.out))
            if deleted and self.world.first:
                notice(f"deleted {count(deleted, 'checkpoint')} of an earlier run in {self.out}")
            return None, None
        position, folder = self.data.earlier.position, self.data.earlier.checkpoint
        assert folder is not None
        if position.plan != self.plan_of(position.epoch).hash:
            raise UserError(
                f"{folder}: the plan of steps has changed since this run started; use another --out, or "
                "--no-resume to start over."
            )
        self.world.together(lambda: checkpoint.load(folder, self.model, self.optimizer))
        return position, folder

    # ---- a step ------------------------------------------------------------------------------------

    def batches(self) -> Generator[list[MicroBatch]]:
        """This rank's micro-batches of every step to come, read ahead in threads."""

        def packs() -> Iterator[tuple[Pack, ...]]:
            for step in range(self.step, self.total):
                epoch, number = divmod(step, self.per_epoch)
                yield self.plan_of(epoch)[number].ranks[self.world.rank]

        return read_ahead(packs(), self.reader, workers=self.config.workers, ahead=self.config.prefetch)

    def next_batch(
        self, batches: Iterator[list[MicroBatch]], signals: list[int]
    ) -> tuple[list[MicroBatch], _StepCounts]:
        """The micro-batches of the next step, after one exchange between the ranks.

        An error on one rank stops all ranks. Raises UserError when no image can be read.
        """
        started = time.perf_counter()
        batch, error = attempt(lambda: next(batches))
        batch = batch or []
        self.metrics.add_wait(time.perf_counter() - started)
        counts = _StepCounts(
            labels=sum(len(micro.token_levels) for micro in batch),
            readable=sum(micro.images for micro in batch),
            unreadable=sum(len(micro.unreadable) for micro in batch),
            stopping=bool(signals),
            failed=error is not None,
        ).summed(self.world)
        if counts.failed:
            self.world.agree(error)
        if not counts.stopping:
            self.health.check(
                self.step + 1,
                counts.labels,
                counts.readable,
                counts.unreadable,
                lambda: self.reader.reasons(batch),
                last=self.step + 1 == self.total,
            )
        return batch, counts

    def update(self, batch: list[MicroBatch], counts: _StepCounts) -> tuple[dict[str, float], float]:
        """Forward and backward over the step's micro-batches, then the optimizer.

        Returns the gradient norms by module, before clipping, and the share of the peak learning rate.

        Raises NonFiniteError when the loss or a gradient is not finite.
        """
        # Every step sets its own seed, so a resumed run draws the same dropout without saved random state.
        torch.manual_seed(((self.config.seed * 1_000_003 + self.step) * 65_537 + self.world.rank) % 2**63)
        token_losses = self._forward_backward(batch, counts.labels)
        norms = gradient_norms(self.model, self.world)
        norm = total_norm(norms)
        if not math.isfinite(norm):
            raise non_finite_error(self.step + 1, batch, token_losses, self.data.index, self.last, self.world)
        clip_gradients(self.optimizer, norm, self.config.max_grad_norm)
        share = schedule(self.config, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norms, share

    # ---- forward and backward ----------------------------------------------------------------------

    def _forward_backward(self, batch: list[MicroBatch], labels: int) -> list[Tensor]:
        """Accumulate the gradients of the mean loss over the step's labels; returns each micro-batch's token losses."""
        token_losses = []
        for number, micro in enumerate(batch, 1):
            micro = micro.to(self.world.device)
            output = self.parallel.forward_backward(micro.inputs, max(labels, 1), last=number == len(batch))
            self.metrics.add(micro, output)
            token_losses.append(output.token_losses)
        epoch, number = divmod(self.step, self.per_epoch)
        epoch_plan = self.plan_of(epoch)
        for packs in zip(*epoch_plan[number].ranks, strict=True):
            self.metrics.add_computed(max(epoch_plan.computed(pack) for pack in packs))
        return token_losses

    # ---- logging and saving ------------------------------------------------------------------------

    def record(self, norms: dict[str, float], share: float) -> dict[str, Any]:
        """The log record of the step just done; every rank must call it."""
        metrics = self.metrics.take()
        cosines = level_cosines(self.model.level_embeddings.weight) if self.data.levels else {}
        return {
            "step": self.step, "epoch": (self.step - 1) // self.per_epoch, **metrics,
            "lr": share * self.config.learning_rate,
            "lr_by_module": {name: share * peak_of(name, self.config) for name in self.modules},
            "grad_norm": total_norm(norms), "grad_norm_by_module": norms, **cosines,
            "unreadable_images": self.health.unreadable,
        }  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint of the steps done so far."""
        epoch = self.step // self.per_epoch
        position = Position(
            step=self.step,
            epoch=epoch,
            plan=self.plan_of(epoch).hash,
            data=self.data.index.digest,
            start=self.data.start,
            settings=recorded(self.config),
            unreadable=self.health.unreadable,
        )
        self.last = checkpoint.save(
            self.out, self.model, self.optimizer, position, keep=self.config.keep, world=self.world
        )
        self.saved = self.step

    def finish(self) -> None:
        """Export the model of the last checkpoint and mark the run as finished; for the first rank."""
        assert self.last is not None, "the last step saves a checkpoint"
        model = export(self.last, self.config, self.data.processor)
        checkpoint.mark_finished(self.out, checkpoint.read_position(self.last), model)
