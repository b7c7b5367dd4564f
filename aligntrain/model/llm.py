"""Split a causal LLM into decoder and head, to compute logits only where they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast


def decoder_of(language_model: Any) -> Any:
    """The part of a causal LLM that computes the last hidden states.

    Raises:
        ValueError: the LLM has no separate decoder.
    """
    decoder = language_model.get_decoder()
    # transformers returns the LLM itself if it knows no decoder.
    decoder = getattr(language_model, "model", decoder) if decoder is language_model else decoder
    if decoder is language_model:
        raise ValueError(f"{type(language_model).__name__} has no decoder that can be run on its own.")
    return decoder


def head_of(language_model: Any) -> Callable[[Tensor], Tensor]:
    """The rest of the LLM: last hidden states [m, D] -> logits [m, V].

    Many LLMs scale, cap or bias their logits inside ``forward`` (Gemma 2, Cohere, Granite, Phi, …). To run that same
    code on the same parameters, this calls a shallow copy of the LLM whose decoder just returns its input.

    Raises:
        ValueError: when the returned function is called, if the LLM's forward bypasses its decoder.
    """
    decoder = decoder_of(language_model)
    path = next(name for name, module in language_model.named_modules() if module is decoder)
    stand_in = _PassThrough(decoder)
    head = _with_child(language_model, path, stand_in)
    # The class's forward: one set on the instance (as accelerate's hooks do) is bound to the original.
    forward = type(head).forward

    def logits_of(hidden_MD: Tensor) -> Tensor:
        calls = stand_in.calls
        logits: Tensor = forward(head, inputs_embeds=hidden_MD[None], use_cache=False).logits[0]
        if stand_in.calls == calls:
            raise ValueError(f"{type(language_model).__name__} does not compute its logits from its decoder's output.")
        return logits

    return logits_of


def _with_child(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    """A shallow copy of a module with ``child`` at ``path``; everything else is shared."""
    name, _, rest = path.partition(".")
    clone = copy.copy(module)
    clone._modules = {**module._modules, name: _with_child(module.get_submodule(name), rest, child) if rest else child}
    return clone


class _PassThrough(nn.Module):
    """Replaces a decoder whose output is already known: returns its input, has its attributes, counts calls."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self._decoder = [decoder]  # in a list, so that it is not registered as a submodule
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._decoder[0], name)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        self.calls += 1
        return _Output(last_hidden_state=inputs_embeds)


class _Output(MoeModelOutputWithPast):  # type: ignore[misc]
    """The output of any decoder; fields that it lacks are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
