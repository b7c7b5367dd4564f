"""Settings of a training stage: one frozen record, used for pretraining and for finetuning."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from aligncurate.errors import UserError
from aligncurate.io.files import as_path
from aligncurate.io.paths import RemotePath
from aligncurate.settings import check, check_names, setting
from aligncurate.sources.options import Format

_PAPER: dict[str, dict[str, Any]] = {
    "pretrain": {"learning_rate": 1e-3, "batch_size": 256, "template": "plain", "image_mode": "crop"},
    "finetune": {"learning_rate": 2e-5, "batch_size": 128, "template": "v1", "image_mode": "pad"},
}
_MAX_LEVELS = 127  # `aligncurate.levels` has it too, but imports numpy, which --help can do without
_LARGEST = 1000  # of learning rates and the like: more is a typing error, and overflows float32


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of one stage. `StageConfig.pretrain(...)` and `.finetune(...)` fill in those of the AlignGPT paper
    (arXiv 2405.14129); every field can be given there, in a TOML file and on the command line.

    Raises UserError for a value of the wrong type, out of range, or in conflict with another.
    """

    stage: Literal["pretrain", "finetune"] = setting("pretrain or finetune.")
    data: tuple[str, ...] = setting("Dataset folders, tars, or any other source.", ())
    out: str = setting("Output folder; created if missing.", "", group="Input and output", recorded=False)

    llm: str | None = setting(
        "LLM for a new model: a folder, a Hugging Face Hub name, or tiny (built-in).", None, group="Model"
    )
    vision: str | None = setting("Vision tower (CLIP, SigLIP) for a new model: a folder, a Hub name, or tiny.", None)
    init: str | None = setting("Model folder to start from, such as the pretrained one.", None)

    num_levels: int | None = setting(
        "Number of alignment levels N of a new model (that of the data, or 8).", None, at_least=2, at_most=_MAX_LEVELS
    )
    align_mode: str | None = setting(
        "Alignment vector: gated (default), global, local, average, fixed:k or none.", None, none_is_value=True
    )
    gate_text: Literal["instruction", "all"] | None = setting(
        "Text that the gate sees: instruction (default) or all, answers included.", None
    )
    projector_type: str | None = setting("Projector: linear or mlp{k}x_gelu (mlp2x_gelu for a new model).", None)
    vision_layer: int | None = setting("Hidden layer of the vision tower to use (-2 for a new model).", None)
    vision_select: Literal["patch", "cls_patch"] | None = setting(
        "Vision features: patch (default), or cls_patch to keep the class token.", None
    )
    s2_scales: tuple[int, ...] | None = setting("Image sizes for multi-scale input, such as 336,672,1008.", None)
    template: Literal["plain", "v1", "chat"] = setting(
        "Prompt format: plain captions, v1, or the LLM's own chat template.",
        shown="plain for pretrain, v1 for finetune",
    )
    image_mode: Literal["crop", "pad"] = setting(
        "Make images square by centre crop or by padding.", shown="crop for pretrain, pad for finetune"
    )

    learning_rate: float = setting(
        "Peak learning rate.",
        at_least=0,
        at_most=_LARGEST,
        group="Optimisation",
        shown="1e-3 for pretrain, 2e-5 for finetune",
    )
    projector_lr: float | None = setting(
        "Peak learning rate of the projector.", None, at_least=0, at_most=_LARGEST, shown="--learning-rate"
    )
    batch_size: int = setting(
        "Samples per optimizer step, over all ranks.", at_least=1, shown="256 for pretrain, 128 for finetune"
    )
    epochs: int = setting("Passes over the data.", 1, at_least=1)
    max_steps: int | None = setting("Stop, and end the learning rate schedule, after N steps.", None, at_least=1)
    warmup_ratio: float = setting("Fraction of steps used to warm up the learning rate.", 0.03, at_least=0, at_most=1)
    weight_decay: float = setting("AdamW weight decay, applied to matrices only.", 0.0, at_least=0, at_most=_LARGEST)
    beta1: float = setting("AdamW beta1.", 0.9, at_least=0, at_most=1)
    beta2: float = setting("AdamW beta2.", 0.999, at_least=0, at_most=1)
    epsilon: float = setting("AdamW epsilon.", 1e-8, at_least=0, at_most=_LARGEST)
    max_grad_norm: float = setting("Clip gradients to this norm (0 disables).", 1.0, at_least=0)
    dtype: Literal["bf16", "fp32"] = setting("Compute type; bf16 keeps float32 master weights.", "bf16")
    seed: int = setting("Seed for data order, new weights and dropout.", 0, at_least=0, at_most=2**63 - 1)

    max_length: int = setting("Truncate samples to this many tokens.", 2048, at_least=8, group="Batches")
    token_budget: int = setting("Maximum tokens per micro-batch, padding included.", 4096, at_least=8)
    packing: Literal["auto", "on", "off"] = setting(
        "Pack several samples into a row; auto does it if the LLM supports it.", "auto"
    )
    level_weights: dict[int, float] | None = setting(
        "How often samples of a level are used per epoch, such as 1:0,2:0.5.", None
    )
    stratified: bool = setting("Give every step the same mix of levels as the whole data.", False)

    lora_rank: int | None = setting("Train the LLM with LoRA adapters of this rank.", None, at_least=1, group="LoRA")
    lora_alpha: float | None = setting(
        "LoRA alpha (scale is alpha / rank).", None, at_least=0, at_most=1e6, shown="twice the rank, so the scale is 2"
    )
    lora_dropout: float = setting("LoRA dropout.", 0.05, at_least=0, at_most=1)

    parallel: Literal["auto", "ddp", "fsdp"] = setting(
        "Multi-GPU mode; auto is ddp for pretrain and fsdp for finetune.", "auto", recorded=False, group="Machine"
    )
    attention: str = setting("Attention of the LLM: sdpa, eager, flash_attention_2 or flex_attention.", "sdpa")
    checkpointing: bool = setting("Recompute activations in the backward pass to save memory.", False, recorded=False)
    compile: bool = setting("Use torch.compile on each layer.", False, recorded=False)
    fused: bool = setting("Use the fused AdamW kernel on GPUs.", True, recorded=False)

    format: Format | None = setting("Input format (auto-detected by default).", None, group="Reading")
    caption_column: str | None = setting("Column or field with the caption.", None)
    image_column: str | None = setting("Column or field with the image.", None)
    image_root: str | None = setting("Folder that image paths are relative to.", None)
    workers: int = setting("Threads that read and decode images.", 4, at_least=1, at_most=1024, recorded=False)
    prefetch: int = setting("Steps to read ahead.", 2, at_least=1, at_most=1000, recorded=False)

    save_every: int = setting(
        "Steps between checkpoints.", 500, at_least=1, recorded=False, group="Checkpoints and logs"
    )
    keep: int = setting("Number of checkpoints to keep.", 2, at_least=1, recorded=False)
    resume: bool = setting(
        "Resume from the last checkpoint in --out; --no-resume deletes the checkpoints and starts over.",
        True, recorded=False,
    )  # fmt: skip
    log_every: int = setting("Steps between log lines.", 10, at_least=1, recorded=False)
    log_to: tuple[str, ...] = setting("Also log to tensorboard, wandb or trackio.", (), recorded=False)

    LOGGERS: ClassVar[tuple[str, ...]] = ("tensorboard", "wandb", "trackio")

    @classmethod
    def pretrain(cls, **settings: Any) -> StageConfig:
        """Stage 1 trains the projector and level embeddings: lr 1e-3, batch size 256, centre crop, plain captions."""
        return cls.of("pretrain", settings)

    @classmethod
    def finetune(cls, **settings: Any) -> StageConfig:
        """Stage 2 trains the projector, gate and LLM: lr 2e-5, batch size 128, padded images, conversations."""
        return cls.of("finetune", settings)

    @classmethod
    def of(cls, stage: str, settings: Mapping[str, Any], where: str = "") -> StageConfig:
        """The paper's settings of a stage, overridden by `settings`.

        Args:
            stage: pretrain or finetune.
            settings: by field name.
            where: prefix of error messages, such as the file that the settings come from.

        Raises UserError for an unknown name, with the closest known one.
        """
        if stage not in _PAPER:
            raise UserError(f"{where}stage {stage}: use pretrain or finetune.")
        if "stage" in settings:
            raise UserError(f"{where}unknown setting 'stage': the command sets it; use [{stage}] in a TOML file.")
        check_names(cls, settings, where)
        try:
            return cls(**{"stage": stage, **_PAPER[stage], **settings})
        except UserError as error:
            raise UserError(f"{where}{error}") from None

    @classmethod
    def from_toml(cls, file: str | Path, stage: str, **settings: Any) -> StageConfig:
        """Settings from a TOML file: plain keys for both stages, tables [pretrain] and [finetune] for one.

        `settings` override the file. Raises UserError when the file cannot be read or has an unknown key.
        """
        try:
            read = tomllib.loads(Path(file).read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; --config takes a TOML file.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a readable TOML file ({error}).") from None
        tables = {name: read.pop(name) for name in _PAPER if name in read}
        own = tables.get(stage, {})
        if not isinstance(own, dict):
            raise UserError(f"{file}: {stage} must be a table, [{stage}].")
        cls.of(stage, {**read, **own}, f"{file}: ")  # so that a mistake in the file is reported with the file's name
        return cls.of(stage, {**read, **own, **settings})

    def replace(self, **settings: Any) -> StageConfig:
        """The same with other settings."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "stage"}
        return self.of(self.stage, {**given, **settings})

    def to_json(self) -> dict[str, Any]:
        """All settings as a JSON object; `aligncurate.settings.recorded` gives those that change the result."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def __post_init__(self) -> None:
        check(self)
        if isinstance(as_path(self.out), RemotePath):
            raise UserError(f"--out {self.out}: models are written to local folders only; write to one and copy it.")
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise UserError(f"--{name} 1: use a number below 1.")
        for name in self.log_to:
            if name not in self.LOGGERS:
                raise UserError(f"--log-to {name}: use one of {', '.join(self.LOGGERS)}.")
        if self.token_budget < self.max_length:
            raise UserError(
                f"--token-budget {self.token_budget} is below --max-length {self.max_length}, so a sample may not fit "
                "into a micro-batch; raise one or lower the other."
            )
        if self.token_budget % 8:
            raise UserError(f"--token-budget {self.token_budget}: use a multiple of 8.")
        for level, weight in (self.level_weights or {}).items():
            if not 1 <= level <= _MAX_LEVELS or not 0 <= weight < 1000:
                raise UserError(
                    f"--level-weights {level}:{weight:g}: levels lie between 1 and {_MAX_LEVELS}, weights "
                    "between 0 and 1000."
                )
        if self.stage == "pretrain" and self.lora_rank is not None:
            raise UserError("--lora-rank: pretraining does not train the LLM; use LoRA with finetune.")
