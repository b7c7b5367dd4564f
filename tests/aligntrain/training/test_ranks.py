"""Two ranks (DDP, FSDP2) give the same results as one, resume its checkpoints, and stop on each other's errors."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aligntrain import StageConfig, train
from aligntrain.data.index import Index
from aligntrain.data.reader import BatchReader
from aligntrain.data.schedule import plan_epoch
from aligntrain.training.build import build_model, build_processor
from aligntrain.training.checkpoint import checkpoints
from tests.aligntrain.training.test_loop import assert_close, records, weights
from tests.support.stage_data import captions, finetuning, make_models, picture, pretraining, write_tar

WORKER = Path(__file__).parents[2] / "support" / "ranks_worker.py"
FEW = {"max_steps": 2, "save_every": 1, "keep": 9, "learning_rate": 1e-3, "warmup_ratio": 0.0}


def mixed(path: Path) -> str:
    """Conversations, most without an image, so that some ranks have steps without any image."""
    samples: dict[str, Any] = {}
    for n in range(24):
        turns = [{"from": "human", "value": "what" + "?" * (n % 7)}, {"from": "gpt", "value": f"thing {n}"}]
        samples[f"q{n:03d}"] = (picture(n) if n % 6 == 0 else None, {"conversations": turns})
    return write_tar(path, samples)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageConfig]:
    """Every job on one rank, then all of them on two ranks in one process each."""
    folder = tmp_path_factory.mktemp("ranks")
    models = make_models(folder)
    data, tar = captions(folder / "c.tar"), mixed(folder / "q.tar")
    jobs = {
        "pretrain_ddp": pretraining(models, data, folder / "pretrain_ddp", parallel="ddp", **FEW),
        "pretrain_fsdp": pretraining(models, data, folder / "pretrain_fsdp", parallel="fsdp", dtype="bf16", **FEW),
        "finetune_ddp": finetuning(models, tar, folder / "finetune_ddp", parallel="ddp", token_budget=96, **FEW),
        "finetune_fsdp": finetuning(models, tar, folder / "finetune_fsdp", parallel="fsdp", token_budget=96,
                                    checkpointing=True, **FEW),
        "lora_fsdp": finetuning(models, tar, folder / "lora_fsdp", parallel="fsdp", lora_rank=2, lora_dropout=0.0,
                                **FEW),
        "lora_bf16_fsdp": finetuning(models, tar, folder / "lora_bf16_fsdp", parallel="fsdp", lora_rank=2,
                                     lora_dropout=0.0, dtype="bf16", **FEW),
    }  # fmt: skip
    two = {}
    for name, config in jobs.items():
        two[name] = config.replace(out=f"{config.out}_two")
        train(config)
    # The sharded stage again, resumed from the checkpoint that one rank saved after a step.
    shutil.copytree(jobs["finetune_fsdp"].out, folder / "resumed_two")
    shutil.rmtree(checkpoints(folder / "resumed_two")[-1])
    (folder / "resumed_two" / "finished.json").unlink()
    two["resumed"] = jobs["finetune_fsdp"].replace(out=str(folder / "resumed_two"))
    two["mistake"] = jobs["pretrain_ddp"].replace(out=str(folder / "mistake"), num_levels=5)
    two["divisor"] = jobs["pretrain_fsdp"].replace(out=str(folder / "divisor"), max_steps=1, batch_size=24)
    for name in ("reading", "writing", "weights"):  # what the workers break, by the folder's name
        two[name] = jobs["finetune_fsdp"].replace(out=str(folder / name))
    (folder / "jobs.json").write_text(json.dumps([config.to_json() for config in two.values()]))
    # The environment that torchrun would set; starting torchrun itself takes longer than all of this.
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "jobs.json")],
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=900)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(error[-3000:] for error in errors)
    return {**jobs, **{f"{name}_two": config for name, config in two.items()}}


@pytest.mark.parametrize("name", ["pretrain_ddp", "finetune_ddp", "finetune_fsdp", "lora_fsdp"])
def test_two_ranks_equal_one(runs: dict[str, StageConfig], name: str) -> None:
    one, two = (Path(runs[n].out) for n in (name, f"{name}_two"))
    assert_close(weights(one), weights(two), 2e-5)
    lines = list(zip(records(one), records(two), strict=True))
    assert len(lines) == 2
    for ours, theirs in lines:
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["loss_by_level"] == pytest.approx(theirs["loss_by_level"], abs=1e-5)


def test_moments_are_saved_unsharded(runs: dict[str, StageConfig]) -> None:
    ours, theirs = (
        load_file(checkpoints(Path(runs[name].out))[-1] / "optimizer-00000.safetensors")
        for name in ("finetune_fsdp", "finetune_fsdp_two")
    )
    assert_close(ours, theirs, 1e-5)


def test_resumed_on_another_number_of_ranks(runs: dict[str, StageConfig]) -> None:
    assert_close(weights(Path(runs["finetune_fsdp"].out)), weights(Path(runs["resumed_two"].out)), 2e-5)


def test_bf16_shards_keep_float32_masters(runs: dict[str, StageConfig]) -> None:
    one, two = (
        load_file(checkpoints(Path(runs[name].out))[-1] / "weights-00000.safetensors")
        for name in ("pretrain_fsdp", "pretrain_fsdp_two")
    )
    assert {tensor.dtype for tensor in two.values()} == {torch.float32}
    assert_close(one, two, 3e-3)  # autocast and FSDP2 round in different places; a step moves 1e-3


def test_the_divisor_of_the_loss_is_not_rounded(runs: dict[str, StageConfig]) -> None:
    """Half the supervised tokens of the step; FSDP2 casts a tensor to bfloat16, which has 8 bits."""
    out = Path(runs["divisor_two"].out)
    index = Index(out / "index.arrow", build_processor(runs["divisor_two"]))
    assert index.facts.supervised > 512
    for rank in (0, 1):
        assert float(Path(f"{out}.divisor-{rank}").read_text()) == index.facts.supervised / 2


def first_gradients(config: StageConfig) -> dict[str, torch.Tensor]:
    """Gradients of the first step before clipping, from Adam's first moment in the checkpoint after it."""
    moments = load_file(checkpoints(Path(config.out))[0] / "optimizer-00000.safetensors")
    clipping = min(1.0, config.max_grad_norm / records(Path(config.out))[0]["grad_norm"])
    scale = (1 - config.beta1) * clipping
    return {name.partition("|")[0]: m / scale for name, m in moments.items() if name.endswith("|exp_avg")}


def naive_gradients(config: StageConfig) -> dict[str, torch.Tensor]:
    """The same from plain autograd in float32: one sample at a time, the logits of every position."""
    config = config.replace(dtype="fp32", checkpointing=False)
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    index = Index(Path(config.out) / "index.arrow", processor)
    read = BatchReader(index, processor, packed=False, with_levels=config.stage == "pretrain")
    losses = []
    for number in plan_epoch(config, index, 0, packed=False, world_size=1)[0].samples:
        inputs = read((number,)).inputs
        labels = inputs.pop("labels")
        instruction = (labels != -100).cumsum(1) == 0  # what the gate sees: the text before the first answer
        logits = model(**inputs, gate_mask=instruction).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none"))
        losses[-1] = losses[-1][labels[0, 1:] != -100]
    torch.cat(losses).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # In bf16 the gradients of so small a model round coarsely; a wrong scale is off by far more.
    [("pretrain_ddp", 1e-3), ("finetune_ddp", 1e-3), ("finetune_fsdp", 1e-3), ("pretrain_fsdp", 0.3)],
)
def test_gradients_of_two_ranks_equal_plain_autograd(runs: dict[str, StageConfig], name: str, tolerance: float) -> None:
    """Relative error of each parameter's gradient. Adam hides their scale from every comparison of weights."""
    ours, expected = first_gradients(runs[f"{name}_two"]), naive_gradients(runs[f"{name}_two"])
    assert expected.keys() <= ours.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for parameter, gradient in expected.items():  # below 1e-4 of the whole, rounding counts
        error = (ours[parameter] - gradient).norm() / gradient.norm().clamp(min=1e-4 * total)
        assert error < tolerance, f"{parameter}: {error}, of {gradient.norm()} and {total}"


def test_bf16_lora_in_shards(runs: dict[str, StageConfig]) -> None:
    """Frozen bfloat16 and trained float32 weights in the same shards."""
    one, two = (Path(runs[name].out) for name in ("lora_bf16_fsdp", "lora_bf16_fsdp_two"))
    for ours, theirs in zip(records(one), records(two), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-2)
    saved = load_file(checkpoints(two)[-1] / "weights-00000.safetensors")
    assert any("lora_" in name for name in saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reading", "the disk went away"),  # on the second rank, in the second step
        ("writing", "the checkpoint cannot be written (No space left on device)"),  # on the first, between exchanges
        ("weights", "the memory is full"),  # on the second, while the model is built
    ],
)
def test_an_error_on_one_rank_stops_all(runs: dict[str, StageConfig], name: str, message: str) -> None:
    out = Path(runs[f"{name}_two"].out)
    for rank in (0, 1):
        assert message in Path(f"{out}.error-{rank}").read_text()
    assert [path.name for path in checkpoints(out)] == {"reading": ["step-00000001"]}.get(name, [])


def test_accelerate_launch(runs: dict[str, StageConfig], tmp_path: Path) -> None:
    """The command line under `accelerate launch`, which starts two processes as it would on two GPUs."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    config = runs["pretrain_ddp"].replace(out=str(tmp_path / "out"), max_steps=1)
    settings = {k: v for k, v in config.to_json().items() if v is not None and k not in ("stage", "data")}
    (tmp_path / "run.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += f" --dynamo_backend no --main_process_port {free_port()} -m aligncurate train pretrain"
    done = subprocess.run(
        [sys.executable, *launch.split(), *config.data, "--config", str(tmp_path / "run.toml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pretrained in 1 step (") == 1
    ours, theirs = (records(Path(out))[0] for out in (tmp_path / "out", runs["pretrain_ddp_two"].out))
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert ours["packing_efficiency"] == theirs["packing_efficiency"]  # which counts the ranks


def test_every_rank_gets_the_same_user_error(runs: dict[str, StageConfig]) -> None:
    out = runs["mistake_two"].out
    errors = [Path(f"{out}.error-{rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "but the model has 5 levels" in errors[0]
