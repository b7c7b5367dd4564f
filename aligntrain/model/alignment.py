"""The alignment vector of AlignGPT: level embeddings, and the gate that mixes them.

Shapes: I images, M text tokens, P patches, D the LLM's width, N levels, W the gate's width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LevelEmbeddings(nn.Module):
    """H: one learned vector per alignment level, [N, D]; level N is the best (arXiv 2405.14129).

    Args:
        num_levels: N.
        hidden_size: D.
    """

    def __init__(self, num_levels: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_levels, hidden_size))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, levels_I: Tensor) -> Tensor:
        """Look up levels 1..N (int64, [I]) -> [I, D].

        Raises:
            ValueError: a level outside 1..N.
        """
        num_levels = self.weight.shape[0]
        if levels_I.numel() and (levels_I.min() < 1 or levels_I.max() > num_levels):
            raise ValueError(
                f"levels must be 1 to {num_levels}, but the batch has {int(levels_I.min())} to {int(levels_I.max())}."
            )
        return nn.functional.embedding(levels_I - 1, self.weight)

    def mix(self, mode: str, alpha_IN1: Tensor | None, num_images: int) -> Tensor:
        """The alignment vectors of images without known levels (finetuning, inference).

        Args:
            mode: an ``align_mode`` of AlignGPTConfig other than ``none``.
            alpha_IN1: the gate's weights for levels 1..N-1, [I, N-1]; only ``gated`` and ``local`` need it.
            num_images: I.

        Returns:
            [I, D]. For ``gated``: H[N] + sum_{i<N} alpha_i H[i] (arXiv 2405.14129).
        """
        lower_ND, best_D = self.weight[:-1], self.weight[-1]
        if mode in ("gated", "local"):
            assert alpha_IN1 is not None
            local_ID = alpha_IN1.to(lower_ND.dtype) @ lower_ND
            return best_D + local_ID if mode == "gated" else local_ID
        if mode == "average":
            vector_D = best_D + lower_ND.mean(0)
        elif mode == "global":
            vector_D = best_D
        else:
            vector_D = self.weight[int(mode.removeprefix("fixed:")) - 1]
        return vector_D.expand(num_images, -1)


class AlignmentGate(nn.Module):
    """Turns the similarity of each patch with the text into weights for the levels below the best.

    alpha = softmax(Linear(W, N-1)(GELU(Linear(P, W)(v)))), as in the official code's ``gated_weight_layer``.

    Args:
        num_patches: P.
        num_levels: N.
        hidden_size: W, 256 in the official code.
    """

    def __init__(self, num_patches: int, num_levels: int, hidden_size: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_patches, hidden_size), nn.GELU(), nn.Linear(hidden_size, num_levels - 1))

    def forward(self, dots_IP: Tensor) -> Tensor:
        """[I, P] -> alpha [I, N-1], float32; each row sums to 1."""
        logits_IN1: Tensor = self.mlp(dots_IP)
        return logits_IN1.softmax(-1, dtype=torch.float32)


def gate_dots(features_IPD: Tensor, text_ID: Tensor) -> Tensor:
    """v_p = <projected patch p, mean text embedding>, unscaled: [I, P, D], [I, D] -> [I, P]."""
    return torch.einsum("ipd,id->ip", features_IPD, text_ID.to(features_IPD.dtype))


def mean_text(text_MD: Tensor, image_M: Tensor, num_images: int) -> Tensor:
    """The mean embedding of the text that belongs to each image.

    Multiplies by a one-hot matrix instead of index_add, which is not deterministic on GPUs, and needs no tensor as
    large as the padded batch.

    Args:
        text_MD: embeddings of the tokens to average, [M, D].
        image_M: int64 [M], the image that each token belongs to; negative for none (a text-only sample).
        num_images: I.

    Returns:
        float32 [I, D]; zeros where an image has no text.
    """
    own_IM = (image_M == torch.arange(num_images, device=image_M.device)[:, None]).float()
    return (own_IM @ text_MD.float()) / own_IM.sum(1, keepdim=True).clamp(min=1)
