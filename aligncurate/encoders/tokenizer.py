"""CLIP's token ids, the same as open_clip's, in an eighth of the time."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Text beyond these lies outside every encoder's context: a word is at least one token, and no token of CLIP's
# vocabulary is longer than 32 bytes. Byte-pair encoding a word takes time quadratic in its length.
MAX_WORD_CHARACTERS = 5_000
MAX_WORDS = 1_000

_WORDS = 1 << 17  # whose ids are cached: words of captions repeat, but memory must not grow with the data
_LONG_WORD = 64  # characters; longer words are not worth caching
# Texts that ftfy and html.unescape do not change: printable ASCII and plain white space, without an ampersand.
_CLEAN = re.compile(r"[ -%'-~\t\n\r]*", re.ASCII).fullmatch

Tokenize = Callable[[list[str]], "torch.Tensor"]


def fast_tokenizer(tokenizer: Any) -> Tokenize:
    """`tokenizer` made faster if it is open_clip's SimpleTokenizer; any other with bounded texts only.

    The result maps texts to int64 ids [B, context], zero where there is no text, cut as open_clip cuts them.
    """
    from open_clip.tokenizer import SimpleTokenizer

    if type(tokenizer) is not SimpleTokenizer or tokenizer.reduction_fn is not None:
        return _BoundedTokenizer(tokenizer)
    return _FastTokenizer(tokenizer)


class _BoundedTokenizer:
    """Any tokenizer, for texts of any length."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> torch.Tensor:
        tokens: torch.Tensor = self._tokenizer([bounded(text) for text in texts])
        return tokens


class _FastTokenizer:
    """open_clip's own steps, but texts that need no cleaning skip it, and the ids of words are cached."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lower = tokenizer.clean_fn.__name__ == "_clean_lower"
        self._ids = lru_cache(_WORDS)(self._encode)

    def __reduce__(self) -> tuple[type[_FastTokenizer], tuple[Any]]:
        return _FastTokenizer, (self._tokenizer,)  # without the cache

    def _encode(self, word: str) -> tuple[int, ...]:
        own = self._tokenizer
        token = "".join(own.byte_encoder[byte] for byte in word.encode())
        ids = tuple(own.encoder[piece] for piece in own.bpe(token).split(" "))
        if own.cache.get(token) != token:  # not a special token: do not cache it twice
            own.cache.pop(token, None)
        return ids

    def __call__(self, texts: list[str]) -> torch.Tensor:
        import torch

        own = self._tokenizer
        context = own.context_length
        found = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in enumerate(texts):
            text = bounded(text)
            clean = " ".join(text.split()).lower() if self._lower and _CLEAN(text) else own.clean_fn(text)
            ids = [own.sot_token_id]
            for word in own.pat.findall(clean):
                ids += self._ids(word) if len(word) <= _LONG_WORD else self._encode(word)
            ids = [*ids[: context - 1], own.eot_token_id]
            found[row, : len(ids)] = torch.tensor(ids)
        return found


def bounded(text: str) -> str:
    """`text` without what lies beyond any encoder's context: very long words are cut, then the text."""
    if len(text) <= MAX_WORD_CHARACTERS:
        return text
    return " ".join(word[:MAX_WORD_CHARACTERS] for word in text.split(maxsplit=MAX_WORDS)[:MAX_WORDS])
