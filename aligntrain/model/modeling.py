"""AlignGPT as an ordinary Hugging Face model: vision tower -> projector -> [alignment vector] -> causal LLM.

Shapes: B rows, L positions, I images of the batch in row order, P patches, D the LLM's width, N levels,
V vocabulary.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from aligntrain.model.alignment import AlignmentGate, LevelEmbeddings, gate_dots, mean_text
from aligntrain.model.card import write_card
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.llm import decoder_of, head_of
from aligntrain.model.loss import IGNORE, token_losses
from aligntrain.model.packing import positions_of
from aligntrain.model.prompt_lookup import suppress_placeholders
from aligntrain.model.remote_code import write_code
from aligntrain.model.vision import build_projector, vision_features


@dataclass
class AlignGPTOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """Output of the model.

    Attributes:
        loss: with labels: the sum over supervised tokens / ``num_items_in_batch``, or their mean without it; scalar.
        logits: [B, L or logits_to_keep, V]; None with labels.
        token_losses: with labels: the loss of each supervised token in row-major order; float32 [M], detached.
        gate_weights: if the gate was used: its weights, float32 [I, N-1].
        gate_dots: if the gate was used: its input, [I, P].
    """

    token_losses: Tensor | None = None
    gate_weights: Tensor | None = None
    gate_dots: Tensor | None = None


class AlignGPTForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal LLM that reads ``BOS, <align>, text, <image> x P, text``.

    ``<align>`` is the placeholder of the alignment vector, ``<image>`` of one patch. A sample has at most one image;
    without an image it has no ``<align>`` either. AutoModelForCausalLM builds the LLM from ``config.text_config``,
    AutoModel the vision tower from ``config.vision_config``.
    """

    config_class = AlignGPTConfig
    config: AlignGPTConfig
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: AlignGPTConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = build_projector(config.projector_type, config.vision_feature_size, width)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.align_mode != "none":
            self.level_embeddings = LevelEmbeddings(config.num_levels, width)
            self.gate = AlignmentGate(config.num_patches, config.num_levels, config.gate_hidden_size)
        self.post_init()

    @classmethod
    def from_components(
        cls,
        language_model: PreTrainedModel | str | Path,
        vision_tower: PreTrainedModel | str | Path,
        *,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        **settings: Any,
    ) -> AlignGPTForConditionalGeneration:
        """Build a new model from a trained LLM and vision tower; projector, level embeddings and gate are random.

        Args:
            language_model: a causal LLM, or its folder or name.
            vision_tower: a CLIP or SigLIP (vision) model, or its folder or name.
            dtype: dtype of the whole model; default: the LLM's.
            attn_implementation: as in ``from_pretrained``.
            settings: fields of AlignGPTConfig.
        """
        if not isinstance(language_model, PreTrainedModel):
            language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype or "auto")
        if not isinstance(vision_tower, PreTrainedModel):
            vision_tower = AutoModel.from_pretrained(vision_tower, dtype="auto")
        vision_tower = getattr(vision_tower, "vision_model", vision_tower)
        config = AlignGPTConfig(
            text_config=language_model.config.to_dict(), vision_config=vision_tower.config.to_dict(), **settings
        )
        state = {f"language_model.{name}": tensor for name, tensor in language_model.state_dict().items()}
        state |= {f"vision_tower.{name}": tensor for name, tensor in vision_tower.state_dict().items()}
        model: AlignGPTForConditionalGeneration = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype or language_model.dtype,
            attn_implementation=attn_implementation,
        )
        model.generation_config = copy.deepcopy(language_model.generation_config)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called for this model's own modules only; the LLM and the tower initialise themselves. As in the official
        # code, linear layers are initialised by torch's default, not by transformers' normal(0, 0.02).
        if isinstance(module, LevelEmbeddings):
            initialization.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Linear):
            initialization.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.in_features)
            initialization.uniform_(module.bias, -bound, bound)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def set_stage(self, stage: str) -> list[str]:
        """Choose what is trained.

        ``pretrain``: projector and level embeddings. ``finetune``: projector, LLM and, if it is used, the gate.

        Returns:
            The names of the parameters that now require gradients.

        Raises:
            ValueError: an unknown stage.
        """
        if stage == "pretrain":
            learning = ["projector", "level_embeddings"]
        elif stage == "finetune":
            learning = ["projector", "language_model"]
            if self.config.align_mode in ("gated", "local"):
                learning.append("gate")
        else:
            raise ValueError(f"stage is {stage!r}; choose pretrain or finetune.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in learning)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        levels: Tensor | None = None,
        gate_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> AlignGPTOutput:
        """Compute the loss if labels are given, else the logits.

        Args:
            input_ids: int64 [B, L], with ``config.align_token_id`` and ``config.image_token_id`` as placeholders.
            pixel_values: [I, 3, H, H], in the order of the samples that they belong to.
            attention_mask: [B, L], 0 for padding, on either side. Not with ``sequence_ids``.
            position_ids: int64 [B, L]; default: derived from the mask or the sequence ids.
            past_key_values: cache of earlier tokens, which include the images.
            inputs_embeds: [B, L, D] instead of ``input_ids``; for text, or with images already in place.
            labels: int64 [B, L], unshifted token ids or -100; placeholders never count.
            levels: int64 [I], 1..N: ``<align>`` is H[level] (pretraining). Default: as ``config.align_mode`` says.
            gate_mask: bool [B, L], the tokens that the gate averages; BOS, placeholders and padding never count.
                Default: the tokens before the sample's first label (``gate_text`` "instruction"), or all ("all", or
                without labels). If it is shorter than the input, the rest does not count.
            sequence_ids: int64 [B, L], for packed rows: one number > 0 per sample, 0 for padding. Only for LLMs that
                pass ``packing.can_pack``, which is too slow to check here.
            num_items_in_batch: supervised tokens of the whole optimizer step; the loss is the sum divided by it.
            use_cache: as in transformers; always off in packed rows.
            logits_to_keep: as in transformers: compute the last N logits, or those at given positions; 0: all.

        Raises:
            ValueError: placeholders, images, levels and masks contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        if sequence_ids is not None:
            if past_key_values is not None or attention_mask is not None:
                raise ValueError("packed rows (sequence_ids) cannot be used with attention_mask or past_key_values.")
            use_cache = False
            position_ids = positions_of(sequence_ids) if position_ids is None else position_ids
        elif attention_mask is not None and attention_mask.ndim == 2 and position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            if past_key_values is not None:
                position_ids = position_ids[:, past_key_values.get_seq_length() :]
        gate: dict[str, Tensor] = {}
        if labels is not None:
            placeholders = (labels == self.config.image_token_id) | (labels == self.config.align_token_id)
            labels = labels.masked_fill(placeholders, IGNORE)
        if input_ids is not None:
            samples_BL = sequence_ids if sequence_ids is not None else _samples_of(input_ids, attention_mask)
            inputs_embeds, gate = self._embed(input_ids, samples_BL, pixel_values, levels, gate_mask, labels)
        common = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        if labels is None:
            output = self.language_model(logits_to_keep=logits_to_keep, **common)
            return AlignGPTOutput(
                logits=output.logits,
                past_key_values=output.get("past_key_values"),
                hidden_states=output.get("hidden_states"),
                attentions=output.get("attentions"),
                **gate,
            )
        output = decoder_of(self.language_model)(**{**common, "use_cache": False})
        losses_M = token_losses(output.last_hidden_state, labels, sequence_ids, head_of(self.language_model))
        count = max(len(losses_M), 1) if num_items_in_batch is None else num_items_in_batch
        return AlignGPTOutput(
            loss=losses_M.sum() / count,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            token_losses=losses_M.detach(),
            **gate,
        )

    def _gate_text(
        self, input_ids: Tensor, samples_BL: Tensor, gate_mask: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """The tokens that the gate averages, bool [B, L]."""
        ids, config = input_ids, self.config
        text_BL = (samples_BL > 0) & (ids != config.image_token_id) & (ids != config.align_token_id)
        bos = config.text_config.bos_token_id
        if bos is not None:
            first_BL = torch.ones_like(text_BL)
            first_BL[:, 1:] = samples_BL[:, 1:] != samples_BL[:, :-1]
            text_BL &= ~(first_BL & (ids == bos))
        if gate_mask is not None:
            text_BL[:, : gate_mask.shape[1]] &= gate_mask.bool()
            text_BL[:, gate_mask.shape[1] :] = False
        elif labels is not None and config.gate_text == "instruction":
            # The position of the first label of each sample in each row; L for samples without labels.
            length = ids.shape[1]
            index_BL = torch.arange(length, device=ids.device).expand_as(ids)
            first_BS = ids.new_full((ids.shape[0], int(samples_BL.max()) + 1), length).scatter_reduce(
                1, samples_BL, torch.where(labels != IGNORE, index_BL, length), "amin"
            )
            text_BL &= index_BL < first_BS.gather(1, samples_BL)
        return text_BL

    def _embed(
        self,
        input_ids: Tensor,
        samples_BL: Tensor,
        pixel_values: Tensor | None,
        levels: Tensor | None,
        gate_mask: Tensor | None,
        labels: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Input embeddings [B, L, D] with patches and alignment vectors in place, and the gate's output."""
        image_BL = input_ids == self.config.image_token_id
        align_BL = input_ids == self.config.align_token_id
        # Placeholder ids may lie beyond the embedding table; use row 0, which is overwritten.
        embeds_BLD: Tensor = self.get_input_embeddings()(input_ids.masked_fill(image_BL | align_BL, 0))
        if pixel_values is None or len(pixel_values) == 0:
            _check_placeholders(int(image_BL.sum()), int(align_BL.sum()), 0, self.config)
            if self.training and torch.is_grad_enabled():
                embeds_BLD = embeds_BLD + self._zero_from_blank_image(embeds_BLD)
            return embeds_BLD, {}
        _check_placeholders(int(image_BL.sum()), int(align_BL.sum()), len(pixel_values), self.config)
        features_IPD = self.projector(vision_features(self.vision_tower, pixel_values, self.config))
        embeds_BLD = embeds_BLD.masked_scatter(image_BL[..., None], features_IPD.to(embeds_BLD.dtype))
        if self.config.align_mode == "none":
            if levels is not None:
                raise ValueError("the model has no alignment vector (align_mode 'none'), but levels were given.")
            return embeds_BLD, {}
        image_of_BL = _images_of(image_BL, align_BL, samples_BL, self.config.num_patches)
        text_BL = self._gate_text(input_ids, samples_BL, gate_mask, labels)
        align_ID, gate = self._align(features_IPD, embeds_BLD[text_BL], image_of_BL[text_BL], levels)
        return embeds_BLD.masked_scatter(align_BL[..., None], align_ID.to(embeds_BLD.dtype)), gate

    def _align(
        self, features_IPD: Tensor, text_MD: Tensor, image_M: Tensor, levels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The alignment vectors [I, D], and the gate's output."""
        num_images = len(features_IPD)
        if levels is not None:
            if levels.shape != (num_images,):
                raise ValueError(f"levels has shape {tuple(levels.shape)}; the batch has {num_images} images.")
            return self.level_embeddings(levels), {}
        if self.config.align_mode not in ("gated", "local"):
            return self.level_embeddings.mix(self.config.align_mode, None, num_images), {}
        dots_IP = gate_dots(features_IPD, mean_text(text_MD, image_M, num_images))
        alpha_IN1 = self.gate(dots_IP)
        align_ID = self.level_embeddings.mix(self.config.align_mode, alpha_IN1, num_images)
        return align_ID, {"gate_weights": alpha_IN1, "gate_dots": dots_IP}

    def _zero_from_blank_image(self, embeds_BLD: Tensor) -> Tensor:
        """Zero, computed from a blank image by the modules that process images.

        Without it the projector and the gate would have no gradients in a text-only batch, and a distributed run would
        hang: its ranks would wait for each other in different modules.
        """
        size = self.config.pixel_size
        features_IPD = self.projector(
            vision_features(self.vision_tower, embeds_BLD.new_zeros(1, 3, size, size), self.config)
        )
        zero: Tensor = features_IPD[:0].sum()
        if self.config.align_mode != "none":
            text_MD = embeds_BLD.new_zeros(0, embeds_BLD.shape[-1])
            none_M = torch.zeros(0, dtype=torch.long, device=embeds_BLD.device)
            align_ID, _ = self._align(features_IPD, text_MD, none_M, None)
            zero = zero + align_ID[:0].sum()
        return zero.to(embeds_BLD.dtype)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Features of images as the LLM reads them, as transformers' other models give them.

        Args:
            pixel_values: [I, 3, H, H].
            kwargs: ignored; other models take settings here that this one has in its configuration.

        Returns:
            ``last_hidden_state``: the projector's input [I, P, S*C]; ``pooler_output``: its output, a list of [P, D].
        """
        features_IPC = vision_features(self.vision_tower, pixel_values, self.config)
        return BaseModelOutputWithPooling(
            last_hidden_state=features_IPC, pooler_output=list(self.projector(features_IPC))
        )

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As in transformers. The gate averages the prompt only, not the generated tokens."""
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None and kwargs.get("gate_mask") is None:
            kwargs["gate_mask"] = torch.ones_like(input_ids, dtype=torch.bool)
        return super().generate(inputs, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(*args, **kwargs)
        return suppress_placeholders(generator, (self.config.image_token_id, self.config.align_token_id))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in transformers; also writes the model's code, and a model card if there is none yet.

        Raises OSError if the weights cannot be written, as on a full disk.
        """
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"{save_directory}: the model cannot be written ({error})") from None
        if kwargs.get("is_main_process", True):
            write_code(Path(save_directory))
            write_card(Path(save_directory), self.config)


def _samples_of(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Sequence ids of rows with one sample each: 1, and 0 for padding."""
    if attention_mask is None or attention_mask.shape != input_ids.shape:
        return torch.ones_like(input_ids)
    return attention_mask.to(input_ids.dtype)


def _check_placeholders(image_tokens: int, align_tokens: int, images: int, config: AlignGPTConfig) -> None:
    patches = config.num_patches
    if image_tokens != images * patches:
        raise ValueError(
            f"the batch has {images} images of {patches} patches each, but {image_tokens} image placeholders in "
            f"input_ids; there must be {images * patches}."
        )
    expected = 0 if config.align_mode == "none" else images
    if align_tokens != expected:
        raise ValueError(
            f"the batch has {images} images, but {align_tokens} align placeholders in input_ids; "
            f"there must be {expected} (align_mode {config.align_mode!r})."
        )


def _images_of(image_BL: Tensor, align_BL: Tensor, samples_BL: Tensor, patches: int) -> Tensor:
    """The image that belongs to the sample at each position, int64 [B, L]; -1: none.

    Raises:
        ValueError: a sample has two images, or an image without alignment placeholder.
    """
    rows_I, columns_I = (index[::patches] for index in image_BL.nonzero(as_tuple=True))
    align_rows_I, align_columns_I = align_BL.nonzero(as_tuple=True)
    samples_I = samples_BL[rows_I, columns_I]
    owner_BS = samples_BL.new_full((samples_BL.shape[0], int(samples_BL.max()) + 1), -1)
    owner_BS[rows_I, samples_I] = torch.arange(len(rows_I), device=rows_I.device)
    same = (align_rows_I == rows_I) & (samples_BL[align_rows_I, align_columns_I] == samples_I)
    if not bool(same.all()) or int((owner_BS >= 0).sum()) != len(rows_I):
        raise ValueError("every sample with an image needs exactly one image and one align placeholder.")
    return owner_BS.gather(1, samples_BL)
