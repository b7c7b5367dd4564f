"""Trains the built-in `tiny` models on drawn scenes.

python -m pipelines.tiny_models --help
python -m pipelines.tiny_models encoder --out aligncurate/encoders/builtin
python -m pipelines.tiny_models vision --out aligntrain/builtin/tiny-vision
python -m pipelines.tiny_models llm --out aligntrain/builtin/tiny-llm
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch


def main() -> None:
    """The command line: train a model and print its metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("encoder", "vision", "llm"), help="model to train")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, the config and the metrics")
    parser.add_argument("--seed", type=int, default=0, help="seed for weights and data order (default: 0)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: those of the shipped weights)")
    # A second thread adds a third at best, and on a busy machine two threads wait for each other.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Unused weights decay to denormal numbers, which are slow.
    torch.set_flush_denormal(True)
    if arguments.model == "encoder":
        from pipelines.tiny_encoder import train_tiny_encoder as train
    elif arguments.model == "vision":
        from pipelines.tiny_vision import train_tiny_vision as train
    else:
        from pipelines.tiny_llm import train_tiny_llm as train
    given = {"steps": arguments.steps} if arguments.steps else {}
    print(json.dumps(train(arguments.out, arguments.seed, **given), indent=2))


if __name__ == "__main__":
    main()
