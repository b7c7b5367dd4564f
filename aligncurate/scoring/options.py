"""The options of `ingest` and `score`, stated once for the command line, the functions and the manifest."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from aligncurate.encoders.device import Precision
from aligncurate.errors import UserError
from aligncurate.images.formats import DecodeMode
from aligncurate.settings import check, setting

ScoreText = Literal["assistant", "user", "all"]


@dataclass(frozen=True)
class IngestOptions:
    """Options of `ingest`. Raises UserError for values that cannot be used."""

    workers: int | None = setting(
        "Threads that read and decode images.", None, at_least=1, shown="one per core, at most 16", recorded=False
    )
    embed_images: bool = setting("Copy the image bytes into the dataset.", False)
    limit: int | None = setting("Process at most N pairs.", None, at_least=1, shown="all")
    retry_errors: bool = setting("Process the failed rows of an earlier run again.", False, recorded=False)
    partition: str | None = setting(
        "I/N: only every N-th shard, beginning with the I-th (from 1); N such runs may share --out.",
        None,
        shown="all",
        recorded=False,
    )
    allow_missing: int | None = setting(
        "Finish without up to N shards that cannot be read; each becomes one row.",
        None,
        at_least=0,
        shown="none",
        recorded=False,
    )
    engine: Literal["local", "ray"] = setting(
        "local: this machine; ray: actors on a Ray cluster.", "local", group="Cluster", recorded=False
    )
    address: str | None = setting(
        "Ray cluster, such as auto: the one that this machine belongs to.",
        None,
        shown="Ray starts on this machine",
        recorded=False,
    )
    num_gpus: float | None = setting(
        "GPUs of each actor.", None, at_least=0, shown="1 if --device is a GPU, else 0", recorded=False
    )
    concurrency: int | None = setting(
        "Actors at most; those without a place start when a machine joins.",
        None,
        at_least=1,
        shown="as many as the cluster has places",
        recorded=False,
    )

    def __post_init__(self) -> None:
        check(self)
        self.part_of  # noqa: B018, raises

    @property
    def part_of(self) -> tuple[int, int]:
        """Which shards: those whose number from 0, modulo the second, is the first. Raises UserError."""
        if self.partition is None:
            return 0, 1
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.partition)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--partition {self.partition}: use I/N with I from 1 to N, such as 1/8.")
        return int(match[1]) - 1, int(match[2])

    @property
    def worker_count(self) -> int:
        """`workers`, or its default on this machine."""
        return self.workers or min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class ScoreOptions(IngestOptions):
    """Options of `score`. Raises UserError for values that cannot be used.

    Several models, separated by commas, share one pass over the images: scores of the first are the column `score`,
    those of each further model `score_<model>`.
    """

    model: str | None = setting(
        "open_clip model, hf-hub:organization/name, or tiny; several, separated by commas, share one pass.",
        None,
        group="Encoder",
        shown="ViT-L-14-quickgelu",
        recorded=False,  # as the other options of the encoder: the manifest records its identity
    )
    pretrained: str | None = setting(
        "open_clip tag or weights file; one per model, separated by commas.", None, shown="openai", recorded=False
    )
    model_config: tuple[str, ...] | None = setting(
        "open_clip JSON config for a model of your own, named like the file. May be repeated.", None, recorded=False
    )
    device: str = setting("auto, cpu, cuda or cuda:0.", "auto", recorded=False)
    devices: str | None = setting(
        "Several GPUs of this machine, each in a process of its own: all, or numbers such as 0,1.",
        None,
        shown="only --device",
        recorded=False,
    )
    mixed_devices: bool = setting(
        "Resume a run that began on another kind of device; its scores differ in the last digits.",
        False,
        recorded=False,
    )
    precision: Precision = setting("auto is bf16 on GPUs that support it, else fp32.", "auto", recorded=False)
    compiled: bool = setting(
        "Use torch.compile and CUDA graphs: a slow start, then faster.", False, flag="--compile", recorded=False
    )
    batch_size: int | None = setting(
        "Pairs encoded at once.", None, at_least=1, shown="what fits into GPU memory, 32 on the CPU"
    )
    decode: DecodeMode = setting(
        "exact: open_clip's own preprocessing; fast: nearly the same, faster; gpu: decode JPEGs on the GPU.",
        "exact",
        group="Scoring",
    )
    embeddings: Literal["none", "fp16"] = setting(
        "fp16: keep the first model's image and text embeddings as columns.", "none"
    )
    score_text: ScoreText = setting("Whose turns of a conversation to compare with the image.", "assistant")

    def __post_init__(self) -> None:
        if isinstance(self.model_config, str) or hasattr(self.model_config, "__fspath__"):
            object.__setattr__(self, "model_config", (self.model_config,))
        super().__post_init__()
