"""How every pipeline runs a training stage."""

from aligncurate.errors import UserError
from aligntrain import StageConfig, train
from aligntrain.training.loop import TrainResult


def run_stage(config: StageConfig) -> TrainResult:
    """Train a stage, or resume it. Raises UserError when a signal stopped it before the end."""
    summary = train(config)
    if summary.stopped:
        raise UserError(f"interrupted after step {summary.steps:,} of {summary.total:,}; rerun to resume.")
    return summary
