"""Chat templates of real models: what is learned, and that it is what follows the prompt (see chat_templates/)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from aligntrain import AlignGPTProcessor
from aligntrain.inputs.templates import ChatTemplate

FOLDER = Path(__file__).with_name("chat_templates")
# The tokenizer's bos and eos, the token that ends a turn, and further special tokens of the model.
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"))
QWEN = (None, "<|endoftext|>", "<|im_end|>", ("<|im_start|>",))
MISTRAL = ("<s>", "</s>", "</s>", ("[INST]", "[/INST]"))
GEMMA = ("<bos>", "<eos>", "<end_of_turn>", ("<start_of_turn>",))
MODELS: dict[str, tuple[str | None, str, str, tuple[str, ...]]] = {
    "llama3": LLAMA, "llama3.1": LLAMA, "llama3.2": LLAMA, "qwen2.5": QWEN, "qwen3": QWEN,
    "mistral-nemo": MISTRAL, "mistral7b": MISTRAL, "gemma2": GEMMA, "gemma3": GEMMA,
    "phi3.5": ("<s>", "<|endoftext|>", "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>")),
    "phi4": ("<|endoftext|>", "<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_sep|>")),
}  # fmt: skip
MOVES_SYSTEM = {"mistral-nemo", "mistral7b", "gemma2"}
NAMES = pytest.mark.parametrize("name", MODELS)

SYSTEM = {"role": "system", "content": "Be brief."}
# Answers that are words of the templates, or of the questions.
TALK = [
    {"role": "user", "content": "What is it? think"},
    {"role": "assistant", "content": "think"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "user"},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "assistant\nmodel"},
]


def processor(name: str, template: str | None = None, **settings: Any) -> AlignGPTProcessor:
    bos, eos, end, others = MODELS[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in (end, *others)], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])  # as in Qwen 3, not special
    tokenizer.chat_template = template or (FOLDER / f"{name}.jinja").read_text("utf-8")
    return AlignGPTProcessor(CLIPImageProcessor(), tokenizer, template="chat", num_patches=4, pixel_size=24, **settings)


def learned(proc: AlignGPTProcessor, labels: list[int]) -> list[str]:
    runs: list[list[int]] = []
    for before, label in zip([-100, *labels], labels, strict=False):
        if label != -100:
            runs = [*runs, []] if before == -100 else runs
            runs[-1].append(label)
    return [proc.tokenizer.decode(run) for run in runs]


def naive(proc: AlignGPTProcessor, messages: list[dict[str, str]], cue: bool) -> str:
    """The model's own template, applied by transformers alone."""
    text = proc.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=cue, enable_thinking=False, date_string="26 Jul 2024"
    )
    assert isinstance(text, str)
    return text


@NAMES
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", [2, 4, 6])
def test_answers_and_their_end_tokens_are_learned(name: str, system: bool, turns: int) -> None:
    proc = processor(name)
    messages = [*([SYSTEM] if system else []), *TALK[:turns]]
    encoded = proc.encode(messages, has_image=False)
    end = MODELS[name][2]
    assert learned(proc, encoded.labels) == [turn["content"] + end for turn in TALK[1:turns:2]]
    text = proc.tokenizer.decode(encoded.input_ids)
    assert (SYSTEM["content"] in text) == system
    if system and name in MOVES_SYSTEM:
        first = {"role": "user", "content": f"{SYSTEM['content']}\n\n{TALK[0]['content']}"}
        messages = [first, *TALK[1:turns]]
    assert text == naive(proc, messages, False)  # the template's own text, without a trace of how it was searched


@NAMES
@pytest.mark.parametrize("system", [False, True])
def test_a_prompt_is_the_start_of_its_training_sample(name: str, system: bool) -> None:
    """Where a template shows earlier answers in another way (Qwen 3), the last one follows its prompt all the same."""
    proc = processor(name)
    for turns in (1, 3, 5):
        messages = [*([SYSTEM] if system else []), *TALK[:turns]]
        prompt = proc.encode(messages, has_image=False, training=False)
        sample = proc.encode([*messages, TALK[turns]], has_image=False)
        start = len(prompt.input_ids)
        assert sample.input_ids[:start] == prompt.input_ids
        assert sample.labels[start - 1] == -100 != sample.labels[start]
        asked = proc.apply_chat_template(messages, add_generation_prompt=True)
        assert proc.tokenizer(asked, add_special_tokens=False).input_ids == prompt.input_ids
        if not system:
            assert asked == naive(proc, messages, True)


@NAMES
def test_an_image_stays_in_front_of_a_moved_system_turn(name: str) -> None:
    proc = processor(name)
    question = {"role": "user", "content": "What is it?\n<image>"}
    encoded = proc.encode([SYSTEM, question, TALK[1]], has_image=True)
    assert encoded.input_ids.count(proc.image_token_id) == 4
    text = proc.tokenizer.decode(encoded.input_ids)
    assert text.index("<image>") < text.index("What is it?")
    if name in MOVES_SYSTEM:
        assert "<image>\nBe brief.\n\nWhat is it?" in text.replace("<image>" * 4, "<image>")
    assert proc.moves_system == (name in MOVES_SYSTEM)


@NAMES
@pytest.mark.parametrize("answer", [" It is red. ", "two\n\nlines\n", "<|oops|> {{ x }} {% y %}"])
def test_spaces_around_answers(name: str, answer: str) -> None:
    """Learned as the template leaves them: some strip answers, others do not."""
    proc = processor(name)
    messages = [TALK[0], {"role": "assistant", "content": answer}]
    encoded = proc.encode(messages, has_image=False)
    text = naive(proc, messages, False)
    assert proc.tokenizer.decode(encoded.input_ids) == text
    after = text.removeprefix(naive(proc, messages[:1], True))
    end = MODELS[name][2]
    assert learned(proc, encoded.labels) == [after[: after.index(end) + len(end)]]


@NAMES
def test_generation_stops_at_what_ends_an_answer(name: str) -> None:
    proc = processor(name)
    ids = proc.tokenizer.convert_tokens_to_ids([MODELS[name][1], MODELS[name][2]])
    assert proc.end_token_ids == sorted(set(ids))


def test_reasoning_blocks_are_never_learned() -> None:
    proc = processor("qwen3")
    encoded = proc.encode(TALK, has_image=False)
    think = proc.tokenizer.convert_tokens_to_ids("<think>")
    assert encoded.input_ids.count(think) == 1  # the template puts one in front of the last answer
    assert think not in encoded.labels
    thought = [TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nred"}]
    with pytest.raises(ValueError, match="changes earlier turns or the answers"):
        proc.encode([*thought, *TALK[:2]], has_image=False)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}{{ m.role + ':' + m.content + '|' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}", "right behind the cue"),
        ("{% for m in messages %}{{ m.role + ':' + ('hm ' if m.role == 'assistant' else '') + m.content }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}", "right behind the cue"),
        ("{{ raise_exception('not today') }}", r"does not take the conversation \(not today\)"),
        ("{{ messages.nothing.at_all }}", "does not take the conversation"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes earlier turns or the answers"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "changes earlier turns or the answers"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used_are_a_sentence(template: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        processor("qwen2.5", template).encode(TALK[:2], has_image=False)


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", 'strftime_now( "%d %b %Y" )'])
def test_todays_date_does_not_change_the_data(call: str) -> None:
    template = "{{ 'Today ' + " + call + " }}" + (FOLDER / "qwen2.5.jinja").read_text("utf-8")
    proc = processor("qwen2.5", template)
    assert proc.tokenizer.decode(proc.encode(TALK, has_image=False).input_ids).startswith("Today 26 Jul 2024<|im_st")
    llama = processor("llama3.2")
    assert "Today Date: 26 Jul 2024" in llama.tokenizer.decode(llama.encode(TALK, has_image=False).input_ids)


def test_a_conversation_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many turns it has; once per answer would be quadratic."""
    proc, calls = processor("llama3.1"), []
    proc.encode(TALK, has_image=False)
    real = ChatTemplate.apply
    monkeypatch.setattr(ChatTemplate, "apply", lambda *given: (calls.append(1), real(*given))[1])
    proc.encode(TALK * 50, has_image=False)
    assert len(calls) == 1
