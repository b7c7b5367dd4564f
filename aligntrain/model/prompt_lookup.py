"""Prompt-lookup decoding, which guesses that the text goes on as the prompt did, without guessing an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator


def suppress_placeholders(generator: Any, placeholders: Sequence[int]) -> Any:
    """A generator of candidates (transformers' assisted decoding) that never proposes a placeholder.

    Args:
        generator: any; only prompt lookup is changed, because the others propose only what a model generates.
        placeholders: ids that stand for patches and the alignment vector; they may lie beyond the vocabulary.
    """
    if isinstance(generator, PromptLookupCandidateGenerator):
        generator.vocab_size = max(generator.vocab_size, *(number + 1 for number in placeholders))
        suppress = SuppressTokensLogitsProcessor(list(placeholders))
        generator.logits_processor = LogitsProcessorList([*(generator.logits_processor or ()), suppress])
    return generator
