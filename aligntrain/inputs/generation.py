"""Generation settings of a model that is saved."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import GenerationConfig


def complete_generation_config(generation: GenerationConfig, end_token_ids: Iterable[int] = ()) -> None:
    """Let generation stop at these tokens too, and make the LLM's settings ones that can be saved."""
    known = generation.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), *end_token_ids} - {None}
    if ends:
        generation.eos_token_id = sorted(ends)
    try:
        generation.validate(strict=True)
    except ValueError:  # Vicuna's has a temperature without sampling, which transformers loads but does not save
        generation.do_sample = True
