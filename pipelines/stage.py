"""Train one stage to its end."""

from __future__ import annotations

from aligncurate.errors import UserError
from aligntrain import StageConfig, train
from aligntrain.training.loop import TrainResult


def run_stage(config: StageConfig) -> TrainResult:
    """Train a stage to its end, resuming from its checkpoints. Raises UserError if a signal stopped it before."""
    summary = train(config)
    if summary.stopped:
        raise UserError(f"stopped after step {summary.steps:,} of {summary.total:,}; rerun the same command to resume.")
    return summary
