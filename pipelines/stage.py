"""What every whole run does with a training stage."""

from aligncurate.errors import UserError
from aligntrain import StageConfig, train
from aligntrain.training.loop import TrainResult


def run_stage(config: StageConfig) -> TrainResult:
    """Train a stage to its end, or go on with it. Raises UserError when it was stopped before, by SIGTERM."""
    summary = train(config)
    if summary.stopped:
        raise UserError(f"stopped after step {summary.steps:,} of {summary.total:,}; run the same command to go on.")
    return summary
