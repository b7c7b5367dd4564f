"""Damaged files of a run: never a traceback, and never other weights than those of the undamaged run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aligncurate.errors import UserError
from aligntrain import StageConfig, train
from aligntrain.data.sealed import DamagedError, read_sealed, write_sealed
from aligntrain.training.checkpoint import checkpoints
from tests.aligntrain.training.test_loop import assert_close, records, weights
from tests.support.stage_data import captions, finetuning, make_models, pretraining, questions

NEWEST, BEFORE = "checkpoints/step-00000004", "checkpoints/step-00000002"
OF_CHECKPOINT = ["position.json", "files.json", "weights-00000.safetensors", "optimizer-00000.safetensors"]


def other_types(data: bytes) -> bytes:
    """JSON whose numbers are texts, and texts numbers; other bytes in a binary file."""
    try:
        value = json.loads(data)
    except ValueError:
        return data[::-1]
    swapped = {name: [1] if isinstance(item, str | dict) else "x" for name, item in value.items()}
    return json.dumps(swapped).encode()


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


KINDS: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "flipped": flipped,
    "missing": lambda _: None,
    "types": other_types,
    "empty": lambda _: b"",
    "garbage": lambda data: bytes((7 * n) % 251 for n in range(len(data))),
}
OF_JSON = {**KINDS, "null": lambda _: b"null", "deep": lambda _: b"[" * 20_000, "longer": lambda data: data + b"}"}
EVERY = pytest.mark.parametrize("kind", KINDS)


def damage(file: Path, kind: str) -> None:
    made = OF_JSON[kind](file.read_bytes())
    file.unlink()
    if made is not None:
        file.write_bytes(made)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> StageConfig:
    """A finished run of six steps, with checkpoints after two, four and six."""
    folder = tmp_path_factory.mktemp("damage")
    models = make_models(folder)
    data = captions(folder / "c.tar", 8)
    config = pretraining(
        models, data, folder / "done", batch_size=4, epochs=3, save_every=2, keep=9, learning_rate=1e-2
    )
    train(config)
    return config


@pytest.fixture
def stopped(done: StageConfig, tmp_path: Path) -> StageConfig:
    """The same run, killed after the fourth step."""
    out = Path(shutil.copytree(done.out, tmp_path / "out"))
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    for file in (*out.glob("*.json"), *out.glob("*.safetensors")):
        if not file.name.startswith(("index", "stage")):
            file.unlink()
    return done.replace(out=str(out))


def test_the_undamaged_run_resumes(done: StageConfig, stopped: StageConfig) -> None:
    assert train(stopped).steps == 6
    assert_close(weights(Path(stopped.out)), weights(Path(done.out)), 0)


@EVERY
@pytest.mark.parametrize("name", OF_CHECKPOINT)
def test_a_damaged_checkpoint(
    done: StageConfig, stopped: StageConfig, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one before it is used, and the result is the same; the damaged one is kept aside."""
    out = Path(stopped.out)
    damage(out / NEWEST / name, kind)
    assert train(stopped).steps == 6
    assert_close(weights(out), weights(Path(done.out)), 0)
    printed = " ".join(capsys.readouterr().err.split())
    assert "step-00000004: the checkpoint is damaged (" in printed and "resuming from step-00000002" in printed
    assert [line["step"] for line in records(out)] == [1, 2, 3, 4, 5, 6]
    assert (out / f"{NEWEST}.damaged").is_dir()
    assert [path.name for path in checkpoints(out)] == ["step-00000002", "step-00000004", "step-00000006"]


def test_only_damaged_checkpoints(stopped: StageConfig) -> None:
    out = Path(stopped.out)
    damage(out / NEWEST / "optimizer-00000.safetensors", "missing")
    damage(out / BEFORE / "weights-00000.safetensors", "flipped")
    sentence = r"step-00000004: the checkpoint is damaged \(optimizer-00000.safetensors is missing\), .*--no-resume"
    for _ in range(2):
        with pytest.raises(UserError, match=sentence):
            train(stopped)
    assert train(stopped.replace(resume=False)).steps == 6


@EVERY
@pytest.mark.parametrize("name", ["index.arrow", "index.json", "log.jsonl", "stage.json"])
def test_damaged_data_of_a_run(
    done: StageConfig, stopped: StageConfig, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are made again."""
    out = Path(stopped.out)
    before = (out / name).read_bytes()
    damage(out / name, kind)
    result = train(stopped)
    assert (result.steps, result.facts.rows) == (6, 8)
    assert_close(weights(out), weights(Path(done.out)), 0)
    if name.startswith("index"):
        assert (out / name).read_bytes() == before
    said = name.startswith("index") and (name, kind) != ("index.json", "missing")
    assert ("the index is damaged" in capsys.readouterr().err) == said


@EVERY
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "finished.json"])
def test_a_damaged_model_is_not_called_done(
    done: StageConfig, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is written again from the last checkpoint; without one, that is said."""
    out = Path(shutil.copytree(done.out, tmp_path / "out"))
    config = done.replace(out=str(out))
    damage(out / name, kind)
    result = train(config)
    assert (result.already_done, result.steps) == (False, 6)
    assert_close(weights(out), weights(Path(done.out)), 0)
    printed = " ".join(capsys.readouterr().err.split())
    if (name, kind) != ("finished.json", "missing"):  # a run that was killed before it wrote this
        assert "out: the model is damaged (" in printed and "writing it again from step-00000006" in printed
    assert train(config).already_done
    shutil.rmtree(out / "checkpoints")
    damage(out / name, kind)
    if (name, kind) != ("finished.json", "missing"):
        with pytest.raises(UserError, match=r"the model is damaged \(.*\), and its checkpoints are gone"):
            train(config)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "missing"])
def test_a_damaged_start_model(done: StageConfig, tmp_path: Path, kind: str) -> None:
    init = shutil.copytree(done.out, tmp_path / "init")
    damage(init / "model.safetensors", kind)
    config = finetuning({"init": str(init)}, questions(tmp_path / "q.tar"), tmp_path / "out", max_steps=1)
    with pytest.raises(UserError, match=r"init: the model is damaged \(model.safetensors "):
        train(config)


@pytest.mark.parametrize("kind", OF_JSON)
def test_sealed_files(tmp_path: Path, kind: str) -> None:
    value = {"b": [1, 2.5, None], "a": {"3": "ü"}}
    write_sealed(tmp_path / "x.json", value)
    assert read_sealed(tmp_path / "x.json") == value
    damage(tmp_path / "x.json", kind)
    with pytest.raises(DamagedError, match=r"^x\.json "):
        read_sealed(tmp_path / "x.json")


def unseal(file: Path) -> None:
    """Make a file what a version before seals wrote."""
    stored = read_sealed(file)
    stored.pop("files", None)
    file.write_text(json.dumps(stored))


def test_a_start_model_of_an_earlier_version(done: StageConfig, tmp_path: Path) -> None:
    init = Path(shutil.copytree(done.out, tmp_path / "init"))
    unseal(init / "finished.json")
    config = finetuning({"init": str(init)}, questions(tmp_path / "q.tar"), tmp_path / "out", max_steps=1)
    assert train(config).steps == 1
    assert train(done.replace(out=str(init))).already_done


def test_resuming_a_checkpoint_of_an_earlier_version(
    done: StageConfig, stopped: StageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(stopped.out)
    (out / NEWEST / "files.json").unlink()
    unseal(out / NEWEST / "position.json")
    unseal(out / "index.json")
    assert train(stopped).steps == 6
    assert "damaged" not in capsys.readouterr().err
    assert_close(weights(out), weights(Path(done.out)), 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "flipped"])  # a bit is seen by digests only
@pytest.mark.parametrize("name", [name for name in OF_CHECKPOINT if name != "files.json"])
def test_a_damaged_checkpoint_of_an_earlier_version(
    stopped: StageConfig, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(stopped.out)
    (out / NEWEST / "files.json").unlink()
    unseal(out / NEWEST / "position.json")
    damage(out / NEWEST / name, kind)
    assert train(stopped).steps == 6
    assert "resuming from step-00000002" in " ".join(capsys.readouterr().err.split())
