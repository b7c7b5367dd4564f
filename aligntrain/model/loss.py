"""The language-modelling loss, computed only at positions that have labels.

Shapes: B rows, L positions, M supervised tokens, D the LLM's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

IGNORE = -100
# With a vocabulary of 150,000 the float32 logits of one chunk take 0.6 GB.
CHUNK_TOKENS = 1024


def supervised(labels_BL: Tensor, sequence_ids_BL: Tensor | None) -> Tensor:
    """Positions with a label to predict: bool [B, L-1]; position t predicts the token at t+1 of the same sample."""
    mask = labels_BL[:, 1:] != IGNORE
    if sequence_ids_BL is not None:
        mask &= sequence_ids_BL[:, 1:] == sequence_ids_BL[:, :-1]
    return mask


def token_losses(
    hidden_BLD: Tensor,
    labels_BL: Tensor,
    sequence_ids_BL: Tensor | None,
    head: Callable[[Tensor], Tensor],
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Cross-entropy of each supervised token, without computing logits for other positions.

    If there is more than one chunk, each is recomputed in the backward pass, so that memory holds the logits of only
    one at a time.

    Args:
        hidden_BLD: the LLM's last hidden states.
        labels_BL: int64, unshifted token ids; -100 for tokens without a label.
        sequence_ids_BL: in packed rows, the sample that each position belongs to; else None.
        head: last hidden states [m, D] -> logits [m, V].
        chunk_tokens: supervised tokens per chunk.

    Returns:
        float32 [M], in row-major order; differentiable even if M is 0.
    """
    mask = supervised(labels_BL, sequence_ids_BL)
    hidden_MD = hidden_BLD[:, :-1][mask]
    labels_M = labels_BL[:, 1:][mask]

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(head(hidden).float(), labels, reduction="none")

    if len(labels_M) <= chunk_tokens:
        return losses(hidden_MD, labels_M)
    chunks = zip(torch.split(hidden_MD, chunk_tokens), torch.split(labels_M, chunk_tokens), strict=True)
    return torch.cat([checkpoint(losses, hidden, labels, use_reentrant=False) for hidden, labels in chunks])
