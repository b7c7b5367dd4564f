"""The LLM's tokenizer: loaded as the official code loads it, with the placeholders added."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import AddedToken, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from aligncurate.sources.marks import IMAGE
from aligntrain.inputs.templates import ALIGN


def load_tokenizer(folder: str | Path, **settings: Any) -> Any:
    """Load an LLM's tokenizer; "legacy" Llama tokenizers (Vicuna) behave as in the official code.

    These put a space before every piece of text, even if it starts with one. transformers 5 does not, and so tokenizes
    text with leading spaces differently.

    Args:
        folder: the tokenizer's folder or name.
        settings: passed on to transformers. ``split_special_tokens=True``, for example, reads ``</s>`` in a text as
            four characters, as a sentencepiece model does whose special tokens were never registered.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    if not (isinstance(tokenizer, LlamaTokenizer) and tokenizer.legacy):
        return tokenizer
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # LlamaTokenizer would replace these rules when it is loaded again; the plain class keeps the file's.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **settings,
    )


def prepare_tokenizer(tokenizer: Any) -> None:
    """Add what a processor needs: ``<image>`` and ``<align>``, and a padding token where there is none.

    The padding token is the unknown token, as in the official code, or else the end token.

    Raises:
        ValueError: a slow tokenizer, or one without any token to pad with.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer.")
    missing = [token for token in (IMAGE, ALIGN) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in missing], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError("the tokenizer has no padding, unknown or end token; give it one of them.")


def end_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches a token that ends an answer, with the space that some templates put before it.

    All added tokens count, because some tokenizers do not declare the one that ends a turn as special.
    """
    added = {str(token).strip() for token in tokenizer.added_tokens_decoder.values()}
    ends = (added | set(tokenizer.all_special_tokens)) - {IMAGE, ALIGN, ""}
    longest_first = sorted(ends, key=len, reverse=True)
    return re.compile(rf" ?(?:{'|'.join(map(re.escape, longest_first))})")
