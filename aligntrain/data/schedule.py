"""The plan of a stage: its epochs and its number of steps, from the settings and the tokenized data."""

from __future__ import annotations

from aligncurate.errors import UserError
from aligncurate.progress import count
from aligntrain.data.index import Index
from aligntrain.data.plan import Plan, plan
from aligntrain.stage import StageConfig


def plan_epoch(config: StageConfig, index: Index, epoch: int, *, packed: bool, world_size: int) -> Plan:
    """The plan of one epoch. Raises UserError when the level weights leave no samples."""
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
        raise UserError(f"--level-weights {config.level_weights}: {error}") from None


def total_steps(config: StageConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole stage."""
    steps = steps_per_epoch * config.epochs
    return steps if config.max_steps is None else min(steps, config.max_steps)


def shortfall(config: StageConfig, total: int) -> str:
    """Why a stage of `total` steps has fewer than --max-steps, and how to get more; empty if it has not."""
    if config.max_steps is None or config.max_steps <= total:
        return ""
    per_epoch = total // config.epochs
    enough = -(-config.max_steps // per_epoch)
    return (
        f"{count(config.epochs, 'epoch')} of the data {'has' if config.epochs == 1 else 'have'} "
        f"{count(total, 'step')}, fewer than --max-steps {config.max_steps:,}; pass --epochs {enough} to reach it"
    )
