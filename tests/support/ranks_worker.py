"""The worker of test_ranks.py: runs several stages on two ranks, one after the other; some of them fail."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aligncurate.errors import UserError
from aligntrain import AlignGPTForConditionalGeneration, StageConfig, train
from aligntrain.data.reader import BatchReader
from aligntrain.training import checkpoint
from aligntrain.training import loop as trainer

warnings.simplefilter("ignore")
torch.set_num_threads(1)
dist.init_process_group("gloo")
real = {
    "reading": BatchReader.__call__, "writing": checkpoint.save_file, "weights": trainer.build_model,
    "dividing": AlignGPTForConditionalGeneration.forward,
}  # fmt: skip


def reading(self: BatchReader, pack: Any) -> Any:
    if dist.get_rank() == 1 and read.append(pack) is None and len(read) > 1:  # one pack a step
        raise RuntimeError("the disk went away")
    return real["reading"](self, pack)


def writing(*_: Any) -> None:
    raise OSError("No space left on device")


def weights(*arguments: Any) -> Any:
    if dist.get_rank() == 1:
        raise RuntimeError("the memory is full")
    return real["weights"](*arguments)


def dividing(self: Any, *arguments: Any, **inputs: Any) -> Any:
    divisor = torch.as_tensor(inputs["num_items_in_batch"])  # as the model gets it, inside FSDP2
    Path(f"{job['out']}.divisor-{dist.get_rank()}").write_text(str(float(divisor)))
    return real["dividing"](self, *arguments, **inputs)


read: list[Any] = []
for job in json.loads(Path(sys.argv[1]).read_text()):
    stage, name = job.pop("stage"), Path(job["out"]).name
    BatchReader.__call__ = reading if name == "reading" else real["reading"]  # type: ignore[method-assign]
    checkpoint.save_file = writing if name == "writing" else real["writing"]
    AlignGPTForConditionalGeneration.forward = dividing if name == "divisor" else real["dividing"]
    trainer.build_model = weights if name == "weights" else real["weights"]
    try:
        train(StageConfig.of(stage, job))
    except (UserError, RuntimeError) as error:
        Path(f"{job['out']}.error-{dist.get_rank()}").write_text(str(error))
dist.destroy_process_group()
