"""What can go wrong in a step: images that cannot be read, and a loss that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from aligncurate.errors import NonFiniteError, UserError
from aligncurate.progress import count, notice
from aligntrain.data.index import Index
from aligntrain.data.reader import MicroBatch
from aligntrain.training.distributed import World

_LIMIT = 100  # stop after this many unreadable images in a row
_NAMED = 5  # unreadable images that each rank names on the terminal


class ImageHealth:
    """Counts the images that could not be read.

    Args:
        world: all ranks.
        unreadable: images that could not be read before the run was resumed.
        trained: whether an earlier run did steps.

    Attributes:
        unreadable: images that could not be read so far, over all ranks.
    """

    def __init__(self, world: World, unreadable: int, *, trained: bool) -> None:
        self.unreadable = unreadable
        self._world, self._trained = world, trained
        self._in_a_row = self._named = 0

    def check(
        self, step: int, labels: int, readable: int, unreadable: int, reasons: Callable[[], list[str]], *, last: bool
    ) -> None:
        """Count the images of a step; every rank must call it.

        Args:
            step: number of the step, from 1.
            labels: supervised tokens of the step, over all ranks.
            readable, unreadable: images of the step, over all ranks.
            reasons: gives one sentence for each of this rank's unreadable images.
            last: whether this is the last step of the stage.

        Raises UserError when none of the last 100 images could be read, or when the stage would end without a label.
        """
        self.unreadable += unreadable
        self._trained |= labels > 0
        self._in_a_row = 0 if readable else self._in_a_row + unreadable
        if self._in_a_row >= _LIMIT or (self._in_a_row and last and not self._trained):
            first = next(reason for of_rank in self._world.gather(reasons()) for reason in of_rank)
            raise UserError(
                f"step {step}: none of the last {count(self._in_a_row, 'image')} could be read (such as {first}); "
                "put the images where the data expects them, or pass --image-root."
            )
        if unreadable and self._named < _NAMED:
            for reason in reasons()[: _NAMED - self._named]:
                notice(f"{reason}; the sample is skipped")
                self._named += 1


def non_finite_error(
    step: int, batch: list[MicroBatch], token_losses: list[Tensor], index: Index, last: Path | None, world: World
) -> NonFiniteError:
    """The error for a loss or gradient that is not finite, with the samples' keys; every rank must call it.

    Args:
        step: number of the step, from 1.
        batch: this rank's micro-batches.
        token_losses: losses of each micro-batch's supervised tokens.
        index: gives the keys of the samples.
        last: the last checkpoint, if any.
        world: all ranks.
    """
    what, own = "loss", []
    for micro, losses_M in zip(batch, token_losses, strict=True):
        positions = sorted(set(micro.token_samples[~losses_M.isfinite().cpu()].tolist()))
        own += [index.key(micro.samples[position]) for position in positions]
    keys = [key for of_rank in world.gather(own) for key in of_rank]
    if not keys:  # overflow in the backward pass alone
        what, own = "gradient", [index.key(number) for micro in batch for number in micro.samples]
        keys = [key for of_rank in world.gather(own) for key in of_rank]
    kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return NonFiniteError(
        f"step {step}: the {what} is not finite in {', '.join(keys[:20])} (one of them, or one packed with it); "
        f"{kept}. A lower --learning-rate may help."
    )
