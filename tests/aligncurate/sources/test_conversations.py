"""Conversations as other projects write them, and the same reading of them in training."""

from __future__ import annotations

from typing import Any

import pytest

from aligncurate.sources.conversations import parse_conversation
from aligntrain.inputs.templates import messages_of

FORMS = {
    "llava": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
    "openai": [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "A dog."},
    ],
    "transformers": [
        {"role": "user", "content": [{"type": "image", "url": "a.jpg"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ],
    # The image itself is elsewhere, in a column of its own.
    "unnamed image": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "model", "content": "A dog."},
    ],
    "parquet": [
        {
            "role": "user",
            "content": [
                {"type": "image", "image_url": None, "path": "a.jpg", "text": None},
                {"type": "text", "image_url": None, "path": None, "text": "What?"},
            ],
        },
        {"role": "assistant", "content": "A dog."},
    ],
    "marks of InternVL": [
        {
            "role": "user",
            "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "<IMG_CONTEXT>\nWhat?"}],
        },
        {"role": "assistant", "content": "A dog."},
    ],
    "ours": [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "A dog."}],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_alike_in_curation_and_training(form: str) -> None:
    turns, images = parse_conversation(FORMS[form])
    assert turns == [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "A dog."}]
    assert images == ([] if form in ("llava", "ours", "unnamed image") else ["a.jpg"])
    expected = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}]
    assert messages_of(FORMS[form], has_image=True) == messages_of(FORMS[form], has_image=None) == expected


def test_image_objects_are_passed_through() -> None:
    picture = object()
    assert parse_conversation([{"role": "user", "content": [{"type": "image", "image": picture}]}])[1] == [picture]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hello", "not a list of turns"),
        (["hello"], "turn 0 is not an object"),
        ([{"role": "user", "content": [7]}], "turn 0 has a part that is not an object"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "turn 1 has no role or no text"),
        ([{"content": "a"}], "turn 0 has no role or no text"),
    ],
)
def test_anything_else_is_an_error_in_both(turns: Any, message: str) -> None:
    for parse in (parse_conversation, lambda t: messages_of(t, None)):
        with pytest.raises(ValueError, match=message):
            parse(turns)


def test_unknown_roles_are_kept_by_curation_and_refused_by_training() -> None:
    turns = [{"role": "tool", "content": "x"}]
    assert parse_conversation(turns)[0] == [{"role": "tool", "text": "x"}]
    with pytest.raises(ValueError, match="role 'tool'"):
        messages_of(turns, None)
