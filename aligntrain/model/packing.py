"""Several samples in one row, none of which sees another: positions, and whether an LLM can do it.

    input_ids     BOS al im im a  b  BOS c  d  BOS al im im e  pad pad
    sequence_ids   1  1  1  1  1  1   2  2  2   3  3  3  3  3   0   0
    positions      0  1  2  3  4  5   0  1  2   0  1  2  3  4   0   0

transformers builds the block mask of every attention backend, sliding windows included, from positions that start
again; but only where there is neither an attention mask nor a cache. The model sees to both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def positions_of(sequence_ids_BL: Tensor) -> Tensor:
    """Position of every token within its own sample.

    Args:
        sequence_ids_BL: int64 [B, L]; one value per sample, its tokens side by side; 0 is padding.

    Returns:
        int64 [B, L]; 0 throughout the padding, so that every padding token is a sample of its own that no other sees.
    """
    index_L = torch.arange(sequence_ids_BL.shape[1], device=sequence_ids_BL.device)
    start_BL = torch.ones_like(sequence_ids_BL, dtype=torch.bool)
    start_BL[:, 1:] = sequence_ids_BL[:, 1:] != sequence_ids_BL[:, :-1]
    start_BL |= sequence_ids_BL == 0
    return index_L - torch.where(start_BL, index_L, 0).cummax(1).values


def sequence_ids_of(lengths: list[int], row_length: int) -> list[int]:
    """Sequence ids of one row: sample i (from 1) ``lengths[i-1]`` times, then 0 up to ``row_length``.

    Raises:
        ValueError: the samples do not fit.
    """
    if sum(lengths) > row_length:
        raise ValueError(f"samples of {sum(lengths)} tokens do not fit in a row of {row_length}.")
    ids = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    return ids + [0] * (row_length - len(ids))


@torch.no_grad()
def can_pack(language_model: nn.Module) -> bool:
    """Whether the LLM keeps packed samples apart, found out by asking it.

    Two short random samples are run packed and separately, on the device and in the dtype the LLM is in. LLMs with a
    recurrent state, or whose attention ignores positions, fail; batches grouped by length are then the way to train.
    On a CPU, where FlashAttention does not run and flex attention takes long to compile, SDPA stands in for them:
    transformers makes the masks of all three from the same positions.
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
