"""The training log: a JSONL file, a line on the terminal, and TensorBoard, wandb or trackio."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from aligncurate.errors import UserError
from aligncurate.progress import console, count
from aligntrain.stage import StageConfig
from aligntrain.training.distributed import World


class Log:
    """Writes one record per log line: to log.jsonl, to the terminal and to the loggers in the settings.

    Args:
        config: gives the folder and the loggers.
        world: only the first rank writes.
        step: the step that the run resumes from; later lines of an earlier run are dropped.

    Raises UserError when a logger is not installed.
    """

    def __init__(self, config: StageConfig, world: World, step: int) -> None:
        self._sinks: list[Any] = []
        self._file: Any = None
        world.first_does(lambda: self._open(config, step))

    def _open(self, config: StageConfig, step: int) -> None:
        self._sinks = [_open_logger(name, config, step) for name in config.log_to]
        path = Path(config.out) / "log.jsonl"
        kept = []
        if path.is_file() and step:
            kept = [line for line in path.read_text("utf-8", errors="replace").splitlines() if _step_of(line) <= step]
        path.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        for close, _ in self._sinks:
            close()

    def write(self, record: Mapping[str, Any], total: int) -> None:
        """Write one record; `total` is the number of steps of the whole run."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for _, send in self._sinks:
            send(flatten(record), record["step"])
        console.print(line_of(record, total), markup=True, soft_wrap=True)


def line_of(record: Mapping[str, Any], total: int) -> str:
    """A record as one line of text."""
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    parts = [f"[bold]{record['step']:>{len(str(total))}}/{total}[/]", f"loss [cyan]{loss}[/]"]
    if record["loss_by_level"]:
        worst, best = min(record["loss_by_level"]), max(record["loss_by_level"])
        parts.append(f"level {worst} {record['loss_by_level'][worst]:.3f}, {best} {record['loss_by_level'][best]:.3f}")
    parts.append(f"lr {record['lr']:.2e}")
    parts.append(f"norm {record['grad_norm']:.2f}")
    parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    parts.append(f"packed {record['packing_efficiency']:.0%}")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.0%}")
    if record["data_wait"] > 0.01:
        parts.append(f"[yellow]waited for data {record['data_wait']:.0%}[/]")
    if record["unreadable_images"]:
        parts.append(f"[yellow]{count(record['unreadable_images'], 'unreadable image')}[/]")
    return "  ".join(parts)


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers with flat names, such as `loss_by_level/3` and `gate_weights/1`."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": v for key, v in value.items()}
        elif isinstance(value, list):
            flat |= {f"{name}/{number}": v for number, v in enumerate(value, 1)}
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[name] = value
    return flat


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # a line that a killed run left incomplete
        return math.inf


def _open_logger(name: str, config: StageConfig, step: int) -> tuple[Any, Any]:
    """Functions that close a logger and send it numbers; `step` is where the run resumes."""
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    try:
        library = importlib.import_module(module)
    except ImportError:
        raise UserError(f"--log-to {name}: not installed; run `pip install {name}` or leave it out.") from None
    if name == "tensorboard":
        # purge_step hides what an earlier run logged after the checkpoint that this one resumes from.
        writer = library.SummaryWriter(str(Path(config.out) / "tensorboard"), purge_step=step + 1)

        def send(numbers: Mapping[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return writer.close, send
    place = {"dir": config.out} if name == "wandb" else {}  # not the current folder
    run = library.init(project="aligntrain", name=Path(config.out).name, config=config.to_json(), **place)
    return run.finish, lambda numbers, step: run.log(dict(numbers), step=step)
