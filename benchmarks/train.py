"""Training speed and memory, compared with plain Hugging Face on the same model and conversations.

    python -m benchmarks.train                  small model, on the CPU or GPU
    python -m benchmarks.train --shape 7b       Llama with 7B parameters and ViT-L/14-336, random weights; needs a GPU

Plain Hugging Face is transformers' LlavaForConditionalGeneration with the same LLM and tower: shuffled batches, padded
to their longest sample, logits and loss for every token, AdamW, the same dtype. Padding does not count as tokens. Every
run is a process of its own, so that its peak memory is its own; the two take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from aligncurate.dataset.record import FINE
from aligncurate.demo.scenes import write_conversations
from aligncurate.images.decode import load_rgb
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from aligntrain import StageConfig, train
from aligntrain.tools.preview import preview
from aligntrain.training.build import build_processor
from aligntrain.training.metrics import peak_memory
from benchmarks.common import Spread, console, publish
from pipelines.language_model import make_tokenizer

DAQUAR = Path(__file__).parents[1].parent / "shared" / "data" / "daquar"
BUDGETS = (2_048, 4_096)


@dataclass(frozen=True)
class Shape:
    """Sizes of the random LLM and tower, and the settings of a run."""

    llm: dict[str, Any]
    tower: dict[str, Any]
    pixels: int
    batch_size: int  # samples per optimizer step
    stock_batch: int  # samples per micro-batch of plain Hugging Face
    steps: int
    dtype: str
    max_length: int
    settings: dict[str, Any]


SHAPES = {
    "small": Shape(
        {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8},
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        pixels=112, batch_size=16, stock_batch=4, steps=5, dtype="fp32", max_length=1024,
        settings={"token_budget": 2048},
    ),
    "7b": Shape(
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        pixels=336, batch_size=32, stock_batch=4, steps=8, dtype="bf16", max_length=2048,
        settings={"token_budget": 8192, "checkpointing": True, "workers": 12},
    ),
}  # fmt: skip


def make_models(shape: Shape, texts: list[str], folder: Path) -> None:
    """Write folders `llm` and `vision` with random weights; the texts use part of the vocabulary of 32,000."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(texts, 8_000)
    config = AutoConfig.for_model("llama", vocab_size=32_000, bos_token_id=1, eos_token_id=2, **shape.llm)
    kind = torch.bfloat16 if shape.dtype == "bf16" else torch.float32
    AutoModelForCausalLM.from_config(config, dtype=kind).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    edge = shape.pixels
    CLIPVisionModel(CLIPVisionConfig(image_size=edge, patch_size=14, **shape.tower)).save_pretrained(folder / "vision")
    CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}).save_pretrained(
        folder / "vision"
    )


# ---- one run of one way, in a process of its own ---------------------------------------------------


def ours(shape: Shape, work: Path, data: list[str], root: str | None) -> dict[str, Any]:
    """Our `train`; the figures are from its log, without the first step."""
    config = _config(shape, work, data, root, max_steps=shape.steps + 1, out=str(work / "out"), log_every=1)
    train(config.replace(resume=False, save_every=10**9))
    records = [json.loads(line) for line in (work / "out" / "log.jsonl").read_text().splitlines()][1:]
    return {
        "tokens_per_s": [record["tokens_per_s"] for record in records],
        "peak_bytes": records[-1]["peak_memory_bytes"],
        "useful": sum(r["packing_efficiency"] for r in records) / len(records),
        "data_wait": sum(r["data_wait"] for r in records) / len(records),
        "mfu": sum(r["mfu"] for r in records) / len(records) if "mfu" in records[0] else None,
    }


def stock(shape: Shape, work: Path, data: list[str], root: str | None) -> dict[str, Any]:
    """Plain Hugging Face, as in its documentation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = _config(shape, work, data, root, align_mode="none")
    processor = build_processor(config)
    samples = list(islice(_samples(processor, data, root), (shape.steps + 1) * shape.batch_size))
    text = AutoConfig.from_pretrained(work / "llm")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig.from_pretrained(work / "vision"),
            text_config=text,
            image_token_id=processor.image_token_id,
        )
    )
    model.resize_token_embeddings(max(text.vocab_size, len(processor.tokenizer)))
    model.model.vision_tower.requires_grad_(False)
    if config.checkpointing:
        model.gradient_checkpointing_enable()
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        padded = processor.pad([encoded for encoded, _ in batch])
        pixels = processor.process_images([load_rgb(load()) for _, load in batch])
        return {**{k: padded[k] for k in ("input_ids", "attention_mask", "labels")}, "pixel_values": pixels}

    generator = torch.Generator().manual_seed(0)
    batches = iter(DataLoader(samples, shape.stock_batch, shuffle=True, collate_fn=collate, generator=generator))
    speeds, useful, computed, waited, spent = [], 0, 0, 0.0, 0.0
    for step in range(shape.steps + 1):
        started, tokens = time.perf_counter(), 0
        for _ in range(shape.batch_size // shape.stock_batch):
            begun = time.perf_counter()
            batch = {name: value.to(device) for name, value in next(batches).items()}
            waited += (time.perf_counter() - begun) * (step > 0)
            tokens += int(batch["attention_mask"].sum())
            computed += batch["input_ids"].numel()
            useful += int(batch["attention_mask"].sum())
            with torch.autocast(device.type, torch.bfloat16, enabled=shape.dtype == "bf16"):
                loss = model(**batch).loss
            (loss / (shape.batch_size // shape.stock_batch)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if step:
            speeds.append(tokens / seconds)
            spent += seconds
    return {
        "tokens_per_s": speeds,
        "peak_bytes": peak_memory(device),
        "useful": useful / computed,
        "data_wait": waited / spent,
        "mfu": None,
    }


WAYS = {"ours": ours, "plain Hugging Face": stock}


def _config(shape: Shape, work: Path, data: list[str], root: str | None, **settings: Any) -> StageConfig:
    return StageConfig.finetune(
        data=data, image_root=root, llm=work / "llm", vision=work / "vision", batch_size=shape.batch_size,
        dtype=shape.dtype, max_length=shape.max_length, **{**shape.settings, **settings},
    )  # fmt: skip


def _samples(processor: Any, data: list[str], root: str | None) -> Any:
    for pair in _pairs(data, root):
        yield processor.encode(pair.conversations, has_image=True), pair.load


def _pairs(data: list[str], root: str | None) -> Any:
    source = open_source(data, SourceOptions(image_root=root))
    for shard in source.shards:
        yield from (p for p in source.read(shard) if p.status in FINE and p.load is not None)


# ---- all of it -------------------------------------------------------------------------------------


def run(shape_name: str, data: list[str], root: str | None, runs: int) -> list[dict[str, Any]]:
    """Run both in turn, `runs` times; returns a row for each and one with their ratio."""
    shape = SHAPES[shape_name]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = [turn["text"] for pair in _pairs(data, root) for turn in pair.conversations or []]
        make_models(shape, texts, work)
        for _ in range(runs):
            for way in WAYS:
                told = work / "told.json"
                command = [sys.executable, "-m", "benchmarks.train", "--shape", shape_name, "--way", way]
                command += ["--work", folder, "--told", str(told), "--data", *data]
                command += ["--image-root", root] if root else []
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                found[way].append(json.loads(told.read_text()))
        packing = {
            budget: preview(_config(shape, work, data, root).replace(batch_size=128, token_budget=budget)).efficiency
            for budget in BUDGETS
        }
    rows: list[dict[str, Any]] = []
    for way, results in found.items():
        rows.append(
            {
                "way": way,
                "tokens/s": Spread.of([speed for result in results for speed in result["tokens_per_s"]]),
                "peak memory, GB": Spread.of([result["peak_bytes"] / 1e9 for result in results]),
                "useful tokens": f"{results[0]['useful']:.1%}",
                "waits for data": f"{max(result['data_wait'] for result in results):.2%}",
                "MFU": None if results[0]["mfu"] is None else f"{results[0]['mfu']:.1%}",
            }
        )
    mine, theirs = (row["tokens/s"].median for row in rows)
    memory = [row["peak memory, GB"].median for row in rows]
    rows.append(
        {"way": "ratio", "tokens/s": f"{mine / theirs:.2f}x", "peak memory, GB": f"{memory[0] / memory[1]:.2f}x"}
    )
    for budget, efficiency in packing.items():
        rows.append({"way": f"packing, budget {budget:,}, 128 a step", "useful tokens": f"{efficiency:.1%}"})
    heads = dict.fromkeys(rows[0])
    return [{**heads, **row} for row in rows]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--data", nargs="+", help="conversations about images (default: DAQUAR, or drawn scenes)")
    parser.add_argument("--image-root")
    parser.add_argument("--runs", type=int, default=3, help="runs of each")
    parser.add_argument("--save", action="store_true", help="save the result in benchmarks/results/")
    for name in ("--way", "--work", "--told"):  # of the processes that this one starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        result = WAYS[given.way](SHAPES[given.shape], Path(given.work), given.data, given.image_root)
        Path(given.told).write_text(json.dumps(result))
        return
    if given.shape == "7b" and not torch.cuda.is_available():
        console.print("--shape 7b needs a GPU, and this machine has none.")
        return
    with tempfile.TemporaryDirectory() as folder:
        data, root = given.data, given.image_root
        if not data and DAQUAR.is_dir():
            data, root = [str(DAQUAR / "llava_train.json")], str(DAQUAR)
        elif not data:
            data = [str(folder)]
            write_conversations(Path(folder), 400, seed=7)
        rows = run(given.shape, data, root, given.runs)
    settings = {"shape": given.shape, "data": [Path(item).name for item in data], "runs": given.runs}
    publish(f"train-{given.shape}", f"Finetuning a {given.shape} model", rows, settings, given.save)


if __name__ == "__main__":
    main()
