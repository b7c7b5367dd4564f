"""Quick token ids against open_clip's own, on any text."""

import csv
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligncurate.encoders.tokenizer import fast_tokenizer

# Where the two could part: case folding outside ASCII, ligatures, HTML, mended encodings, special tokens, apostrophes.
TRICKY = [
    "", "   ", "a photo of a dog", "A DOG'S bone isn't theirs, they'LL see", "it's İstanbul ǅ ß ſ 'ſ 'S ΣΑΣ",
    "fish &amp; chips &amp;amp; &lt;b&gt;", "fish & chips", "schÃ¶n mojibake â€™", "ﬁne ﬂags", "“quotes” it’s",
    "<start_of_text> inside <END_OF_TEXT> too", "<end_of_text>", "日本語のテキスト 12345", "emoji 👩‍👩‍👧 🏳️‍🌈",
    "tab\tand\nline\r\nends\x0b\x0c\x1c\x85", "\x00\x1b[31mred\x1b[0m\x7f", "half \u2028 line", "a_b__c-d.e/f",
    "e\u0301",
    "no\u00a0break \u3000 space", "x" * 200, "word " * 200, "\ufeffbom", "Ａｌｐｈａ wide", "\ud7ff \U0010ffff",
]  # fmt: skip


@pytest.fixture(scope="module", params=["ViT-B-32", "ViT-B-16-SigLIP", "short"])
def both(request):
    if request.param == "ViT-B-32":
        return open_clip.get_tokenizer("ViT-B-32"), fast_tokenizer(open_clip.get_tokenizer("ViT-B-32"))
    cleaning = {"ViT-B-16-SigLIP": "canonicalize", "short": "whitespace"}[request.param]
    own, other = (open_clip.SimpleTokenizer(context_length=12, clean=cleaning) for _ in range(2))
    return own, fast_tokenizer(other)


def test_the_ids_are_open_clips(both) -> None:
    own, ours = both
    assert torch.equal(ours(TRICKY), own(TRICKY))
    assert torch.equal(ours(TRICKY), own(TRICKY))  # also from memory
    assert ours([]).shape == (0, own.context_length)


WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
ASCII = st.text(st.characters(max_codepoint=127), max_size=40)
ENTITIES = st.sampled_from(["&amp;", "&lt;", "&#39;", "&eacute;", "&", "'s", "'LL", "<start_of_text>", "ſ", "İ"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(WORDS, ASCII, ENTITIES), max_size=12).map(" ".join))
def test_any_text_gets_open_clips_ids(text) -> None:
    own, ours = open_clip.get_tokenizer("ViT-B-32"), _OURS
    assert torch.equal(ours([text]), own([text]))


_OURS = fast_tokenizer(open_clip.get_tokenizer("ViT-B-32"))


def test_real_captions_get_open_clips_ids(data_root: Path) -> None:
    with (data_root / "flickr8k/captions.csv").open(newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)][::20]
    assert len(captions) > 2_000
    assert torch.equal(_OURS(captions), open_clip.get_tokenizer("ViT-B-32")(captions))


def test_memory_does_not_grow_with_the_words() -> None:
    own = open_clip.SimpleTokenizer()
    before = dict(own.cache)
    fast_tokenizer(own)(["some words that were never seen before"])
    assert own.cache == before


def test_other_tokenizers_stay_as_they_are() -> None:
    class Other:
        def __call__(self, texts):
            return torch.tensor([[len(text)] for text in texts])

    assert fast_tokenizer(Other())(["ab", "woof" * 5_000]).tolist() == [[2], [5_000]]
