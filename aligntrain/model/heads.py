"""A causal LLM cut in two, decoder and head, so that logits can be computed for some positions only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast


def decoder_of(language_model: Any) -> Any:
    """The part of a causal LLM that makes the last hidden states.

    Raises:
        ValueError: there is no telling which part that is.
    """
    decoder = language_model.get_decoder()
    # Where transformers does not know better, it returns the LLM itself.
    decoder = getattr(language_model, "model", decoder) if decoder is language_model else decoder
    if decoder is language_model:
        raise ValueError(f"{type(language_model).__name__} has no decoder of its own that could be run alone.")
    return decoder


def head_of(language_model: Any) -> Callable[[Tensor], Tensor]:
    """The rest of it: last hidden states [m, D] -> logits [m, V].

    LLMs scale, cap or bias their logits each in its own way (Gemma 2, Cohere, Granite, Phi, …), in the code of their
    own ``forward``. A shallow copy of the LLM, its decoder replaced by one that returns its input, runs that very code
    on the very same parameters.

    Raises:
        ValueError: when called, if the LLM's forward did not go through the decoder.
    """
    decoder = decoder_of(language_model)
    path = next(name for name, module in language_model.named_modules() if module is decoder)
    stand_in = _PassThrough(decoder)
    head = _with_child(language_model, path, stand_in)
    # The class's forward: one that was put on the instance (accelerate's hooks) is bound to the original.
    forward = type(head).forward

    def logits_of(hidden_MD: Tensor) -> Tensor:
        calls = stand_in.calls
        logits: Tensor = forward(head, inputs_embeds=hidden_MD[None], use_cache=False).logits[0]
        if stand_in.calls == calls:
            raise ValueError(f"{type(language_model).__name__} does not compute its logits from its decoder's output.")
        return logits

    return logits_of


def _with_child(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    """A shallow copy of a module with another submodule at ``path``; everything else is shared."""
    name, _, rest = path.partition(".")
    clone = copy.copy(module)
    clone._modules = {**module._modules, name: _with_child(module.get_submodule(name), rest, child) if rest else child}
    return clone


class _PassThrough(nn.Module):
    """Stands in for a decoder whose output is already known; lends its attributes, counts its calls."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self._lender = [decoder]  # in a list, so that it is no submodule
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._lender[0], name)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        self.calls += 1
        return _Output(last_hidden_state=inputs_embeds)


class _Output(MoeModelOutputWithPast):  # type: ignore[misc]
    """Any decoder's output; what it does not have is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
