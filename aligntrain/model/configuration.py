"""Configuration of an AlignGPT model: LLM, vision tower, projector and alignment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from aligntrain.model.remote_code import AUTO_MAP, write_code

ALIGN_MODES = ("gated", "global", "local", "average", "none")
GATE_TEXTS = ("instruction", "all")
VISION_SELECTS = ("patch", "cls_patch")
# Towers whose first token is a class token; SigLIP's towers have patches only.
CLASS_TOKEN_TOWERS = ("clip_vision_model",)


class AlignGPTConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape and computation of an AlignGPT model.

    Args:
        text_config: the causal LLM's configuration.
        vision_config: the CLIP or SigLIP vision tower's configuration.
        image_token_id: placeholder id for one patch in ``input_ids``; -1: the LLM's vocabulary size.
        align_token_id: placeholder id for the alignment vector; -1: the LLM's vocabulary size + 1.
            Neither id needs a row in the LLM's embedding table, because their embeddings are replaced.
        num_levels: N, the number of alignment levels; N is the best. 8 in the paper (arXiv 2405.14129).
        align_mode: how the alignment vector is computed without levels (finetuning, inference):
            ``gated`` H[N] + sum a_i H[i] (the paper), ``global`` H[N], ``local`` sum a_i H[i],
            ``average`` H[N] + mean H[i], ``fixed:k`` H[k], ``none`` no alignment vector at all (LLaVA).
        gate_text: the text that the gate averages in training: ``instruction``, everything before the first
            answer, or ``all``, including the answers, as in the official code. At inference it is the prompt.
        gate_hidden_size: width of the gate's hidden layer; 256 in the official code.
        projector_type: ``linear`` or ``mlp{k}x_gelu``. The paper says linear, the official code uses mlp2x_gelu.
        vision_layer: index into the tower's hidden states (0 is the embedding; negative counts from the end).
        vision_select: ``patch`` drops the class token, ``cls_patch`` keeps it.
        s2_scales: side lengths in pixels for multi-scale input (S2, arXiv 2403.13043), ascending. The first is the
            tower's own, the others are multiples of it. None: one scale.

    Raises:
        ValueError: a setting has an unknown value or contradicts another.
    """

    model_type = "aligngpt"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = -1
    align_token_id: int = -1
    num_levels: int = 8
    align_mode: str = "gated"
    gate_text: str = "instruction"
    gate_hidden_size: int = 256
    projector_type: str = "mlp2x_gelu"
    vision_layer: int = -2
    vision_select: str = "patch"
    s2_scales: list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        vocab_size = self.text_config.vocab_size
        if self.image_token_id < 0:
            self.image_token_id = vocab_size
        if self.align_token_id < 0:
            self.align_token_id = vocab_size + 1
        # transformers ties a composite model's embeddings only if the outer configuration is set too.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self._check()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in transformers; also writes the model's code, for ``trust_remote_code=True``."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_code(Path(save_directory))

    def _check(self) -> None:
        if self.num_levels < 2:
            raise ValueError(f"num_levels is {self.num_levels}; it must be at least 2.")
        check_align_mode(self.align_mode, self.num_levels)
        if self.gate_text not in GATE_TEXTS:
            raise ValueError(f"gate_text is {self.gate_text!r}; choose one of {', '.join(GATE_TEXTS)}.")
        projector_depth(self.projector_type)
        if self.image_token_id == self.align_token_id:
            raise ValueError(f"image_token_id and align_token_id are both {self.image_token_id}; they must differ.")
        if self.vision_select not in VISION_SELECTS:
            raise ValueError(f"vision_select is {self.vision_select!r}; choose one of {', '.join(VISION_SELECTS)}.")
        if self.vision_select == "cls_patch" and not self.has_class_token:
            raise ValueError(
                f"vision_select is 'cls_patch', but a {self.vision_config.model_type} tower has no class token; "
                "choose 'patch'."
            )
        if self.s2_scales is not None:
            base = self.vision_config.image_size
            if self.vision_select != "patch":
                raise ValueError("s2_scales needs vision_select 'patch', because tiles have no common class token.")
            if list(self.s2_scales) != sorted(set(self.s2_scales)) or self.s2_scales[:1] != [base]:
                raise ValueError(f"s2_scales is {self.s2_scales}; it must ascend and start with the tower's {base} px.")
            if any(scale % base for scale in self.s2_scales):
                raise ValueError(f"s2_scales is {self.s2_scales}; every scale must be a multiple of {base} px.")

    @property
    def has_class_token(self) -> bool:
        """Whether the first token of the tower's output is a class token."""
        return self.vision_config.model_type in CLASS_TOKEN_TOWERS

    @property
    def num_patches(self) -> int:
        """P: number of positions that an image takes in the sequence."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return int(side * side + (self.vision_select == "cls_patch"))

    @property
    def vision_feature_size(self) -> int:
        """Channels of one patch before the projector: the tower's width times the number of scales."""
        return int(self.vision_config.hidden_size * len(self.s2_scales or [None]))

    @property
    def pixel_size(self) -> int:
        """Side length of the model's input in pixels: the tower's own, or the largest scale."""
        return int(self.s2_scales[-1] if self.s2_scales else self.vision_config.image_size)


def check_align_mode(mode: str, num_levels: int) -> None:
    """Check ``align_mode``.

    Raises:
        ValueError: not one of ALIGN_MODES, nor ``fixed:k`` with 1 <= k <= num_levels.
    """
    fixed = re.fullmatch(r"fixed:(\d+)", mode)
    if fixed is None and mode not in ALIGN_MODES:
        raise ValueError(f"align_mode is {mode!r}; choose one of {', '.join(ALIGN_MODES)} or fixed:k.")
    if fixed is not None and not 1 <= int(fixed[1]) <= num_levels:
        raise ValueError(f"align_mode is {mode!r}, but levels are 1 to {num_levels}.")


def projector_depth(projector_type: str) -> int:
    """Number of linear layers in a projector: 1 for ``linear``, k for ``mlp{k}x_gelu``.

    Raises:
        ValueError: any other type.
    """
    if projector_type == "linear":
        return 1
    mlp = re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector_type)
    if mlp is None:
        raise ValueError(f"projector_type is {projector_type!r}; choose linear or mlp{{k}}x_gelu, e.g. mlp2x_gelu.")
    return int(mlp[1])
