"""Chat templates: from a conversation to messages, from messages to text, and where the answers are in that text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
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

MARK = "\ufdd0"
"""Put around answers while a template is applied: a code point that Unicode reserves for such uses inside programs."""

_DATE = datetime(2024, 7, 26)  # the date that Llama 3.1's template prints by default
_TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_EXAMPLE: list[Message] = [{"role": "user", "content": "Q-1"}, {"role": "assistant", "content": "A-1"}]


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


def caption_turns(caption: str) -> list[dict[str, Any]]:
    """A caption as a conversation: the image, and the caption as the answer."""
    return [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": caption}]


class ChatTemplate:
    """A chat template (Jinja) of a tokenizer, and where the answers are in its text.

    Reasoning is switched off where a template can (Qwen 3, Granite, DeepSeek), because our answers have none. Templates
    that print today's date get a fixed one, so that the same data gives the same tokens every day.

    Args:
        tokenizer: applies it, with its special tokens.
        text: the template.
        ends: matches the end token of an answer.
    """

    def __init__(self, tokenizer: Any, text: str, ends: re.Pattern[str]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._text = _TODAY.sub(lambda call: repr(_DATE.strftime(call["format"])), text)

    def apply(self, messages: Sequence[Message], cue: bool, **variables: Any) -> str:
        """The messages as text. Raises ValueError if the template refuses them.

        Args:
            messages: with a system turn only if it `takes_system`.
            cue: add the cue for the next answer.
            variables: of the template.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._text,
                tokenize=False,
                add_generation_prompt=cue,
                **{"enable_thinking": False, "thinking": False, **variables},
            )
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template does not take the conversation ({error}).") from None
        return text

    def render(self, messages: Sequence[Message], *, cue: bool, **variables: Any) -> Rendered:
        """Apply the template once, and find the answers in its text.

        Each answer is put between two marks, which are removed again, so its place does not depend on its words. It
        starts right after the cue for the assistant, so that training learns exactly what is generated after that cue.

        Args:
            messages: from `messages_of`.
            cue: add the cue for the next answer.
            variables: of the template.

        Raises:
            ValueError: the template refuses the messages, changes the answers, or does not put them behind the cue.
        """
        if not self.takes_system:
            messages = _without_system(messages)
        if any(MARK in message["content"] for message in messages):
            raise ValueError("a turn has the character U+FDD0, which is no text; remove it.")
        marked, contents = [], []
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant" and (words := content.strip()):
                before, after = content.split(words, 1)  # spaces stay outside: some templates strip them, others do not
                contents.append((before, words, after))
                content = f"{before}{MARK}{words}{MARK}{after}"
            marked.append({**message, "content": content})
        pieces = self.apply(marked, cue, **variables).split(MARK)
        if pieces[1::2] != [words for _, words, _ in contents]:
            raise ValueError("the chat template changes earlier turns or the answers; use another template.")
        text, answers = "".join(pieces), []
        stop = 0
        for number, (before, words, after) in enumerate(contents):
            start = stop + len(pieces[2 * number])
            stop = start + len(words)
            first, last = start, stop
            for spaces in (before, self.lead):
                if text.endswith(spaces, 0, first):
                    first -= len(spaces)
            if text.startswith(after, last):
                last += len(after)
            end = self._ends.match(text, last)
            answers.append((first, end.end() if end else last))
        return Rendered(text, answers)

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system turn stays where it is.

        Gemma's template refuses one; Mistral's moves it to the last question, and drops it once that is answered.
        """
        messages = [{"role": "system", "content": "S-Y-S"}, *_EXAMPLE]
        try:
            prompt, text = self.apply(messages[:2], True), self.apply(messages, False)
        except ValueError:
            return False
        return text.startswith(prompt) and "S-Y-S" in text

    @cached_property
    def lead(self) -> str:
        """Spaces that the template puts between the cue for an answer and the answer.

        Raises:
            ValueError: it puts text there that generation would not start with, such as reasoning.
        """
        prompt, text = self.apply(_EXAMPLE[:1], True), self.apply(_EXAMPLE, False)
        lead, found, _ = text.removeprefix(prompt).partition(_EXAMPLE[1]["content"])
        if not text.startswith(prompt) or not found or lead.strip():
            raise ValueError("the chat template does not put answers right behind the cue for them; use --template v1.")
        return lead


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with the text of a system turn at the start of the first question, behind the image."""
    if messages[0]["role"] != "system":
        return list(messages)
    system, question, *others = messages
    content, image = question["content"], ""
    if IMAGE in content:
        content, image = content.removeprefix(IMAGE).lstrip("\n"), f"{IMAGE}\n"
    joined = "\n\n".join(text for text in (system["content"], content) if text)
    return [{**question, "content": f"{image}{joined}"}, *others]
