"""The training loop on one rank: the loss, accumulation, resuming, dummies, and what stops a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aligncurate.errors import NonFiniteError, UserError
from aligncurate.io.files import claim
from aligntrain import AlignGPTForConditionalGeneration, AlignGPTProcessor, StageConfig, train
from aligntrain.data.index import Index
from aligntrain.data.reader import BatchReader, MicroBatch
from aligntrain.data.sealed import read_sealed, write_sealed
from aligntrain.training import checkpoint, export
from aligntrain.training import loop as trainer
from aligntrain.training.build import build_model, build_processor
from aligntrain.training.checkpoint import checkpoints
from aligntrain.training.optimizer import schedule
from tests.support.stage_data import captions, finetuning, make_models, picture, pretraining, questions, write_tar

ROOT = Path(__file__).parents[3]
LEARNS = {"learning_rate": 1e-2, "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages")
    make_models(path)
    captions(path / "c.tar")
    questions(path / "q.tar")
    return path


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, str]:
    return {"llm": str(folder / "llm"), "vision": str(folder / "vision")}


@pytest.fixture(scope="module")
def pretrained(folder: Path, models: dict[str, str]) -> Path:
    train(pretraining(models, str(folder / "c.tar"), folder / "pretrained", epochs=2, **LEARNS))
    return folder / "pretrained"


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_each_stage_trains_its_own_modules(
    folder: Path, pretrained: Path, models: dict[str, str], tmp_path: Path
) -> None:
    before = build_model(pretraining(models, "x", tmp_path), build_processor(pretraining(models, "x", tmp_path)))[0]
    first = weights(pretrained)
    moved = {name.split(".")[0] for name, t in before.state_dict().items() if not torch.equal(t, first[name])}
    assert moved == {"projector", "level_embeddings"}
    lines = records(pretrained)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1

    summary = train(finetuning({"init": str(pretrained)}, str(folder / "q.tar"), tmp_path / "out", epochs=4, **LEARNS))
    second = weights(tmp_path / "out")
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert moved == {"projector", "gate", "language_model"}
    lines = records(tmp_path / "out")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert summary.loss == lines[-1]["loss"]
    assert (summary.steps, summary.total, summary.stopped, summary.unreadable) == (12, 12, False, 0)
    assert sum(lines[-1]["gate_weights"]) == pytest.approx(1, abs=1e-4)
    assert set(lines[-1]["grad_norm_by_module"]) == {"projector", "gate", "language_model"}
    assert len(lines[-1]["level_cosine_of_neighbours"]) == 7
    assert "mfu" not in lines[-1]  # CPUs have no data sheet

    model = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = AlignGPTProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_mode == "pad"
    assert model.config.align_token_id == processor.align_token_id


def test_finetuning_uses_the_llms_own_template(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    """Not the plain template of pretraining, which drops the questions."""
    config = finetuning({"init": str(pretrained)}, "x", tmp_path)
    text = build_processor(config).apply_chat_template([{"role": "user", "content": "what"}])
    assert text == "what?"
    shutil.copytree(pretrained, tmp_path / "lost")
    (tmp_path / "lost" / "llm_chat_template.jinja").unlink()
    with pytest.raises(UserError, match="does not have its LLM's chat template; use --template v1"):
        build_processor(config.replace(init=str(tmp_path / "lost")))
    v1 = build_processor(config.replace(init=str(tmp_path / "lost"), template="v1"))
    assert "USER: what ASSISTANT:" in v1.apply_chat_template(
        [{"role": "user", "content": "what"}], add_generation_prompt=True
    )


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_one_large_micro_batch_equals_many_small(
    folder: Path, models: dict[str, str], tmp_path: Path, stage: str
) -> None:
    """1xN == Nx1, packed or in padded rows: the loss is the mean over the supervised tokens of the whole step."""
    make, data = (pretraining, "c.tar") if stage == "pretrain" else (finetuning, "q.tar")
    ways = {
        "one": {"token_budget": 1024},
        "many": {"token_budget": 96},
        "rows": {"token_budget": 256, "packing": "off"},
        "checkpointed": {"token_budget": 96, "checkpointing": True},
    }
    for name, way in ways.items():
        train(make(models, str(folder / data), tmp_path / name, max_steps=2, **way))
    for name in ("many", "rows", "checkpointed"):
        assert_close(weights(tmp_path / "one"), weights(tmp_path / name))
        for ours, theirs in zip(records(tmp_path / "one"), records(tmp_path / name), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_losses_and_gradients_against_a_naive_computation(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    config = pretraining(models, str(folder / "c.tar"), tmp_path / "out", batch_size=24, max_steps=1)
    train(config)
    (record,) = records(tmp_path / "out")
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    index = Index(tmp_path / "out" / "index.arrow", processor)
    read = BatchReader(index, processor, packed=False, with_levels=True)
    losses: dict[int, list[float]] = defaultdict(list)
    for number in range(24):  # one by one, with the logits of every position
        inputs = read((number,)).inputs
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        token_losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
        (token_losses.sum() / index.facts.supervised).backward()
        losses[int(index.levels[number])] += token_losses[labels[0, 1:] != -100].tolist()
    assert set(record["loss_by_level"]) == {str(level) for level in range(1, 9)}
    for level, values in losses.items():
        assert record["loss_by_level"][str(level)] == pytest.approx(sum(values) / len(values), abs=1e-5)
    everything = [value for values in losses.values() for value in values]
    assert len(everything) == index.facts.supervised
    assert record["loss"] == pytest.approx(sum(everything) / len(everything), abs=1e-5)
    for name in ("projector", "level_embeddings"):
        gradients = [p.grad.flatten() for n, p in model.named_parameters() if n.startswith(name) and p.grad is not None]
        assert record["grad_norm_by_module"][name] == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-4)
    # What the optimizer got: its first moment after one step is (1 - beta1) x the clipped gradient.
    moments = load_file(checkpoints(tmp_path / "out")[-1] / "optimizer-00000.safetensors")
    factor = (1 - config.beta1) * min(1.0, config.max_grad_norm / record["grad_norm"])
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and f"{name}|exp_avg" in moments:
            torch.testing.assert_close(moments[f"{name}|exp_avg"], factor * parameter.grad, rtol=1e-3, atol=1e-6)
    assert len([name for name in moments if name.endswith("|exp_avg")]) == 5  # two layers' weights and biases, levels


def test_text_only_data(models: dict[str, str], tmp_path: Path) -> None:
    turns = {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]}
    tar = write_tar(tmp_path / "t.tar", {f"t{n}": (None, turns) for n in range(4)})
    summary = train(finetuning(models, tar, tmp_path / "out", batch_size=4))
    assert summary.steps == 1
    assert records(tmp_path / "out")[0]["grad_norm_by_module"]["projector"] == 0


def test_an_unreadable_image_changes_no_other_loss(models: dict[str, str], tmp_path: Path) -> None:
    """A broken image among good ones: the same steps, and the same losses for the other samples."""
    for name in ("broken", "whole"):
        samples = {f"s{n}": (picture(n), {"caption": f"a thing {n}", "level": n + 1}) for n in range(8)}
        if name == "broken":
            samples["s5"] = (b"no picture", samples["s5"][1])
        summary = train(pretraining(models, write_tar(tmp_path / f"{name}.tar", samples), tmp_path / name))
        assert summary.unreadable == (name == "broken")
        assert summary.steps == 1
    broken, whole = (records(tmp_path / name)[0] for name in ("broken", "whole"))
    assert set(whole["loss_by_level"]) - set(broken["loss_by_level"]) == {"6"}
    for level, loss in broken["loss_by_level"].items():
        assert loss == pytest.approx(whole["loss_by_level"][level], abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers(
    folder: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Compiled layers give the same loss and gradients, with and without activation checkpointing.

    The aot_eager backend skips generating C++, which takes a minute.
    """
    real, counters = torch.nn.Module.compile, torch._dynamo.utils.counters
    graphs = {"plain": 0, "compiled": 0}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: real(self, backend="aot_eager", **how))
    for name in graphs:
        torch._dynamo.reset()
        counters.clear()
        made = name == "compiled"
        train(finetuning(models, str(folder / "q.tar"), tmp_path / name, max_steps=1, compile=made,
                         checkpointing=made and checkpointing))  # fmt: skip
        graphs[name] = counters["stats"]["unique_graphs"]
    assert graphs["plain"] == 0 < graphs["compiled"]
    ours, theirs = (records(tmp_path / name)[0] for name in graphs)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert ours["grad_norm_by_module"] == pytest.approx(theirs["grad_norm_by_module"], rel=1e-5)


def test_s2_with_checkpointing(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    """With two image scales, activation checkpointing changes nothing."""
    for name in ("plain", "recomputed"):
        config = finetuning(models, str(folder / "q.tar"), tmp_path / name, max_steps=1, s2_scales=[24, 48],
                            checkpointing=name == "recomputed", **LEARNS)  # fmt: skip
        train(config)
    assert weights(tmp_path / "plain")["projector.0.weight"].shape[1] == 2 * 16
    assert_close(weights(tmp_path / "plain"), weights(tmp_path / "recomputed"))
    assert records(tmp_path / "plain")[0]["grad_norm_by_module"]["projector"] > 0


@pytest.mark.parametrize(("gone", "good"), [(99, 1), (120, 0), (9, 0)])
def test_unreadable_images_stop_the_run_only_if_there_are_no_others(
    models: dict[str, str], tmp_path: Path, gone: int, good: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some broken images are skipped; 100 in a row, or all of a short run, are an error."""
    meta = {"caption": "a thing", "level": 3}
    samples = {f"s{n:03d}": (b"gone", meta) for n in range(gone)}
    samples |= {f"t{n:03d}": (picture(n), meta) for n in range(good)}
    config = pretraining(models, write_tar(tmp_path / "c.tar", samples), tmp_path / "out", batch_size=60)
    if good:
        assert train(config).unreadable == gone
        assert weights(tmp_path / "out")["projector.0.weight"].isfinite().all()
    else:
        step = 2 if gone == 120 else 1
        sentence = rf"step {step}: none of the last {gone} images could be read \(such as s\d\d\d: .*--image-root"
        with pytest.raises(UserError, match=sentence):
            train(config)
        assert not (tmp_path / "out" / "config.json").exists()
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("this is text, not an image") <= 5
    if gone > 60:
        assert (
            "the image cannot be read (this is text, not an image that can be read); the sample is skipped" in printed
        )


def test_a_folder_with_other_files_is_refused(models: dict[str, str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "config.json"
    mine.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"other files \(config\.json\)"):
        train(pretraining(models, str(folder / "c.tar"), tmp_path / "out", max_steps=1))
    assert mine.read_text() == '{"mine": 1}' and list((tmp_path / "out").iterdir()) == [mine]


def test_the_output_folder_is_locked_during_the_run(
    models: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    steps = []

    def claim_and_rate(config: StageConfig, step: int, total: int) -> float:
        with pytest.raises(UserError, match="another run is writing to this folder"), claim(out, {"index.arrow"}):
            pass
        steps.append(step)
        return schedule(config, step, total)

    monkeypatch.setattr(trainer, "schedule", claim_and_rate)
    config = pretraining(models, str(folder / "c.tar"), out, max_steps=1)
    train(config)
    assert steps == [0]
    with claim(out, {"index.arrow"}), pytest.raises(UserError, match="another run is writing to this folder"):
        train(config)


def test_files_have_the_mode_of_the_umask(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    """safetensors gives its files mode 0600, so that nobody else of a group could read a model."""
    before = os.umask(0o027)
    try:
        train(pretraining(models, str(folder / "c.tar"), tmp_path / "out", max_steps=1))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stem != "index"]  # may be shared
    modes = {path.name: path.stat().st_mode & 0o777 for path in files}
    assert {"model.safetensors", "weights-00000.safetensors", "optimizer-00000.safetensors"} <= modes.keys()
    assert set(modes.values()) == {0o640}, modes


def test_lora(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = finetuning(
        {"init": str(pretrained)}, str(folder / "q.tar"), tmp_path / "out", lora_rank=4, save_every=2, **LEARNS
    )
    train(config)
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    assert len(checkpoints(tmp_path / "again")) == 2
    shutil.rmtree(checkpoints(tmp_path / "again")[-1])
    (tmp_path / "again" / "finished.json").unlink()
    assert train(config.replace(out=str(tmp_path / "again"))).loss is not None
    before, merged = weights(pretrained), weights(tmp_path / "out")
    assert_close(merged, weights(tmp_path / "again"), 0)
    assert before.keys() == merged.keys()  # merged: no adapter is left
    layer = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert torch.linalg.matrix_rank(merged[layer] - before[layer], rtol=1e-4) == 4
    assert torch.equal(before["language_model.lm_head.weight"], merged["language_model.lm_head.weight"])
    assert not torch.equal(before["gate.mlp.0.weight"], merged["gate.mlp.0.weight"])
    adapters = load_file(checkpoints(tmp_path / "out")[-1] / "weights-00000.safetensors")
    model, _ = build_model(config, build_processor(config))
    model.load_state_dict(adapters, strict=False)
    exported = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(model.eval()(ids).logits, exported(ids).logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def straight(folder: Path, models: dict[str, str]) -> StageConfig:
    """Ten uninterrupted steps of a stage with dropout."""
    config = ten_steps(folder, models, folder / "straight")
    train(config)
    return config


def ten_steps(folder: Path, models: dict[str, str], out: Path) -> StageConfig:
    return finetuning(models, str(folder / "q.tar"), out, epochs=4, max_steps=10, save_every=5, batch_size=7,
                      lora_rank=2, lora_dropout=0.3, **LEARNS)  # fmt: skip


KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tests.aligntrain.training.test_loop import ten_steps
from aligntrain import train
from aligntrain.training import checkpoint
from aligntrain.training import loop as trainer
folder, out, where = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
models = {"llm": str(folder / "llm"), "vision": str(folder / "vision")}
rate, sync, calls = trainer.schedule, checkpoint.sync, []

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def rate_or_kill(config, step, total):
    return kill() if step == 7 else rate(config, step, total)

def sync_or_kill(path):  # the second checkpoint: its files are written, and not yet renamed
    calls.append(path)
    kill() if "step-00000010" in str(path) else sync(path)

if where == "step":
    trainer.schedule = rate_or_kill
else:
    checkpoint.sync = sync_or_kill
train(ten_steps(folder, models, out))
"""


@pytest.mark.parametrize("where", ["step", "save"])
def test_killed_and_resumed_bit_for_bit(
    folder: Path, models: dict[str, str], straight: StageConfig, tmp_path: Path, where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """10 steps straight == 5 steps + kill -9 (in a step, or while the next checkpoint is written) + the rest."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(ROOT), str(folder), str(out), where], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in checkpoints(out)] == ["step-00000005"]
    assert not (out / "config.json").exists()

    def taken(config: StageConfig) -> tuple[list[Any], torch.Tensor]:
        read: list[Any] = []
        real = trainer.ParallelModel.forward_backward

        def spy(self: Any, inputs: dict[str, torch.Tensor], *rest: Any, **named: Any) -> Any:
            read.append((inputs["input_ids"].tolist(), torch.get_rng_state().tolist()))
            return real(self, inputs, *rest, **named)

        monkeypatch.setattr(trainer.ParallelModel, "forward_backward", spy)
        train(config)
        monkeypatch.undo()
        return read, torch.get_rng_state()

    resumed, state = taken(ten_steps(folder, models, out))
    again, expected = taken(ten_steps(folder, models, tmp_path / "straight"))
    assert resumed == again[-len(resumed) :]
    assert len(resumed) < len(again)
    assert torch.equal(state, expected)
    ours, theirs = (checkpoints(Path(o))[-1] for o in (out, straight.out))
    assert ours.name == theirs.name == "step-00000010"
    for file in ("weights-00000.safetensors", "optimizer-00000.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    assert (out / "model.safetensors").read_bytes() == (Path(straight.out) / "model.safetensors").read_bytes()
    for mine, other in zip(records(out), records(Path(straight.out)), strict=True):
        for name in ("step", "loss", "grad_norm", "lr", "gate_weights", "level_cosine"):
            assert mine.get(name) == other.get(name)


@pytest.mark.parametrize(("sent", "at"), [(signal.SIGTERM, 3), (signal.SIGINT, 3), (signal.SIGINT, 5)])
def test_signals_save_and_stop(folder: Path, models: dict[str, str], straight: StageConfig, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, at: int) -> None:  # fmt: skip
    """SIGTERM and Ctrl-C; step 5 already has a checkpoint, which is not written twice."""

    def rate_and_signal(config: StageConfig, step: int, total: int) -> float:
        if step == at - 1:
            os.kill(os.getpid(), sent)
        return schedule(config, step, total)

    written: list[str] = []
    sync = checkpoint.sync
    monkeypatch.setattr(checkpoint, "sync", lambda path: (written.append(path.name), sync(path)))
    config = ten_steps(folder, models, tmp_path / "out")
    monkeypatch.setattr(trainer, "schedule", rate_and_signal)
    summary = train(config)
    assert (summary.stopped, summary.steps, summary.total) == (sent, at, 10)
    assert [path.name for path in checkpoints(tmp_path / "out")] == [f"step-{at:08d}"]
    assert written.count("position.json") == 1
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    assert not train(config).stopped
    assert_close(weights(tmp_path / "out"), weights(Path(straight.out)), 0)


def test_a_finished_run_is_not_repeated(straight: StageConfig, tmp_path: Path) -> None:
    """And the model is not written again, even if the checkpoints were deleted to save space."""
    out = Path(shutil.copytree(straight.out, tmp_path / "out"))
    before = weights(out)
    written = (out / "model.safetensors").stat().st_mtime_ns
    for _ in range(2):
        summary = train(straight.replace(out=str(out), workers=1, keep=1))
        assert (summary.steps, summary.total, summary.loss, summary.already_done) == (10, 10, None, True)
        assert (out / "model.safetensors").stat().st_mtime_ns == written
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    with pytest.raises(UserError, match="different settings"):
        train(straight.replace(out=str(out), seed=1))
    # Killed while the model was written: config.json, which is written last, is missing.
    shutil.copytree(Path(straight.out) / "checkpoints", out / "checkpoints")
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    assert not train(straight.replace(out=str(out))).already_done
    assert_close(before, weights(out), 0)


def test_export_over_an_old_model_deletes_its_config_first(
    straight: StageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a config.json is complete at all times."""
    out = Path(shutil.copytree(straight.out, tmp_path / "out"))
    (out / "finished.json").unlink()
    seen: list[bool] = []
    sync = export.sync
    monkeypatch.setattr(export, "sync", lambda path: (seen.append((out / "config.json").exists()), sync(path)))
    train(straight.replace(out=str(out)))
    assert (out / "config.json").exists()
    assert len(seen) > 5
    assert seen == [False] * (len(seen) - 1) + [True]  # the folder is synced last


def test_a_full_disk_while_saving(folder: Path, models: dict[str, str], straight: StageConfig, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    config = ten_steps(folder, models, tmp_path / "out")
    real = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "00000010" in str(path) and "optimizer" in path.name:
            raise OSError("No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step-00000010: the checkpoint cannot be written \(No space left"):
        train(config)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-00000005"]
    monkeypatch.undo()
    train(config)
    assert_close(weights(tmp_path / "out"), weights(Path(straight.out)), 0)
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {"step-00000005", "step-00000010"}


def test_resuming_with_other_settings_or_data_is_refused(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    tar = captions(tmp_path / "c.tar", 16)
    config = pretraining(models, tar, tmp_path / "out", epochs=3, max_steps=3, save_every=2, keep=9)
    train(config)
    shutil.rmtree(checkpoints(tmp_path / "out")[-1])
    (tmp_path / "out" / "finished.json").unlink()
    with pytest.raises(UserError, match=r"different settings \(learning_rate: 0.001 before, 0.5 now\).*--no-resume"):
        train(config.replace(learning_rate=0.5))
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["learning_rate"] == 1e-3
    captions(tmp_path / "c.tar", 16, levels=4)  # as many pairs, but other levels
    with pytest.raises(UserError, match="the data has changed since this run started"):
        train(config)
    captions(tmp_path / "c.tar", 15)
    with pytest.raises(UserError, match="the data has changed since this run started"):
        train(config)
    assert train(config.replace(resume=False)).steps == 3


def test_resuming_with_a_changed_start_model_is_refused(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    """The first stage was rerun with another seed, so the frozen weights are no longer the same."""
    init = Path(shutil.copytree(pretrained, tmp_path / "init", ignore=shutil.ignore_patterns("checkpoints")))
    config = finetuning({"init": str(init)}, str(folder / "q.tar"), tmp_path / "out", max_steps=2, save_every=1)
    train(config)
    assert train(config).already_done
    made_of = read_sealed(init / "finished.json")
    made_of["settings"]["seed"] = 9
    write_sealed(init / "finished.json", made_of)
    with pytest.raises(UserError, match=r"the model in .*init has changed since this run started"):
        train(config)


def test_level_weights_of_data_without_levels(
    folder: Path, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(finetuning(models, str(folder / "q.tar"), tmp_path / "out", max_steps=1, level_weights={1: 0.5}))
    assert "the data has no levels, so --level-weights" in " ".join(capsys.readouterr().err.split())


def test_only_the_newest_checkpoints_are_kept(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    train(pretraining(models, str(folder / "c.tar"), tmp_path / "out", epochs=2, save_every=1, keep=2))
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-00000005", "step-00000006"]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The image of c005 is all NaN."""
    real = BatchReader.__call__

    def poisoned(self: BatchReader, pack: tuple[int, ...]) -> MicroBatch:
        batch = real(self, pack)
        if 5 in pack:
            batch.inputs["pixel_values"][pack.index(5)] = float("nan")
        return batch

    monkeypatch.setattr(BatchReader, "__call__", poisoned)
    yield


@pytest.mark.usefixtures("poison")
def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    config = pretraining(models, str(folder / "c.tar"), tmp_path / "out", batch_size=24, token_budget=96)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is not finite in .*c005.*; there is no checkpoint"):
        train(config)
    assert not checkpoints(tmp_path / "out")


def test_start_model_errors(folder: Path, models: dict[str, str], pretrained: Path, tmp_path: Path) -> None:
    data, out = str(folder / "q.tar"), tmp_path / "out"
    with pytest.raises(UserError, match="pass --init, the pretrained model"):
        train(finetuning({}, data, out))
    with pytest.raises(UserError, match="no such folder"):
        train(finetuning({"init": str(tmp_path / "none")}, data, out))
    with pytest.raises(UserError, match=r"num_levels is 4, but the model in .* was made with 8"):
        train(finetuning({"init": str(pretrained)}, data, out, num_levels=4))
    with pytest.raises(UserError, match="cannot be added or removed later"):
        train(finetuning({"init": str(pretrained)}, data, out, align_mode="none"))
    shutil.copytree(pretrained, tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text())
    config["num_levels"] = 6
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the model cannot be loaded|do not fit its configuration"):
        train(finetuning({"init": str(tmp_path / "wrong")}, data, out))
    with pytest.raises(UserError, match="no output folder; pass --out"):
        train(StageConfig.pretrain(**models))


def test_learning_rate() -> None:
    config = StageConfig.pretrain(warmup_ratio=0.1)
    rates = [1e-3 * schedule(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9] == rates[10] == 1e-3
    assert min(rates) > 0
    assert rates[55] == pytest.approx(5e-4)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    from transformers import get_cosine_schedule_with_warmup

    scheduler = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    theirs = []
    for _ in rates:
        theirs += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(theirs[1:11] + theirs[10:], abs=1e-12)  # the warm-up is one step ahead


def test_bf16_keeps_float32_masters(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    train(finetuning(models, str(folder / "q.tar"), tmp_path / "out", dtype="bf16", max_steps=1))
    saved = load_file(checkpoints(tmp_path / "out")[-1] / "weights-00000.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_without_alignment_levels_are_only_counted(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    train(pretraining(models, str(folder / "c.tar"), tmp_path / "out", align_mode="none", level_weights={1: 0}))
    lines = records(tmp_path / "out")
    assert {level for line in lines for level in line["loss_by_level"]} == {str(level) for level in range(2, 9)}
    assert "level_cosine" not in lines[-1]
    assert not any(name.startswith(("level_embeddings", "gate")) for name in weights(tmp_path / "out"))


def test_loggers_by_name(folder: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            sent.append((step, numbers))

        def finish(self) -> None:
            sent.append((-1, {}))

    library = types.ModuleType("trackio")
    library.init = lambda **_: Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", library)
    config = pretraining(models, str(folder / "c.tar"), tmp_path / "out", log_to=["trackio"])
    train(config)
    assert [step for step, _ in sent] == [1, 2, 3, -1]
    assert sent[0][1]["loss"] == records(tmp_path / "out")[0]["loss"]
    assert "loss_by_level/1" in sent[0][1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--log-to wandb: not installed"):
        train(config.replace(log_to=["wandb"], resume=False))


def test_tensorboard(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    """Every number is logged once, even if the run was resumed from a checkpoint."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = pretraining(models, str(folder / "c.tar"), tmp_path / "out", log_to=["tensorboard"], save_every=2, keep=9)
    train(config)
    shutil.rmtree(checkpoints(tmp_path / "out")[-1])
    (tmp_path / "out" / "finished.json").unlink()
    train(config)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    lines = records(tmp_path / "out")
    for name in ("loss", "grad_norm"):
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert read == [(line["step"], pytest.approx(line[name])) for line in lines]
    assert "loss_by_level/1" in events.Tags()["scalars"]


@pytest.mark.filterwarnings("ignore")  # wandb's own warnings
def test_wandb_offline(folder: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    train(pretraining(models, str(folder / "c.tar"), tmp_path / "out", log_to=["wandb"]))
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unusable_output_folder_or_attention(
    models: dict[str, str], pretrained: Path, folder: Path, tmp_path: Path
) -> None:
    data = str(folder / "q.tar")
    with pytest.raises(UserError, match="--out is the same folder as --init, which would be overwritten"):
        train(finetuning({"init": str(pretrained)}, data, pretrained))
    with pytest.raises(UserError, match="--attention flex_attention: cannot train on a CPU; use sdpa"):
        train(finetuning(models, data, tmp_path, attention="flex_attention"))


def test_a_large_seed(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    assert train(pretraining(models, str(folder / "c.tar"), tmp_path, seed=2**62, max_steps=1)).steps == 1


def test_no_resume_deletes_the_old_checkpoints(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    """Otherwise an old checkpoint with more steps would be taken for the newest."""
    config = pretraining(models, str(folder / "c.tar"), tmp_path / "out", epochs=3, keep=1)
    train(config)
    train(config.replace(epochs=1, resume=False))
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-00000003"]
    train(pretraining(models, str(folder / "c.tar"), tmp_path / "fresh"))
    assert_close(weights(tmp_path / "out"), weights(tmp_path / "fresh"), 0)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_learning_rate_for_the_projector(folder: Path, models: dict[str, str], tmp_path: Path, stage: str) -> None:
    """Adam's first step moves every weight by the learning rate, whatever its gradient."""
    make, data = (pretraining, "c.tar") if stage == "pretrain" else (finetuning, "q.tar")
    config = make(models, str(folder / data), tmp_path / "out", max_steps=1, learning_rate=1e-4, projector_lr=3e-3)
    train(config)
    before, after = build_model(config, build_processor(config))[0].state_dict(), weights(tmp_path / "out")
    moved = {name.split(".")[0]: 0.0 for name in after}
    for name, tensor in after.items():
        moved[name.split(".")[0]] = max(moved[name.split(".")[0]], float((tensor - before[name]).abs().max()))
    other = {"pretrain": "level_embeddings", "finetune": "language_model"}[stage]
    assert moved["projector"] == pytest.approx(3e-3, rel=1e-2)
    assert moved[other] == pytest.approx(1e-4, rel=1e-2)
    (line,) = records(tmp_path / "out")
    assert (line["lr"], line["lr_by_module"]["projector"]) == (1e-4, 3e-3)
    assert set(line["lr_by_module"]) - {"projector"} and line["lr_by_module"][other] == 1e-4
    with pytest.raises(UserError, match="different settings"):
        train(config.replace(projector_lr=1e-3))


@pytest.mark.parametrize(
    ("rank", "alpha", "scale"), [(4, None, 2.0), (16, None, 2.0), (4, 2.0, 0.5), (128, 256.0, 2.0)]
)
def test_lora_scale(models: dict[str, str], rank: int, alpha: float | None, scale: float) -> None:
    pytest.importorskip("peft")
    config = finetuning(models, "x", Path("y"), lora_rank=rank, lora_alpha=alpha)
    model, _ = build_model(config, build_processor(config))
    scales = [m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    assert scales and set(scales) == {scale}


def test_a_single_step_changes_the_weights(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    """With the default warm-up, whether --max-steps or the data allow one step only."""
    for name, settings in (("steps", {"max_steps": 1}), ("data", {"batch_size": 256}), ("none", {"learning_rate": 0})):
        config = pretraining(models, str(folder / "c.tar"), tmp_path / name, **settings)
        assert train(config).steps == (1 if name != "none" else 3)
        before = build_model(config, build_processor(config))[0].state_dict()
        after = weights(tmp_path / name)
        moved = {key.split(".")[0] for key, tensor in before.items() if not torch.equal(tensor, after[key])}
        assert moved == (set() if name == "none" else {"projector", "level_embeddings"})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_steps": 1000}, "1 epoch of the data has 3 steps, fewer than --max-steps 1,000; pass --epochs 334"),
        ({"max_steps": 7, "epochs": 2}, "2 epochs of the data have 6 steps, fewer than --max-steps 7; pass --epochs 3"),
        ({"max_steps": 6, "epochs": 2}, None),
        ({"batch_size": 25}, "an epoch has 24 samples, fewer than --batch-size 25, so it is a single step"),
        ({"learning_rate": 0}, "--learning-rate 0: the weights will not change"),
    ],
)
def test_what_is_less_than_asked_for_is_said_first(
    folder: Path, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any], sentence: str | None,
) -> None:  # fmt: skip
    train(pretraining(models, str(folder / "c.tar"), tmp_path / "out", **settings))
    printed = " ".join(capsys.readouterr().err.split())
    if sentence is None:
        assert "fewer than" not in printed
    else:
        assert printed.index(f"note: {sentence}") < printed.index("loss ")


def test_every_cause_of_skipped_rows_is_said(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask, say = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    odd = {
        "empty": [], "answer": [say], "question": [ask], "twice": [ask, ask, say], "images": [
            {"from": "human", "value": "<image> <image>"}, say], "align": [{"from": "human", "value": "<align>"}, say],
        "late": [{"from": "human", "value": "q" * 99}, say], "none": [{"from": "robot", "value": "q"}, say],
    }  # fmt: skip
    samples = {name: (picture(1), {"conversations": turns}) for name, turns in {**odd, "good": [ask, say]}.items()}
    result = train(finetuning(models, write_tar(tmp_path / "q.tar", samples), tmp_path / "out"))
    printed = " ".join(capsys.readouterr().err.split())
    assert result.facts.rows == 1 and len(result.facts.skipped) > 5
    assert sum(result.facts.skipped.values()) == len(odd)
    for cause, rows in result.facts.skipped.items():
        assert f"note: {rows} row{'s' if rows > 1 else ''} skipped: {cause} (such as " in printed
