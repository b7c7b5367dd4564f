"""Chat templates: from a conversation to messages, from messages to text, and where the answers are in that text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligncurate.sources.conversations import ROLES, parse_conversation
from aligncurate.sources.marks import IMAGE

ALIGN = "<align>"

# Pretraining in LLaVA and AlignGPT: the image, the caption and a newline; no end token.
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<image>' if '<image>' in m['content'] else '' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
)

# Vicuna 1.1, which LLaVA-1.5 and AlignGPT finetune with.
V1 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% else %}{% set system = "
    "'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user\\'s questions.' %}{% endif %}{{ system + ' ' }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

Message = dict[str, str]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: all of it, with ``<image>`` for an image.
        answers: [start, end) of each answer in ``text``, including its end token.
    """

    text: str
    answers: list[tuple[int, int]]


def messages_of(conversation: Sequence[Mapping[str, Any]], has_image: bool | None) -> list[Message]:
    """Turn a conversation into ``{"role", "content"}`` messages that alternate and start with a question.

    An opening answer is dropped, as in the official code. ``<image>`` moves, with a newline, to the front of the
    message that has it, or of the first question.

    Args:
        conversation: in any form that ``parse_conversation`` reads.
        has_image: whether the sample has an image; None: it has one if the text has an ``<image>``.

    Raises:
        ValueError: an unknown role, turns that do not alternate, several ``<image>``, or one in a sample without image.
    """
    messages = [{"role": turn["role"], "content": turn["text"]} for turn in parse_conversation(conversation)[0]]
    for message in messages:
        if message["role"] not in ROLES.values():
            raise ValueError(f"a turn has the role {message['role']!r}; use user (human), assistant (gpt) or system.")
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    for number, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise ValueError(f"turn {number + 1} has the role {message['role']}; questions and answers must alternate.")
    if not turns:
        raise ValueError("the conversation has no question.")
    marks = [(m, m["content"].count(IMAGE)) for m in system + turns if IMAGE in m["content"]]
    has_image = bool(marks) if has_image is None else has_image
    if not has_image and marks:
        raise ValueError(f"the text has {IMAGE}, but the sample has no image.")
    if has_image:
        if sum(count for _, count in marks) > 1:
            raise ValueError(f"the text has {IMAGE} {sum(c for _, c in marks)} times; the limit is one per sample.")
        owner = marks[0][0] if marks else turns[0]
        if owner["role"] != "user":
            raise ValueError(f"{IMAGE} is in a turn of the {owner['role']}; it must be in a question.")
        owner["content"] = f"{IMAGE}\n{owner['content'].replace(IMAGE, '').strip()}".strip()
    return system + turns


def render(
    messages: Sequence[Message], apply: Callable[[Sequence[Message], bool], str], ends: re.Pattern[str]
) -> Rendered:
    """Apply a chat template, and find the answers in its text.

    An answer starts right after the cue for the assistant, so that training learns exactly what is generated after
    that cue.

    Args:
        messages: from ``messages_of``; after a final question the text ends with the cue for its answer.
        apply: the template: (messages, whether to add the cue) -> text.
        ends: matches the end token of an answer.

    Raises:
        ValueError: the template rewrites earlier turns, so that the answers cannot be found.
    """
    text = apply(messages, messages[-1]["role"] != "assistant")
    answers = []
    for number, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant" or not content:
            continue
        before = apply(messages[:number], True)
        start = text.find(content, len(before))
        if not text.startswith(before) or start < 0:
            raise ValueError("the chat template changes earlier turns or the answers; use another template.")
        stop = start + len(content)
        trailing = len(message["content"]) - len(message["content"].rstrip())
        # Some templates strip the content, others do not.
        if trailing and text.startswith(message["content"][-trailing:], stop):
            stop += trailing
        end = ends.match(text, stop)
        answers.append((len(before), end.end() if end else stop))
    return Rendered(text, answers)
