"""What torchrun starts for test_ranks.py: several stages on two ranks, one after the other."""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from aligncurate.errors import UserError
from aligntrain import StageConfig, train

warnings.simplefilter("ignore")
torch.set_num_threads(1)
dist.init_process_group("gloo")
for job in json.loads(Path(sys.argv[1]).read_text()):
    stage = job.pop("stage")
    try:
        train(StageConfig.of(stage, job))
    except UserError as error:
        Path(f"{job['out']}.error-{dist.get_rank()}").write_text(str(error))
dist.destroy_process_group()
