"""Training, one stage: set up, then step after step over the plan. ``train(config)`` is all of it."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import aligncurate
from aligncurate.errors import NonFiniteError, UserError
from aligncurate.progress import notice
from aligncurate.settings import recorded
from aligntrain.data.index import Facts, Index, build_index
from aligntrain.data.plan import Pack, Plan, plan
from aligntrain.data.reader import MicroBatch, Reader, read_ahead
from aligntrain.model.build import build_config, build_model, build_processor
from aligntrain.model.packing import can_pack
from aligntrain.stage import StageConfig
from aligntrain.training import checkpoint
from aligntrain.training.checkpoint import Position
from aligntrain.training.distributed import Engine, World, attempt, world_of_environment
from aligntrain.training.metrics import Flops, Log, Meters, level_cosines, trains_llm

_BLIND = 100  # so many unreadable images, and no other among them, are no accident
_OWN = {"index.arrow", "stage.json"}  # what a run writes first, by which its folder is known
_TOLD = 5  # unreadable images that are named on the terminal, on every rank


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        out: the folder with the model, where the run came to its end.
        steps: optimizer steps done, earlier runs' included.
        total: steps of the whole stage.
        loss: of the last log line, None where this run made no step.
        facts: what became of the data's rows.
        unreadable: images that could not be decoded, of which nothing was learned.
        seconds: that this run took.
        stopped: 0, or the number of the signal (SIGTERM, SIGINT) that stopped it; there is a checkpoint, and the same
            call goes on from there.
        again: the run had come to its end before, and this call found nothing left to do.
    """

    out: Path
    steps: int
    total: int
    loss: float | None
    facts: Facts
    unreadable: int
    seconds: float
    stopped: int = 0
    again: bool = False


def train(config: StageConfig) -> TrainResult:
    """Run one stage, or go on with it where its last checkpoint left it; export a Hugging Face folder to ``out``.

    Under torchrun or ``accelerate launch`` every process calls it; ``out`` must be a folder that all of them see.

    Raises:
        UserError: the data, the model or the settings cannot be used.
        NonFiniteError: the loss is not finite; the last checkpoint stays.
    """
    if not config.out:
        raise UserError("there is no folder to write to; say --out.")
    with world_of_environment() as world:
        return _train(config, world)


def _train(config: StageConfig, world: World) -> TrainResult:
    started = time.perf_counter()
    out = Path(config.out)
    world.together(lambda: _check_place(config, world))
    start = world.first_does(lambda: checkpoint.start_of(config))
    before = world.first_does(lambda: _earlier(out, config, start)) if config.resume else None

    # The data: tokenised by the first rank, read by all.
    processor = world.together(lambda: build_processor(config))
    shape = world.together(lambda: build_config(config))
    levels = shape.num_levels if shape.align_mode != "none" else 0
    index_file = out / "index.arrow"
    world.first_does(lambda: _prepare(config, processor, levels, index_file))
    index = world.together(lambda: Index(index_file, processor))
    if before is not None and before.data != index.digest:
        raise UserError(f"{out}: the data is not what it was when the run began; name another --out, or say "
                        "--no-resume to begin anew.")  # fmt: skip
    if before is not None and checkpoint.read_finished(out) is not None:
        seconds = time.perf_counter() - started
        return TrainResult(out, before.step, before.step, None, index.facts, before.unreadable, seconds, again=True)

    model, learning = world.together(lambda: build_model(config, processor))
    packed = config.packing == "on"
    if config.packing == "auto":
        packed = world.first_does(lambda: can_pack(model.language_model))

    @lru_cache(maxsize=2)
    def plan_of(epoch: int) -> Plan:
        return plan_epoch(config, index, epoch, packed=packed, world_size=world.size)

    per_epoch = len(plan_of(0))
    total = total_steps(config, per_epoch)
    if world.first and (efficiency := plan_of(0).efficiency(range(min(50, per_epoch)))) < 0.8:
        notice(
            f"only {efficiency:.0%} of what is computed are samples' tokens; a step of {config.batch_size} samples "
            f"makes too few micro-batches of {config.token_budget} tokens for {world.size} ranks, or too uneven ones."
        )

    # The model on its devices, and what updates it.
    flops = Flops(model, trains_llm(config))
    engine = Engine(model, config, world)
    optimizer = make_optimizer(model, config, world.device)
    first = unreadable = stopped = learned = 0
    loss = None
    if before is None and (gone := world.first_does(lambda: checkpoint.forget(out))) and world.first:
        notice(f"{gone} checkpoints of an earlier run in {out} were deleted")
    last = checkpoint.checkpoints(out)[-1:]
    if last:
        position = checkpoint.read_position(last[0])
        first, unreadable = position.step, position.unreadable
        if position.plan != plan_of(position.epoch).hash:
            raise UserError(f"{last[0]}: the steps would not be those that the run began with; name another --out, or "
                            "say --no-resume to begin anew.")  # fmt: skip
        world.together(lambda: checkpoint.load(last[0], model, optimizer))

    def position_at(step: int) -> Position:
        epoch = step // per_epoch
        settings = recorded(config)
        return Position(step, epoch, plan_of(epoch).hash, index.digest, start, settings, unreadable)

    def save(step: int) -> list[Path]:
        return [checkpoint.save(out, model, optimizer, position_at(step), keep=config.keep, world=world)]

    def packs_of_rank() -> Iterator[tuple[Pack, ...]]:
        for step in range(first, total):
            epoch, number = divmod(step, per_epoch)
            yield plan_of(epoch)[number].ranks[world.rank]

    reader = Reader(
        index,
        processor,
        packed=packed,
        with_levels=config.stage == "pretrain" and levels > 0,
        pin=world.device.type == "cuda",
    )
    batches = read_ahead(packs_of_rank(), reader, workers=config.workers, ahead=config.prefetch)
    saved, blind, told = first, 0, 0

    with closing(batches), stop_signals() as asked_to_stop, Log(config, world, first) as log:
        meters = Meters(int(index.levels.max()), levels, flops, world)
        for step in range(first, total):
            waiting = time.perf_counter()
            batch, error = attempt(lambda: next(batches))
            batch = batch or []
            meters.waited(time.perf_counter() - waiting)
            epoch, number = divmod(step, per_epoch)

            # Every step has its own seed, so a resumed run draws the same dropout without any kept state.
            torch.manual_seed(((config.seed * 1_000_003 + step) * 65_537 + world.rank) % 2**63)

            # What the ranks must know of each other before they begin, in one exchange.
            labels = sum(len(micro.token_levels) for micro in batch)
            lost = sum(len(micro.unreadable) for micro in batch)
            seen = sum(micro.images for micro in batch)
            mine = [labels, lost, seen, bool(asked_to_stop), error is not None]
            shared = world.sum(torch.tensor(mine, dtype=torch.float64, device=world.device))
            count, lost, seen, asked, failed = (int(number) for number in shared)
            if failed:
                world.agree(error)
            if asked:
                stopped = asked_to_stop[0] if asked_to_stop else signal.SIGTERM
                break
            unreadable += lost
            blind = 0 if seen else blind + lost
            learned += count
            if blind >= _BLIND or (blind and not first + learned and step + 1 == total):
                reasons = [reason for of_rank in world.gather(reader.reasons(batch)) for reason in of_rank]
                raise UserError(
                    f"step {step + 1}: none of the last {blind:,} images could be read (such as {reasons[0]}); put "
                    "them where the data says that they are, or say --image-root."
                )
            if lost and told < _TOLD:
                for reason in reader.reasons(batch)[: _TOLD - told]:
                    notice(f"{reason}; nothing is learned from it")
                    told += 1

            losses = []
            divisor = torch.tensor(max(count, 1), dtype=torch.float32, device=world.device)
            for n, micro in enumerate(batch, 1):
                micro = micro.to(world.device)
                output = engine.forward_backward(micro.inputs, divisor, last=n == len(batch))
                meters.add(micro, output)
                losses.append(output.token_losses)
            for packs in zip(*plan_of(epoch)[number].ranks, strict=True):
                meters.paid(max(plan_of(epoch).computed(pack) for pack in packs))

            norms = gradient_norms(model, world)
            norm = math.sqrt(sum(n * n for n in norms.values()))
            if not math.isfinite(norm):
                raise NonFiniteError(_not_finite(step, batch, losses, index, world, last))
            scale = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm else 1.0
            rate = learning_rate(config, step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
                if scale < 1:
                    torch._foreach_mul_([p.grad for p in group["params"]], scale)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            if done % config.log_every == 0 or done == total:
                numbers = meters.take()
                loss = numbers["loss"]
                table = level_cosines(model.level_embeddings.weight) if levels else {}
                names = {name.partition(".")[0] for name in learning}
                log.write(
                    {
                        "step": done, "epoch": epoch, **numbers, "lr": rate,
                        "lr_by_module": dict.fromkeys(sorted(names), rate), "grad_norm": norm,
                        "grad_norm_by_module": norms, **table, "unreadable_images": unreadable,
                    },
                    total,
                )  # fmt: skip
            if done % config.save_every == 0 or done == total:
                last, saved = save(done), done

        if stopped and step > saved:
            save(step)

    def finish() -> None:
        checkpoint.export(last[0], config, processor)
        checkpoint.mark_finished(out, checkpoint.read_position(last[0]))

    if not stopped:
        world.first_does(finish)
    seconds = time.perf_counter() - started
    return TrainResult(out, step if stopped else total, total, loss, index.facts, unreadable, seconds, stopped)


def plan_epoch(config: StageConfig, index: Index, epoch: int, *, packed: bool, world_size: int) -> Plan:
    """The plan of one epoch by the settings. Raises UserError when the level weights leave nothing."""
    try:
        return plan(
            index.lengths,
            index.levels,
            index.images,
            seed=config.seed,
            epoch=epoch,
            batch_size=config.batch_size,
            token_budget=config.token_budget,
            world_size=world_size,
            packed=packed,
            level_weights=config.level_weights,
            stratified=config.stratified,
        )
    except ValueError as error:
        raise UserError(f"level_weights is {config.level_weights}: {error}") from None


def total_steps(config: StageConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole stage."""
    steps = steps_per_epoch * config.epochs
    return steps if config.max_steps is None else min(steps, config.max_steps)


def learning_rate(config: StageConfig, step: int, total: int) -> float:
    """Linear warm-up from 0, then half a cosine down to 0, as transformers' ``get_cosine_schedule_with_warmup``."""
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(model: nn.Module, config: StageConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over what learns; weight decay is for matrices."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in learning if p.ndim > 1]
    vectors = [p for p in learning if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=config.fused and device.type == "cuda",
    )


@torch.no_grad()
def gradient_norms(model: nn.Module, world: World) -> dict[str, float]:
    """2-norm of the gradient of every module that learns: projector, level_embeddings, gate, language_model.

    Where gradients are spread over the ranks, each adds up its own part, and all ranks must ask.
    """
    parts: dict[str, list[Tensor]] = {}
    spread = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            grad = parameter.grad
            spread |= isinstance(grad, DTensor)
            parts.setdefault(name.partition(".")[0], []).append(grad.to_local() if isinstance(grad, DTensor) else grad)
    norms = [torch.stack(torch._foreach_norm(grads)).double() for grads in parts.values()]
    squares = torch.stack([norm.square().sum() for norm in norms])
    if spread:
        world.sum(squares)
    return dict(zip(parts, squares.sqrt().tolist(), strict=True))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list to which SIGTERM and Ctrl-C are added, so that the step in progress ends and a checkpoint is written.

    A second Ctrl-C is a KeyboardInterrupt.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield caught
        return

    def note(number: int, _: Any) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_place(config: StageConfig, world: World) -> None:
    """Raise UserError where the settings cannot be followed here: the folder, the device."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: --out must be a folder, but this is a file.")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    strangers = sorted(name for name in there - _OWN if not name.startswith("."))
    if strangers and not there & _OWN:
        raise UserError(f"{out}: the output folder holds other files ({strangers[0]}); name a new folder.")
    for name in ("init", "llm", "vision"):
        if (folder := getattr(config, name)) is not None and out.resolve() == Path(folder).resolve():
            raise UserError(f"{out}: --out is the same folder as --{name}, which would be overwritten; name another.")
    if world.device.type == "cpu" and config.attention.startswith(("flex", "flash")):
        raise UserError(f"attention is {config.attention}, which cannot train on a CPU; choose sdpa or eager.")


def _earlier(out: Path, config: StageConfig, start: str) -> Position | None:
    """Where an earlier run in ``out`` stands. Raises UserError where it had other settings or another start."""
    position, where = checkpoint.read_finished(out), out
    if position is None and (found := checkpoint.checkpoints(out)):
        position, where = checkpoint.read_position(found[-1]), found[-1]
    if position is not None:
        checkpoint.check_settings(where, position, config)
        if position.start != start:
            raise UserError(f"{where}: the model in {config.init} is not the one that the run began with; name another "
                            "--out, or say --no-resume to begin anew.")  # fmt: skip
    return position


def _prepare(config: StageConfig, processor: Any, levels: int, index_file: Path) -> None:
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    index = build_index(config, processor, levels, index_file)
    versions = {library.__name__: library.__version__ for library in (aligncurate, torch, transformers)}
    (out / "stage.json").write_text(json.dumps({**config.to_json(), "versions": versions}, indent=1), "utf-8")
    facts = index.facts
    for cause, count in facts.skipped.most_common(5):
        notice(f"{count:,} rows were left out: {cause} (such as {facts.examples[cause]})")
    if (config.stratified or config.level_weights) and set(facts.levels) == {0}:
        notice("the data has no levels, so that level_weights and stratified change nothing")
    if facts.truncated:
        notice(f"{facts.truncated:,} samples were cut at {config.max_length} tokens")


def _not_finite(
    step: int, batch: list[MicroBatch], losses: list[Tensor], index: Index, world: World, found: list[Path]
) -> str:
    """The sentence for a loss that is not finite, with the keys of the samples it comes from; all ranks must ask."""
    guilty = []
    for micro, losses_M in zip(batch, losses, strict=True):
        wrong = sorted(set(micro.token_samples[~losses_M.isfinite().cpu()].tolist()))
        guilty += [index.key(micro.samples[position]) for position in wrong]
    keys = [key for of_rank in world.gather(guilty) for key in of_rank]
    what = "the loss is not finite"
    if not keys:  # overflow in the backward pass alone
        what = "the gradient is not finite"
        own = [index.key(number) for micro in batch for number in micro.samples]
        keys = [key for of_rank in world.gather(own) for key in of_rank]
    kept = f"{found[-1]} is the last checkpoint" if found else "there is no checkpoint yet"
    return (
        f"step {step + 1}: {what} in {', '.join(keys[:20])} (one of them, or those packed with it); {kept}, and a "
        "lower learning rate may help."
    )
