"""Checkpoints of a run: saved atomically, and loaded to resume on any number of ranks.

    OUT/checkpoints/step-00000500/
        weights-00000.safetensors     trained weights in float32; the others come from the start model
        optimizer-00000.safetensors   AdamW's two moments of each
        position.json                 stage, seed, epoch, step, plan hash, settings
        files.json                    size and sha256 of the files above

    OUT/finished.json                 the last position, and size and sha256 of the exported model's files

A checkpoint is written under a temporary name, synced and renamed. It is compared with its list before a run resumes
from it; a damaged one is set aside, and the one before it is used. Tensors are stored unsharded, so any number of
ranks can resume from it. No random state is stored: the learning rate is a function of the step, and every step sets
its own seed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from aligncurate.errors import UserError
from aligncurate.io.files import TEMPORARY, sync, use_umask
from aligncurate.progress import notice
from aligncurate.settings import recorded
from aligntrain.data.sealed import DamagedError, check_files, list_files, read_sealed, read_unsealed, write_sealed
from aligntrain.stage import StageConfig
from aligntrain.training.distributed import World, attempt, whole

_NAME = re.compile(r"step-(\d{8})")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FILE_BYTES = 4 << 30
_FINISHED = "finished.json"
_POSITION = "position.json"
_FILES = "files.json"


@dataclass(frozen=True)
class Position:
    """How far a run got, and what it was started with.

    Attributes:
        step: optimizer steps done.
        epoch: epoch of the next step.
        plan: hash of that epoch's plan.
        data: digest of the index.
        start: digest of the model that the run started from, see `start_of`.
        settings: the recorded ones of StageConfig, which change the result.
        unreadable: images that could not be read so far.
    """

    step: int
    epoch: int
    plan: str
    data: str
    start: str
    settings: dict[str, Any]
    unreadable: int = 0

    @classmethod
    def of(cls, file: Path, stored: dict[str, Any]) -> Position:
        """What `dataclasses.asdict` made of a position. Raises DamagedError if another version wrote it."""
        try:
            position = cls(**stored)
        except TypeError:
            raise DamagedError(f"{file.name} is of another version") from None
        if list(map(type, vars(position).values())) != [int, int, str, str, str, dict, int]:
            raise DamagedError(f"{file.name} is not as it was written")
        return position


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, newest last."""
    folder = out / "checkpoints"
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def save(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position, *, keep: int, world: World
) -> Path:
    """Write a checkpoint and delete all but the newest `keep`. All ranks call it; the first one writes.

    Raises UserError on all ranks when it cannot be written.
    """
    target = out / "checkpoints" / f"step-{position.step:08d}"
    temporary = target.with_name(f"{TEMPORARY}{target.name}")

    def clear() -> None:
        for stale in target.parent.glob(f"{TEMPORARY}*"):  # of a killed run
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)

    world.first_does(clear)
    error = _write(temporary, "weights", _weights(model), world)
    error = _write(temporary, "optimizer", _moments(model, optimizer), world) or error

    def commit() -> None:
        if error is not None:
            raise UserError(f"{target}: the checkpoint cannot be written ({error}); the previous one is kept.")
        use_umask(temporary.glob("*.safetensors"))
        write_sealed(temporary / _POSITION, asdict(position))
        write_sealed(temporary / _FILES, {"files": list_files(temporary.iterdir())})
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
        sync(target.parent)
        for old in checkpoints(out)[:-keep]:  # renamed first, so that a half-deleted one never looks complete
            shutil.rmtree(old.replace(old.with_name(f"{TEMPORARY}{old.name}")))

    world.first_does(commit)
    return target


def read_position(folder: Path) -> Position:
    """The position that a checkpoint was saved at. Raises DamagedError if any file of the checkpoint is damaged."""
    if not (folder / _FILES).exists() and (unsealed := read_unsealed(folder / _POSITION)) is not None:
        _check_unlisted(folder)
        return Position.of(folder / _POSITION, unsealed)
    check_files(folder, read_sealed(folder / _FILES)["files"])
    return Position.of(folder / _POSITION, read_sealed(folder / _POSITION))


def newest(out: Path) -> tuple[Position, Path] | None:
    """The newest intact checkpoint of a run, None if it has none yet; damaged ones are set aside with a notice.

    Raises UserError if all of them are damaged.
    """
    saved = checkpoints(out)
    damage: dict[Path, DamagedError] = {}
    for folder in reversed(saved):
        try:
            position = read_position(folder)
        except DamagedError as error:
            damage[folder] = error
            continue
        for damaged, reason in damage.items():
            notice(f"{damaged}: the checkpoint is damaged ({reason}); resuming from {folder.name}")
            aside = damaged.with_name(f"{damaged.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
        return position, folder
    if saved:
        reason = damage[saved[-1]]
        raise UserError(
            f"{saved[-1]}: the checkpoint is damaged ({reason}), and there is no intact one before it; restore it, or "
            "pass --no-resume to start over."
        )
    return None


def read_finished(out: Path) -> Position | None:
    """The final position of the run whose model is in `out`; None if none is finished.

    Raises DamagedError if a file of the model is damaged.
    """
    file = out / _FINISHED
    if not file.is_file():
        return None
    if (unsealed := read_unsealed(file)) is not None:
        return Position.of(file, unsealed) if (out / "config.json").is_file() else None
    stored = read_sealed(file)
    check_files(out, stored.pop("files", {_FINISHED: {"bytes": -1}}))
    return Position.of(file, stored)


def mark_finished(out: Path, position: Position, model: Iterable[str]) -> None:
    """Record that the model in `out`, with these files, is complete, and what it was trained from."""
    write_sealed(out / _FINISHED, {**asdict(position), "files": list_files(out / name for name in model)})


def forget(out: Path) -> int:
    """Delete the checkpoints of an earlier run and return their number; its model stays until it is replaced."""
    number = len(checkpoints(out))
    (out / _FINISHED).unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return number


def start_of(config: StageConfig) -> str:
    """Digest that identifies the model in `init`, whose frozen weights a checkpoint leaves out; empty if unknown.

    It covers the model's configuration and, if our training wrote it, the data, settings, steps and weights. Raises
    UserError if these weights are damaged.
    """
    if config.init is None:
        return ""
    folder = Path(config.init)
    known = [file.read_bytes() for file in (folder / "config.json", folder / _FINISHED) if file.is_file()]
    if (folder / _FINISHED).is_file() and read_unsealed(folder / _FINISHED) is None:
        try:
            listed = read_sealed(folder / _FINISHED).get("files", {})
            check_files(folder, {name: facts for name, facts in listed.items() if name.endswith(".safetensors")})
        except DamagedError as error:
            raise UserError(f"{folder}: the model is damaged ({error}); run its training again to mend it.") from None
    return hashlib.sha256(b"".join(known)).hexdigest()[:16] if known else ""


def check_settings(folder: Path, before: Position, config: StageConfig) -> None:
    """Raise UserError if the run was started with other settings, of those that change the result."""
    now = recorded(config)
    names = [name for name in now if now[name] != before.settings.get(name)]
    if names:
        changes = ", ".join(f"{name}: {before.settings.get(name)} before, {now[name]} now" for name in names[:3])
        raise UserError(f"{folder}: this run started with different settings ({changes}); use another --out, or "
                        "--no-resume to start over.")  # fmt: skip


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer moments from a checkpoint, on any number of ranks.

    Raises UserError when the shapes differ.
    """
    load_weights(folder, model)
    trained = dict(_trained(model))
    for entry, tensor in read_tensors(folder, "optimizer"):
        name, _, kind = entry.rpartition("|")
        parameter = trained[name]
        if kind in _MOMENTS:
            tensor = _like(tensor, parameter)
        elif optimizer.defaults.get("fused"):  # fused AdamW keeps the step count on the GPU, others on the CPU
            tensor = tensor.to(parameter.device)
        optimizer.state[parameter][kind] = tensor


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into the model, one tensor at a time.

    Raises UserError when the names or shapes differ.
    """
    trained = dict(_trained(model))
    shapes = tensor_shapes(folder, "weights")
    for name in sorted(shapes.keys() ^ trained.keys()):
        raise UserError(f"{folder}: {name} is in the checkpoint or in the model, but not in both; use another --out.")
    for name, parameter in trained.items():
        if parameter.shape != shapes[name]:
            raise UserError(f"{folder}: {name} has shape {shapes[name]}, but the model needs "
                            f"{tuple(parameter.shape)}; use another --out.")  # fmt: skip
    with torch.no_grad():
        for name, tensor in read_tensors(folder, "weights"):
            trained[name].copy_(_like(tensor, trained[name]))


def read_tensors(folder: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint; `kind` is weights or optimizer."""
    for file in sorted(folder.glob(f"{kind}-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a dict
                yield name, tensors.get_tensor(name)


def tensor_shapes(folder: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors by name, without reading the tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob(f"{kind}-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _check_unlisted(folder: Path) -> None:
    """What can be checked of a checkpoint without list: its files are whole, and every weight has its moments.

    Raises DamagedError if not.
    """
    try:
        weights, moments = (tensor_shapes(folder, kind).keys() for kind in ("weights", "optimizer"))
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"a file cannot be read ({error})") from None
    if not weights or moments != {f"{name}|{kind}" for name in weights for kind in (*_MOMENTS, "step")}:
        raise DamagedError("weights or their moments are missing")


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, whole(parameter.detach())) for name, parameter in _trained(model))


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _trained(model):
        state = optimizer.state[parameter]
        yield from ((f"{name}|{moment}", whole(state[moment])) for moment in _MOMENTS)
        yield f"{name}|step", state["step"]


def _write(folder: Path, kind: str, tensors: Iterable[tuple[str, Tensor]], world: World) -> Exception | None:
    """Write tensors to files on the first rank; the others take part because sharded tensors are gathered from all.

    If writing fails (a full disk), the loop continues, or the other ranks would wait forever; the error is returned.
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
    """The tensor on the parameter's device, sharded like the parameter."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
