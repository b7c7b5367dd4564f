"""Checkpoints: a folder per checkpoint that is either whole or not there, and the final Hugging Face folder.

    OUT/checkpoints/step-00000500/
        weights-00000.safetensors     what learns, in float32; the rest is where the run started from
        optimizer-00000.safetensors   AdamW's two moments of each of them
        position.json                 stage, seed, epoch, step, plan hash, settings

    OUT/finished.json                 the last position.json, once the model is exported

A checkpoint is written under another name, synced and renamed. Tensors are stored whole, so any number of ranks can
go on from it. There is no random state to keep: learning rates are a function of the step, and every step seeds its
own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from aligncurate.errors import UserError
from aligncurate.io.files import sync
from aligncurate.settings import recorded
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.build import build_model, save_processor
from aligntrain.model.loading import quiet_transformers
from aligntrain.stage import StageConfig
from aligntrain.training.distributed import World, attempt, whole
from aligntrain.training.lora import merge_lora

_NAME = re.compile(r"step-(\d{8})")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FILE_BYTES = 4 << 30
_FINISHED = "finished.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps that are done.
        epoch: the epoch of the next one.
        plan: hash of that epoch's plan.
        data: digest of the index.
        start: names the model that the run started from, see ``start_of``.
        settings: those of StageConfig that alter the result.
        unreadable: images that could not be decoded so far.
    """

    step: int
    epoch: int
    plan: str
    data: str
    start: str
    settings: dict[str, Any]
    unreadable: int = 0


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest last."""
    folder = out / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found)


def save(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position, *, keep: int, world: World
) -> Path:
    """Write a checkpoint and delete all but the newest ``keep``. All ranks call it; the first one writes."""
    target = out / "checkpoints" / f"step-{position.step:08d}"
    temporary = target.with_name(f".tmp-{target.name}")

    def clear() -> None:
        for left in target.parent.glob(".tmp-*"):  # by a run that was killed
            shutil.rmtree(left)
        temporary.mkdir(parents=True)

    world.first_does(clear)
    error = _write(temporary, "weights", _weights(model), world)
    error = _write(temporary, "optimizer", _moments(model, optimizer), world) or error

    def commit() -> None:
        if error is not None:
            raise UserError(f"{target}: the checkpoint cannot be written ({error}); the one before it stays.")
        (temporary / "position.json").write_text(json.dumps(asdict(position), indent=1), "utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
        sync(target.parent)
        for old in checkpoints(out)[:-keep]:  # renamed first, so that none is ever there in part
            shutil.rmtree(old.replace(old.with_name(f".tmp-{old.name}")))

    world.first_does(commit)
    return target


def read_position(folder: Path) -> Position:
    """Where the run stood that wrote this checkpoint."""
    return Position(**json.loads((folder / "position.json").read_text("utf-8")))


def read_finished(out: Path) -> Position | None:
    """Where the run ended whose model is in ``out``; None where there is none, or it is not whole."""
    file = out / _FINISHED
    if not (file.is_file() and (out / "config.json").is_file()):
        return None
    return Position(**json.loads(file.read_text("utf-8")))


def mark_finished(out: Path, position: Position) -> None:
    """Say that the model in ``out`` is whole, and what it was made of."""
    temporary = out / f".tmp-{_FINISHED}"
    temporary.write_text(json.dumps(asdict(position), indent=1), "utf-8")
    sync(temporary)
    temporary.replace(out / _FINISHED)


def forget(out: Path) -> int:
    """Delete an earlier run's checkpoints; its model stays until the new one is there. Returns how many there were."""
    found = len(checkpoints(out))
    (out / _FINISHED).unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return found


def start_of(config: StageConfig) -> str:
    """Names the model in ``init``, of which a checkpoint has only what learns; empty where that is not known.

    It is told by its configuration and, where training wrote it, by the data, settings and steps that made it.
    """
    digest = hashlib.sha256()
    files = [Path(config.init or "") / name for name in ("config.json", _FINISHED)]
    known = [file.read_bytes() for file in files if config.init is not None and file.is_file()]
    for part in known:
        digest.update(part)
    return digest.hexdigest()[:16] if known else ""


def check_settings(folder: Path, before: Position, config: StageConfig) -> None:
    """Raise UserError where the checkpoint's run had other settings that alter the result."""
    now = recorded(config)
    names = [name for name in now if now[name] != before.settings.get(name)]
    if names:
        changes = ", ".join(f"{name}: {before.settings.get(name)} before, {now[name]} now" for name in names[:3])
        raise UserError(f"{folder}: the run was begun with other settings ({changes}); name another --out, or say "
                        "--no-resume to begin anew.")  # fmt: skip


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take weights and moments from a checkpoint, on however many ranks.

    Raises UserError when the checkpoint is of other shapes.
    """
    load_weights(folder, model)
    learning = dict(_learning(model))
    for entry, tensor in read_tensors(folder, "optimizer"):
        name, _, kind = entry.rpartition("|")
        parameter = learning[name]
        if kind in _MOMENTS:
            tensor = _like(tensor, parameter)
        elif optimizer.defaults.get("fused"):  # counts its steps on the GPU, other AdamWs on the CPU
            tensor = tensor.to(parameter.device)
        optimizer.state[parameter][kind] = tensor


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into the model, one tensor after the other.

    Raises UserError where they do not fit.
    """
    learning = dict(_learning(model))
    shapes = tensor_shapes(folder, "weights")
    for name in sorted(shapes.keys() ^ learning.keys()):
        raise UserError(f"{folder}: {name} is in only one of the checkpoint and the model; name another --out.")
    for name, parameter in learning.items():
        if parameter.shape != shapes[name]:
            raise UserError(f"{folder}: {name} has shape {shapes[name]}, but the model needs "
                            f"{tuple(parameter.shape)}; name another --out.")  # fmt: skip
    with torch.no_grad():
        for name, tensor in read_tensors(folder, "weights"):
            learning[name].copy_(_like(tensor, learning[name]))


def export(checkpoint: Path, config: StageConfig, processor: AlignGPTProcessor) -> None:
    """Make ``config.out`` a plain Hugging Face folder, model and processor, of a checkpoint's weights.

    The model is built anew around them, which needs no other rank, and LoRA adapters are merged.
    """
    model, _ = build_model(config.replace(checkpointing=False), processor)
    load_weights(checkpoint, model)
    if config.lora_rank is not None:
        merge_lora(model)
    model.to(torch.bfloat16 if config.dtype == "bf16" else torch.float32)
    out = Path(config.out)
    temporary = out / ".tmp-model"
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(temporary)
    save_processor(processor, temporary)
    # The configuration goes first and comes last: a folder that has one has everything.
    for stale in (out / "config.json", *out.glob("*.safetensors*")):
        stale.unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        sync(path)
        path.replace(out / path.name)
    temporary.rmdir()
    sync(out)


def read_tensors(folder: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, ``weights`` or ``optimizer``, by name."""
    for file in sorted(folder.glob(f"{kind}-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                yield name, tensors.get_tensor(name)


def tensor_shapes(folder: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, without reading these."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob(f"{kind}-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _learning(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, whole(parameter.detach())) for name, parameter in _learning(model))


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _learning(model):
        state = optimizer.state[parameter]
        yield from ((f"{name}|{moment}", whole(state[moment])) for moment in _MOMENTS)
        yield f"{name}|step", state["step"]


def _write(folder: Path, kind: str, tensors: Iterable[tuple[str, Tensor]], world: World) -> Exception | None:
    """Every rank goes through the tensors, for each is put together from all of them; the first one keeps them.

    Where writing fails (a full disk) it goes on through the tensors, or the other ranks would wait for ever, and
    returns the error in the end.
    """
    files, size, error = 0, 0, None
    held: dict[str, Tensor] = {}

    def flush() -> Exception | None:
        return attempt(lambda: save_file(held, folder / f"{kind}-{files:05d}.safetensors"))[1]

    for name, tensor in tensors:
        if world.first and error is None:
            held[name] = tensor.cpu().contiguous()
            size += tensor.nbytes
            if size >= _FILE_BYTES:
                error = flush()
                files, held, size = files + 1, {}, 0
    return error or (flush() if held else None)


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the parameter's device, or spread over the ranks as it is."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
