"""What is reckoned beforehand against what a step really holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aligntrain import StageConfig
from aligntrain.data.index import build_index
from aligntrain.data.reader import Reader
from aligntrain.model.build import build_config, build_model, build_processor
from aligntrain.model.loss import CHUNK_TOKENS
from aligntrain.tools.memory import Memory, estimate_memory
from aligntrain.training.loop import make_optimizer, plan_epoch
from tests.support.stage_data import make_models, questions


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


def config_of(models: dict[str, str], folder: Path, stage: str, **settings: Any) -> StageConfig:
    data = questions(folder / "data.tar")
    given = {"template": "chat", "batch_size": 24, "max_length": 96, "token_budget": 768, "dtype": "fp32"}
    return StageConfig.of(stage, {"data": [data], "out": folder / "out", **models, **given, **settings})


def estimate(config: StageConfig, ranks: int = 1) -> Memory:
    return estimate_memory(build_config(config), config, ranks)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}], ids=["plain", "lora"])
def test_weights_gradients_and_optimizer_are_what_a_step_holds(
    models: dict[str, str], tmp_path: Path, stage: str, settings: dict[str, Any]
) -> None:
    if stage == "pretrain" and settings:
        pytest.skip("LoRA is for finetuning")
    config = config_of(models, tmp_path, stage, **settings)
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    optimizer = make_optimizer(model, config, torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    told = estimate(config)
    # The vocabulary grows by the two placeholders only in the processor, never in the weights.
    assert told.weights == sum(p.nbytes for p in model.parameters())
    assert told.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    assert told.optimizer == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_what_autograd_keeps(models: dict[str, str], tmp_path: Path, checkpointing: bool) -> None:
    config = config_of(models, tmp_path, "finetune", checkpointing=checkpointing, attention="sdpa")
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    index = build_index(config, processor, 8, tmp_path / "index.arrow")
    packs = plan_epoch(config, index, 0, packed=True, world_size=1)[0].ranks[0]
    batch = Reader(index, processor, packed=True, with_levels=False)(packs[0])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(**batch.inputs, num_items_in_batch=torch.tensor(1.0))
    logits = 4 * len(output.token_losses) * model.config.text_config.vocab_size
    held = sum(size for size in kept.values() if size != logits)  # they are counted apart
    told = estimate(config)
    tokens = batch.inputs["input_ids"].numel()
    reckoned = told.activations * tokens / config.token_budget
    if checkpointing:
        layers = model.config.text_config.num_hidden_layers
        one_layer = estimate(config.replace(checkpointing=False)).activations * tokens / config.token_budget / layers
        reckoned -= 0.9 * one_layer  # which lives in the backward pass only
    assert 0.5 * held < reckoned < 2 * held


def test_sharding_divides_and_bf16_halves(models: dict[str, str], tmp_path: Path) -> None:
    whole = estimate(config_of(models, tmp_path, "finetune"))
    shared = estimate(config_of(models, tmp_path, "finetune"), ranks=4)
    assert shared.optimizer == whole.optimizer // 4 and shared.gradients == whole.gradients // 4
    assert shared.activations == whole.activations
    frozen = estimate(config_of(models, tmp_path, "pretrain", dtype="bf16"))
    full = estimate(config_of(models, tmp_path, "pretrain"))
    assert full.weights / 2 < frozen.weights < 0.75 * full.weights and frozen.optimizer == full.optimizer
    vocabulary = build_config(config_of(models, tmp_path, "finetune")).text_config.vocab_size
    assert whole.logits == 12 * CHUNK_TOKENS * vocabulary
