"""Caches that transformers' own `generate` goes on from: forwards that are given one are edited, no others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import finalize, ref

from torch import Tensor, nn

from models.calls import Call, Passing, current, go_on
from models.hooks import hooked, steers
from models.huggingface import HuggingFace, _expanded_cache
from models.interface import Edit, Encoded, KeyValues, Steer, UnsupportedModelError

# What a forward of `batch` rows does to tokens [first, first + n_tokens) of each: (batch, first, n_tokens).
Changes: TypeAlias = Callable[[int, int, int], tuple[Edit | None, Steer | None]]
MARK = "_headpatch"  # on a cache


class Mark:
    """What a cache is known by, and every copy of it."""

    def __deepcopy__(self, _: Any) -> Mark:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a cache that was handed over belongs to its model and is not pickled: start again")


@dataclass(eq=False)
class Forward(Call):
    """A forward with the cache of a mark, or one within it; outer: what ran before. changes: what is undone after."""

    mark: int = 0
    outer: Call | None = None
    changes: ExitStack = field(default_factory=ExitStack)


def why_not_handed(model: HuggingFace) -> str:
    """Why transformers cannot go on from a patched prompt on this model; empty if it can."""
    hf, kind = model.hf, type(model.hf).__name__
    if not getattr(hf, "can_generate", lambda: False)():
        return f"{kind} has no generate of transformers"
    if not hf._supports_default_dynamic_cache() or "mamba" in kind.lower():  # type: ignore[operator]
        return f"{kind} makes a cache of its own kind, by which its forwards cannot be told"
    if model._compiled or any(module._compiled_call_impl is not None for module in model.body.modules):
        return "it is compiled, and compiled code does not look for hooks put in later: hand over the model as written"
    return ""


def hand_over(model: HuggingFace, prompt: Encoded, prefix: KeyValues, rows: int, copies: int) -> dict[str, Any]:
    """What `model.hf.generate` goes on from: `rows` of the prompt, the cache with `copies` of each.

    prefix: of all tokens but the last; empty: the cache is empty too, and generate runs the prompt with its images.
    """
    from transformers import DynamicCache

    ids = prompt.ids.expand(rows, -1).clone()
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}
    if not len(prefix):
        cache = DynamicCache(config=model.config)  # as generate makes it: hybrids need to be told of their layers
        images = {key: value.repeat(rows, *[1] * (value.ndim - 1)) for key, value in prompt.inputs.items()}
        return {**given, **images, "past_key_values": cache}
    if any(hasattr(module, "rope_deltas") for module in model.body.remembering):
        # Else such models count on from the images that they saw last.
        given["position_ids"] = (ids.new_ones(ids.shape).cumsum(dim=1) - 1) + int(prefix.offset)
    return {**given, "past_key_values": _expanded_cache(prefix, rows * copies)}


def edit_forwards_with(cache: Any, model: HuggingFace, changes: Changes) -> None:
    """As long as this cache, or a copy of it, is there: every forward that is given one is changed, in any thread.

    `changes` is asked before each, and may raise; then nothing is computed.
    """
    mark, body = Mark(), model.body
    setattr(cache, MARK, mark)
    known, number = ref(mark), id(mark)
    cut_short: list[ExitStack] = []  # by an interrupt

    def enter(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        cache, now = given.get("past_key_values"), current()
        if (found := getattr(cache, MARK, None)) is not None and found is known():
            forward = Forward(mark=number, outer=now)
            go_on(forward)
            tokens = given.get("input_ids")
            batch, n_tokens = (given["inputs_embeds"] if tokens is None else tokens).shape[:2]
            edit, steer = changes(batch, cache.get_seq_length(), n_tokens)
            cut_short.append(forward.changes)
            forward.changes.enter_context(model._edited(edit, None))
            forward.changes.enter_context(hooked(lambda: steers(steer, body.blocks, None)))
        elif isinstance(now, Forward) and now.mark == number:  # another forward, from within one of ours
            go_on(Forward(mark=number, outer=now))

    def leave(*_: Any) -> None:
        if isinstance(now := current(), Forward) and now.mark == number:
            now.changes.close()
            if now.changes in cut_short:
                cut_short.remove(now.changes)
            go_on(now.outer)

    handles = [
        model.hf.register_forward_pre_hook(Passing(enter), with_kwargs=True),
        # First of all: hooks of several caches leave in the reverse order of entering.
        model.hf.register_forward_hook(Passing(leave), prepend=True, always_call=True),
    ]

    def gone() -> None:
        for handle in handles:
            handle.remove()
        for changes in cut_short:
            changes.close()

    finalize(mark, gone)
