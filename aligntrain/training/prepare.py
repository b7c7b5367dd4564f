"""Preparation before the first step: the output folder, the run to resume, the tokenized data."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import aligncurate
from aligncurate.errors import UserError
from aligncurate.io.files import claim, write_json
from aligncurate.progress import count, notice
from aligncurate.sources.base import Source
from aligntrain.data.index import Index
from aligntrain.data.indexing import build_index, open_data
from aligntrain.data.levels import warn_of_levels, with_levels_of
from aligntrain.data.plan import Plan
from aligntrain.data.schedule import shortfall
from aligntrain.data.sealed import DamagedError
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.stage import StageConfig
from aligntrain.training import checkpoint
from aligntrain.training.build import build_config, build_processor
from aligntrain.training.checkpoint import Position
from aligntrain.training.distributed import World

_OWN = {"index.arrow", "stage.json"}  # files by which a folder is recognised as one of ours


@dataclass(frozen=True)
class StageData:
    """The tokenized data of a run, and what is known about the model it starts from.

    Attributes:
        config: the settings, with the number of levels that the data has.
        processor: of the model.
        index: the tokenized samples.
        levels: number of levels N of the model; 0 without alignment.
        start: digest of the start model.
        earlier: the run to resume, if any.
    """

    config: StageConfig
    processor: AlignGPTProcessor
    index: Index
    levels: int
    start: str
    earlier: Earlier | None


@dataclass(frozen=True)
class Earlier:
    """An earlier run in the output folder: where it stopped, and its checkpoint; None if its model is complete."""

    position: Position
    checkpoint: Path | None


def prepare_data(config: StageConfig, world: World, claims: ExitStack) -> StageData:
    """Claim the output folder, tokenize the data on the first rank, and open its index on all.

    Raises UserError when the settings cannot be used here, or when an earlier run in the folder differs.
    """
    out = Path(config.out)
    world.together(lambda: _check_conflicts(config, world))
    processor = world.together(lambda: build_processor(config))
    sources: list[Source] = []  # of the first rank, which reads for all
    world.first_does(lambda: sources.append(open_data(config)))
    config = world.first_does(lambda: with_levels_of(sources[0], config))
    shape = world.together(lambda: build_config(config))
    levels = shape.num_levels if shape.align_mode != "none" else 0
    world.first_does(lambda: claims.enter_context(claim(out, _OWN)))  # before reading what another run may change
    start = world.first_does(lambda: checkpoint.start_of(config))
    earlier = world.first_does(lambda: _earlier(out, config, start)) if config.resume else None
    index_file = out / "index.arrow"
    world.first_does(lambda: _write_index(sources[0], config, processor, levels, index_file))
    index = world.together(lambda: Index(index_file, processor))
    if earlier is not None and earlier.position.data != index.digest:
        raise UserError(
            f"{out}: the data has changed since this run started; use another --out, or --no-resume to start over."
        )
    return StageData(config, processor, index, levels, start, earlier)


def warn_of_waste(config: StageConfig, first: Plan, total: int, ranks: int) -> None:
    """Warn if there are fewer steps than asked for, if the first compute mostly padding, or if nothing is learned."""
    if short := shortfall(config, total):
        notice(short)
    if len(first.order) < config.batch_size:
        samples = count(len(first.order), "sample")
        notice(f"an epoch has {samples}, fewer than --batch-size {config.batch_size}, so it is a single step")
    if (efficiency := first.efficiency(range(min(50, len(first))))) < 0.8:
        notice(
            f"only {efficiency:.0%} of the computed tokens are data, the rest is padding: a batch of "
            f"{config.batch_size} does not fill the micro-batches ({config.token_budget} tokens) of "
            f"{count(ranks, 'rank')} evenly; raise --batch-size or change --token-budget"
        )
    if config.learning_rate == 0 and not config.projector_lr:
        notice("--learning-rate 0: the weights will not change")


def _check_conflicts(config: StageConfig, world: World) -> None:
    """Raise UserError if `out` is a folder that the run reads, or if the device cannot run the attention."""
    out = Path(config.out)
    for name in ("init", "llm", "vision"):
        if (folder := getattr(config, name)) is not None and out.resolve() == Path(folder).resolve():
            raise UserError(
                f"{out}: --out is the same folder as --{name}, which would be overwritten; use another --out."
            )
    if world.device.type == "cpu" and config.attention.startswith(("flex", "flash")):
        raise UserError(f"--attention {config.attention}: cannot train on a CPU; use sdpa or eager.")


def _earlier(out: Path, config: StageConfig, start: str) -> Earlier | None:
    """The earlier run in `out`. Raises UserError if it had other settings or another start model, or is damaged."""
    damage = None
    try:
        position = checkpoint.read_finished(out)
    except DamagedError as error:
        position, damage = None, error
    earlier = None if position is None else Earlier(position, None)
    if earlier is None and (saved := checkpoint.newest(out)):
        earlier = Earlier(*saved)
    if damage is not None and earlier is None:
        raise UserError(
            f"{out}: the model is damaged ({damage}), and its checkpoints are gone; restore it, or pass --no-resume to "
            "train again."
        )
    if earlier is not None:
        where = earlier.checkpoint or out
        checkpoint.check_settings(where, earlier.position, config)
        if earlier.position.start != start:
            raise UserError(
                f"{where}: the model in {config.init} has changed since this run started; use another --out, or "
                "--no-resume to start over."
            )
        if damage is not None:
            notice(f"{out}: the model is damaged ({damage}); writing it again from {where.name}")
    return earlier


def _write_index(
    source: Source, config: StageConfig, processor: AlignGPTProcessor, levels: int, index_file: Path
) -> None:
    """Tokenize the data, record the settings, and report rows left out; for the first rank."""
    out = Path(config.out)
    facts = build_index(source, config, processor, levels, index_file).facts
    versions = {library.__name__: library.__version__ for library in (aligncurate, torch, transformers)}
    write_json(out / "stage.json", {**config.to_json(), "versions": versions})
    for cause, rows in facts.skipped.most_common():
        notice(f"{count(rows, 'row')} skipped: {cause} (such as {facts.examples[cause]})")
    if (config.stratified or config.level_weights) and set(facts.levels) == {0}:
        notice("the data has no levels, so --level-weights and --stratified have no effect")
    warn_of_levels(config, facts, levels)
    if facts.moved_system:
        notice(
            "the chat template has no place for a system turn, so it became the start of the first question in "
            f"{count(facts.moved_system, 'sample')}"
        )
    if facts.truncated:
        notice(f"{count(facts.truncated, 'sample')} truncated at {config.max_length:,} tokens")
