"""Packing: several samples in one row that do not attend to each other, and whether an LLM supports it.

    input_ids     BOS al im im a  b  BOS c  d  BOS al im im e  pad pad
    sequence_ids   1  1  1  1  1  1   2  2  2   3  3  3  3  3   0   0
    positions      0  1  2  3  4  5   0  1  2   0  1  2  3  4   0   0

For every attention backend, sliding windows included, transformers derives the block mask from positions that restart
at 0; but only if there is neither an attention mask nor a cache. The model makes sure of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def positions_of(sequence_ids_BL: Tensor) -> Tensor:
    """Position of each token within its own sample.

    Args:
        sequence_ids_BL: int64 [B, L]; one number per sample, whose tokens are adjacent; 0 is padding.

    Returns:
        int64 [B, L]; 0 for all padding, so that each padding token is a sample of its own that no other attends to.
    """
    index_L = torch.arange(sequence_ids_BL.shape[1], device=sequence_ids_BL.device)
    start_BL = torch.ones_like(sequence_ids_BL, dtype=torch.bool)
    start_BL[:, 1:] = sequence_ids_BL[:, 1:] != sequence_ids_BL[:, :-1]
    start_BL |= sequence_ids_BL == 0
    return index_L - torch.where(start_BL, index_L, 0).cummax(1).values


def sequence_ids_of(lengths: list[int], row_length: int) -> list[int]:
    """Sequence ids of one row: i repeated ``lengths[i-1]`` times for samples i = 1, 2, …, then 0 up to ``row_length``.

    Raises:
        ValueError: the samples do not fit into the row.
    """
    if sum(lengths) > row_length:
        raise ValueError(f"samples with {sum(lengths)} tokens in total do not fit into a row of {row_length}.")
    ids = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    return ids + [0] * (row_length - len(ids))


@torch.no_grad()
def can_pack(language_model: nn.Module) -> bool:
    """Test whether the LLM keeps packed samples apart.

    Runs two short random samples packed and separately, on the LLM's own device and in its dtype. LLMs with recurrent
    state, or whose attention ignores positions, fail; train them with padded batches. On a CPU, where FlashAttention
    does not run and flex attention takes long to compile, SDPA is used instead: transformers derives the masks of all
    three from the same positions.
    """
    lm: Any = language_model
    attention = lm.config._attn_implementation
    stand_in = lm.device.type == "cpu" and attention not in ("eager", "sdpa")
    table = lm.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, table.shape[0], (1, 24), generator=generator).to(table.device)
    positions = positions_of(torch.tensor([[1] * 11 + [2] * 13], device=table.device))
    was_training = lm.training
    lm.eval()
    try:
        if stand_in:
            lm.set_attn_implementation("sdpa")
        packed = lm(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 11:].float()
        alone = lm(input_ids=ids[:, 11:], use_cache=False).logits[0].float()
    finally:
        lm.train(was_training)
        if stand_in:
            lm.set_attn_implementation(attention)
    tolerance = 1e-4 if table.dtype == torch.float32 else 5e-2
    return bool((packed - alone).abs().max() <= tolerance * alone.abs().max().clamp(min=1e-3))
