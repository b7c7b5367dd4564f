"""Unreadable images during training: counted, named on the terminal, and fatal if no image can be read."""

from __future__ import annotations

from collections.abc import Callable

from aligncurate.errors import UserError
from aligncurate.progress import count, notice
from aligntrain.training.distributed import World

_LIMIT = 100  # this many unreadable images in a row are no accident
_NAMED = 5  # unreadable images that each rank names on the terminal


class ImageHealth:
    """Counts the images that could not be read.

    Args:
        world: all ranks.
        unreadable: images that could not be read before the run was resumed.

    Attributes:
        unreadable: images that could not be read so far, over all ranks.
    """

    def __init__(self, world: World, unreadable: int = 0) -> None:
        self.unreadable = unreadable
        self._world = world
        self._in_a_row = self._named = 0

    def check(self, step: int, readable: int, unreadable: int, reasons: Callable[[], list[str]], *, last: bool) -> None:
        """Count the images of a step; every rank must call it.

        Args:
            step: number of the step, from 1.
            readable, unreadable: images of the step, over all ranks.
            reasons: gives one sentence for each of this rank's unreadable images.
            last: whether the run ends with this step and has had nothing to learn from.

        Raises UserError when none of the last 100 images could be read, or none of the whole run.
        """
        self.unreadable += unreadable
        self._in_a_row = 0 if readable else self._in_a_row + unreadable
        if self._in_a_row >= _LIMIT or (self._in_a_row and last):
            first = next(reason for of_rank in self._world.gather(reasons()) for reason in of_rank)
            raise UserError(
                f"step {step}: none of the last {count(self._in_a_row, 'image')} could be read (such as {first}); "
                "put the images where the data expects them, or pass --image-root."
            )
        if unreadable and self._named < _NAMED:
            for reason in reasons()[: _NAMED - self._named]:
                notice(f"{reason}; the sample is skipped")
                self._named += 1
