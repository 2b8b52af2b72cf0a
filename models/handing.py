"""Caches that transformers' own `generate` goes on from: forwards that are given one are edited, no others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import finalize, ref

import torch
from torch import Tensor, nn

from models.calls import Call, Passing, current, go_on
from models.huggingface import HuggingFace
from models.interface import Edits, Encoded
from models.shapes import Int

# What a forward of `batch` rows does to tokens [first, first + n_tokens) of each: (batch, first, n_tokens).
Changes: TypeAlias = Callable[[int, int, int], Edits]
MARK = "_headpatch"  # on a cache
ALONG = {"input_ids", "position_ids"}  # [..., tokens]


class Mark:
    """What a cache is known by, and every copy of it."""

    def __deepcopy__(self, _: Any) -> Mark:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a cache that was handed over belongs to its model and is not pickled: start again")


@dataclass(eq=False)
class Forward(Call):
    """A forward with a cache of this mark, or one within it; outer: what was on its way. changes: undone after it."""

    mark: int = 0
    outer: Call | None = None
    changes: ExitStack = field(default_factory=ExitStack)


def why_not_handed(model: HuggingFace) -> str:
    """Why transformers cannot go on from a patched prompt on this model; empty if it can."""
    hf, body, kind = model.hf, model.body, type(model.hf).__name__
    if not getattr(hf, "can_generate", lambda: False)():
        return f"{kind} has no generate of transformers"
    if "past_key_values" not in model._accepts or not hf._supports_default_dynamic_cache():  # type: ignore[operator]
        return f"{kind} keeps its past in a way of its own, by which its forwards cannot be told"
    if model._compiled or any(module._compiled_call_impl is not None for module in body.modules):
        return "it is compiled, and compiled code does not look for hooks put in later; wrap it as it was written"
    if getattr(model, "_own_edits", None):
        return "it has edits registered with nnsight, which transformers' generate does not make"
    return ""


def hand_over(model: HuggingFace, prompt: Encoded, n_cached: int, rows: int, copies: int) -> dict[str, Any]:
    """What `model.hf.generate` goes on from: `rows` of the prompt, and a cache of `copies` of each.

    n_cached: tokens that are computed now, once for all. With none, or in layers of a cache that are more than keys and
              values, generate runs the prompt, with its images.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    ids = prompt.ids.repeat(rows, 1)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
    cache = DynamicCache(config=model.config)  # as generate makes it
    if not n_cached or not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        images = {key: value.repeat(rows, *[1] * (value.ndim - 1)) for key, value in prompt.inputs.items()}
        return given | images | {"past_key_values": cache}
    cache = DynamicCache()  # keeps all tokens: not every model with a window stays within it (Moshi)
    offset = model.fill(cache, prompt, n_cached)
    cache.batch_repeat_interleave(rows * copies)
    given["past_key_values"] = cache
    if any(hasattr(module, "rope_deltas") for module in model.body.remembering):
        # Such models would count on from the images that they saw last.
        given["position_ids"] = (torch.arange(ids.shape[1], device=ids.device) + offset).repeat(rows, 1)
    return given


def change_forwards(cache: Any, model: HuggingFace, ids: Int[Tensor, " tokens"], changes: Changes) -> None:
    """As long as this cache of the prompt `ids`, or a copy of it, is there: forwards of the model that are given one
    are changed, in any thread. `changes` is asked before each, and may raise.
    """
    mark, n_cached = Mark(), cache.get_seq_length()
    setattr(cache, MARK, mark)
    known, number = ref(mark), id(mark)
    begun: list[ExitStack] = []  # an interrupt passes by the hook that ends them

    def enter(_: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        now, cache = current(), given.get("past_key_values")
        found: Any = getattr(cache, MARK, None)
        if cache is not None and found is not None and found is known():
            here = Forward(mark=number, outer=now)
            go_on(here)
            first, tokens = cache.get_seq_length(), given["input_ids"]
            again = 0 < first == n_cached and tokens.shape[1] >= len(ids)
            if again and (tokens[:, : len(ids)] == ids.to(tokens.device)).all():
                # Assisted decoding begins with all of the prompt, whatever its cache holds.
                given = given | {name: given[name][..., first:] for name in ALONG & given.keys()}
            batch, n_tokens = given["input_ids"].shape
            here.batch = batch
            here.changes.enter_context(model.changed(changes(batch, first, n_tokens)))
            begun.append(here.changes)
            if isinstance(kept := given.get("logits_to_keep"), int) and kept and n_tokens > 1:
                # By an integer some models see that their last layers may skip all but the last tokens (Gemma4).
                given = given | {"logits_to_keep": slice(-kept, None)}
            return args, given
        if isinstance(now, Forward) and now.mark == number:  # another forward, from within one of these
            go_on(Forward(mark=number, outer=now))
        return None

    def leave(*_: Any) -> None:
        now = current()
        if isinstance(now, Forward) and now.mark == number:
            now.changes.close()
            begun[:] = [changes for changes in begun if changes is not now.changes]
            go_on(now.outer)

    handles = [
        model.hf.register_forward_pre_hook(Passing(enter), with_kwargs=True),
        # Of several caches, the last to enter leaves first.
        model.hf.register_forward_hook(Passing(leave), prepend=True, always_call=True),
    ]

    def end() -> None:
        for handle in handles:
            handle.remove()
        for changes in begun:
            changes.close()

    finalize(mark, end)
