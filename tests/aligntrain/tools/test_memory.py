"""The memory estimate against the measured bytes of real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aligntrain import StageConfig
from aligntrain.data.indexing import build_index, open_data
from aligntrain.data.reader import BatchReader
from aligntrain.data.schedule import plan_epoch
from aligntrain.model.loss import CHUNK_TOKENS, token_losses
from aligntrain.tools.memory import Memory, estimate_memory
from aligntrain.training.build import build_config, build_model, build_processor
from aligntrain.training.distributed import ParallelModel, World
from aligntrain.training.optimizer import make_optimizer
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


def step(model: nn.Module, config: StageConfig) -> tuple[list[Tensor], list[Tensor]]:
    """One optimizer step: the gradients and AdamW's moments."""
    optimizer = make_optimizer(model, config, torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return gradients, [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "settings"),
    [("pretrain", {}), ("finetune", {}), ("finetune", {"lora_rank": 4})],
    ids=["pretrain", "finetune", "lora"],
)
def test_weights_gradients_and_optimizer_are_what_a_step_holds(
    models: dict[str, str], tmp_path: Path, stage: str, settings: dict[str, Any], dtype: str
) -> None:
    config = config_of(models, tmp_path, stage, dtype=dtype, **settings)
    model, _ = build_model(config, build_processor(config))
    gradients, moments = step(model, config)
    memory = estimate(config)
    # Autocast keeps a copy in bfloat16 of every float32 weight.
    copies = [p.bfloat16() for p in model.parameters() if p.dtype == torch.float32] if dtype == "bf16" else []
    # The two placeholders extend only the tokenizer's vocabulary, not the weights.
    assert memory.weights == sum(weight.nbytes for weight in (*model.parameters(), *copies))
    assert memory.gradients == sum(gradient.nbytes for gradient in gradients)
    assert memory.optimizer == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_what_autograd_keeps(models: dict[str, str], tmp_path: Path, checkpointing: bool) -> None:
    config = config_of(models, tmp_path, "finetune", checkpointing=checkpointing, attention="sdpa")
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    index = build_index(open_data(config), config, processor, 8, tmp_path / "index.arrow")
    packs = plan_epoch(config, index, 0, packed=True, world_size=1)[0].ranks[0]
    batch = BatchReader(index, processor, packed=True, with_levels=False)(packs[0])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(**batch.inputs, num_items_in_batch=torch.tensor(1.0))
    logits = 4 * len(output.token_losses) * model.config.text_config.vocab_size
    held = sum(size for size in saved.values() if size != logits)  # estimated separately
    memory = estimate(config)
    tokens = batch.inputs["input_ids"].numel()
    estimated = memory.activations * tokens / config.token_budget
    if checkpointing:
        layers = model.config.text_config.num_hidden_layers
        one_layer = estimate(config.replace(checkpointing=False)).activations * tokens / config.token_budget / layers
        estimated -= 0.9 * one_layer  # held only during the backward pass
    assert 0.5 * held < estimated < 2 * held


@pytest.fixture
def four_ranks() -> Iterator[World]:
    """Rank 0 of 4; the other ranks are fake, which is enough to see what one rank holds."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield World(0, 4, torch.device("cpu"))
    dist.destroy_process_group()


def test_a_sharded_rank_holds_its_share(models: dict[str, str], tmp_path: Path, four_ranks: World) -> None:
    config = config_of(models, tmp_path, "finetune", parallel="fsdp")
    model, _ = build_model(config, build_processor(config))
    everything = sum(p.nbytes for p in model.parameters())
    ParallelModel(model, config, four_ranks)
    gradients, moments = step(model, config)
    memory = estimate(config, ranks=4)
    masters = sum(local(p).nbytes for p in model.parameters())
    assert masters < memory.weights < masters + everything  # plus the layers that are gathered
    assert memory.gradients == pytest.approx(sum(local(gradient).nbytes for gradient in gradients), rel=0.03)
    assert memory.optimizer == pytest.approx(sum(local(moment).nbytes for moment in moments), rel=0.03)
    assert memory.activations == estimate(config).activations


class PeakMemory(TorchDispatchMode):
    """Measures the peak number of bytes in tensors that are created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, Any] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._alive:
                storage = tensor.untyped_storage()
                self._bytes += storage.nbytes()
                self.peak = max(self.peak, self._bytes)
                self._alive[key] = weakref.ref(storage, partial(self._free, key, storage.nbytes()))
        return output

    def _free(self, key: int, size: int, _: Any) -> None:
        del self._alive[key]
        self._bytes -= size


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_are_what_the_loss_of_a_chunk_holds(models: dict[str, str], tmp_path: Path, dtype: str) -> None:
    config = config_of(models, tmp_path, "finetune", dtype=dtype)
    vocabulary = build_config(config).text_config.vocab_size
    # So narrow that everything but the logits is negligible.
    head = torch.nn.Linear(1, vocabulary, bias=False)
    hidden = torch.randn(1, CHUNK_TOKENS + 1, 1, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, CHUNK_TOKENS + 1))
    with PeakMemory() as memory, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        token_losses(hidden, labels, None, head).sum().backward()
    assert estimate(config).logits == pytest.approx(memory.peak, rel=0.05)
