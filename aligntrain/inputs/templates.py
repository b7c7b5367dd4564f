"""Conversations as text: the messages that templates take, the templates, and where the answers lie in the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IMAGE = "<image>"
ALIGN = "<align>"

# Pretraining in LLaVA and AlignGPT: the picture, the caption and a newline; no end token.
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

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Message = dict[str, str]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: the whole of it; an image stands as ``<image>``.
        answers: [start, end) of every answer in ``text``, its end token included.
    """

    text: str
    answers: list[tuple[int, int]]


def messages_of(conversation: Iterable[Mapping[str, Any]], has_image: bool | None) -> list[Message]:
    """A conversation in any of the usual forms as ``{"role", "content"}`` messages, made regular.

    Roles may be called user/human and assistant/gpt, the text content, text or value; content may be a list of text
    and image parts. Answers before the first question are dropped, as in the official code. ``<image>`` is put, with
    a newline, at the front of the message that has it, or of the first question. Without ``has_image`` (None) there is
    an image where there is an ``<image>``.

    Raises:
        ValueError: an unknown role, turns that do not alternate, or not exactly one ``<image>`` where there is an
            image (none where there is none).
    """
    messages: list[Message] = []
    for turn in conversation:
        name = turn["role"] if "role" in turn else turn["from"]
        if name not in _ROLES:
            raise ValueError(f"a turn has the role {name!r}; choose user (human), assistant (gpt) or system.")
        content = next((turn[field] for field in ("content", "text", "value") if field in turn), None)
        messages.append({"role": _ROLES[name], "content": _flat(content)})
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    for number, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise ValueError(f"turn {number + 1} is the {message['role']}'s; questions and answers must alternate.")
    if not turns:
        raise ValueError("the conversation has no question.")
    marks = [(m, m["content"].count(IMAGE)) for m in system + turns if IMAGE in m["content"]]
    has_image = bool(marks) if has_image is None else has_image
    if not has_image and marks:
        raise ValueError(f"the text has {IMAGE}, but the sample has no image.")
    if has_image:
        if sum(count for _, count in marks) > 1:
            raise ValueError(f"the text has {IMAGE} {sum(c for _, c in marks)} times; one image a sample is the limit.")
        owner = marks[0][0] if marks else turns[0]
        if owner["role"] != "user":
            raise ValueError(f"{IMAGE} is in the {owner['role']}'s text; it belongs in a question.")
        owner["content"] = f"{IMAGE}\n{owner['content'].replace(IMAGE, '').strip()}".strip()
    return system + turns


def _flat(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = [IMAGE + "\n" if part["type"] == "image" else part["text"] for part in content]
    return "".join(parts)


def render(
    messages: Sequence[Message], apply: Callable[[Sequence[Message], bool], str], ends: re.Pattern[str]
) -> Rendered:
    """A conversation as text, and where its answers are.

    An answer begins where the text of what came before it ends, the cue for the assistant included, so that what is
    learned is just what has to be generated after that cue.

    Args:
        messages: as from ``messages_of``; if the last is a question, the text ends with the cue for its answer.
        apply: messages and whether to add the cue -> text.
        ends: what closes an answer, tried right behind it.

    Raises:
        ValueError: the template rewrites earlier turns, so that answers cannot be found in the whole.
    """
    text = apply(messages, messages[-1]["role"] != "assistant")
    answers = []
    for number, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant" or not content:
            continue
        before = apply(messages[:number], True)
        found = text.find(content, len(before))
        if not text.startswith(before) or found < 0:
            raise ValueError("the chat template changes earlier turns or the answers; it cannot be used for training.")
        stop = found + len(content)
        trailing = len(message["content"]) - len(message["content"].rstrip())
        # A template may or may not strip its contents.
        if trailing and text.startswith(message["content"][-trailing:], stop):
            stop += trailing
        end = ends.match(text, stop)
        answers.append((len(before), end.end() if end else stop))
    return Rendered(text, answers)
