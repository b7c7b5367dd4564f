"""One process or many: the ranks, how they exchange values and errors, and the model in parallel (DDP, FSDP2).

torchrun and `accelerate launch` set RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from aligncurate.errors import UserError
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.stage import StageConfig
from aligntrain.training.build import layers_of

T = TypeVar("T")
# Ranks wait while the first one tokenizes the data or writes a checkpoint. If a process dies, its launcher stops the
# others, so a long time-out is safe.
_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """The processes (ranks) of a run, seen from this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that reads, writes and prints for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Every rank does `work`; an error on one rank stops all ranks, so that none waits forever."""
        if self.size == 1:
            return work()
        value, error = attempt(work)
        self.agree(error)
        return value  # type: ignore[return-value]  # there was no error

    def first_does(self, work: Callable[[], T]) -> T:
        """The first rank does `work` and all ranks get its result; an error stops all ranks."""
        value, error = attempt(work) if self.first else (None, None)
        self.agree(error)
        if self.size > 1:
            values = [value]
            dist.broadcast_object_list(values, src=0)
            value = values[0]
        return value  # type: ignore[return-value]  # as above

    def agree(self, error: Exception | None) -> None:
        """Raise this rank's error, or else that of the first rank with one; every rank must call it."""
        own = None if error is None else (isinstance(error, UserError), str(error) or type(error).__name__)
        errors = self.gather(own)
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                is_user_error, message = other
                raise UserError(message) if is_user_error else RuntimeError(f"rank {rank}: {message}")


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of `work` and None, or None and the exception it raised."""
    try:
        return work(), None
    except Exception as error:
        return None, error


@contextmanager
def world_of_environment() -> Iterator[World]:
    """The ranks of this run; joins the process group, and leaves it at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    joins = size > 1 and not dist.is_initialized()
    if joins:
        # Python objects go over gloo, which can wait while the first rank tokenizes or writes for long.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield World(rank, size, device)
    finally:
        if joins:
            dist.destroy_process_group()


class ParallelModel:
    """The model on all ranks: a copy on each (DDP), or a shard on each (FSDP2, by decoder layer).

    Args:
        model: the same on every rank; moved to the device.
        config: parallel, dtype, compile.
        world: all ranks.
    """

    def __init__(self, model: AlignGPTForConditionalGeneration, config: StageConfig, world: World) -> None:
        self.model, self._world = model, world
        kind = config.parallel if config.parallel != "auto" else {"pretrain": "ddp"}.get(config.stage, "fsdp")
        self.sharded = world.size > 1 and kind == "fsdp"
        self._half = config.dtype == "bf16"
        if config.compile:
            for layer in _regions(model):
                layer.compile(dynamic=True)
        self._forward: nn.Module = model
        if self.sharded:
            self._shard(model)
        else:
            model.to(world.device)
            if world.size > 1:
                self._forward = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def _shard(self, model: AlignGPTForConditionalGeneration) -> None:
        mesh = init_device_mesh(self._world.device.type, (self._world.size,))
        # Gradients are reduced in float32, and each rank keeps its shard of the float32 master weights.
        policy = MixedPrecisionPolicy(torch.bfloat16 if self._half else torch.float32, torch.float32)
        for layer in _regions(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        # The rest (projector, level embeddings, gate, vocabulary) is one group that stays gathered from forward to
        # backward, so that ranks with and without images synchronise at the same points.
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        model.to(self._world.device)

    def forward_backward(self, inputs: dict[str, Tensor], count: int, last: bool) -> Any:
        """Run one micro-batch; the gradients add up to those of the mean loss over the whole step.

        Args:
            inputs: arguments of the model's forward.
            count: supervised tokens of the whole step, over all ranks.
            last: whether it is the last of the step, after which the ranks exchange gradients.

        Returns:
            The model's output.
        """
        no_exchange: Any = nullcontext()
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        elif self._world.size > 1 and not last:
            assert isinstance(self._forward, DistributedDataParallel)
            no_exchange = self._forward.no_sync()
        with no_exchange:
            half = self._half and not self.sharded  # FSDP2 casts by itself
            with torch.autocast(self._world.device.type, torch.bfloat16, enabled=half):
                # DDP and FSDP average gradients over the ranks, but the step's loss is a sum over them. The divisor is
                # not a tensor, which FSDP2 would round to bfloat16.
                output = self._forward(**inputs, num_items_in_batch=count / self._world.size)
            output.loss.backward()
        return output


def _regions(model: AlignGPTForConditionalGeneration) -> list[nn.Module]:
    return [*layers_of(model.language_model), *layers_of(model.vision_tower)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered from all ranks; every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
