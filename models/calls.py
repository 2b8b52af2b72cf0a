"""Calls on a model: one at a time, and unseen by all others who use the same model meanwhile.

Other wrappers, other threads, and hooks of the caller's may run the model while a call of ours is on its way. What a
call puts on it acts only in the context of that call, which a thread, or a call within a call, does not share.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import Any

from torch import nn

from models.interface import Edits


@dataclass(eq=False)
class Call:
    """One forward of ours.

    layout: how its rows are packed, if they are (`models.layout.Layout`). batch: its sequences.
    edits:  of what attention is handed, or makes, while the forward runs. attended: layers, so far, in which it did:
            keys are kept, and read again, in the order of the calls.
    """

    layout: Any = None
    batch: int = 1
    edits: Edits = field(default_factory=dict)
    attended: int = 0


_current: ContextVar[Call | None] = ContextVar("headpatch_call", default=None)
_locks: dict[int, Any] = {}  # by config: models that share one also share the attention it names


def current() -> Call | None:
    return _current.get()


def go_on(call: Call | None) -> None:
    """What runs in this context from here on belongs to this call."""
    _current.set(call)


@contextmanager
def calling(hf: nn.Module, config: Any, call: Call) -> Iterator[None]:
    """Within: the first forward of the model in this thread belongs to this call; forwards inside it do not."""
    if id(config) not in _locks:
        weakref.finalize(config, _locks.pop, id(config), None)
    thread = get_ident()
    entered: list[Any] = []

    def enter(*_: Any) -> None:
        if get_ident() == thread:
            entered.append(_current.set(None) if entered and _current.get() is call else None)

    def leave(*_: Any) -> None:
        if get_ident() == thread and (token := entered.pop()):
            _current.reset(token)

    with _locks.setdefault(id(config), RLock()):
        handles = [
            hf.register_forward_pre_hook(Passing(enter)),
            hf.register_forward_hook(Passing(leave), always_call=True),
        ]
        token = _current.set(call)
        try:
            yield
        finally:
            _current.reset(token)
            for handle in handles:
                handle.remove()


class Passing:
    """A hook or a forward of ours, told by its class from those of others."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class Hook(Passing):
    """A hook that acts within the call it was made in, and lets all other forwards pass."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        self.call = current()

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if current() is self.call else None


def foreign_hooks_of(module: nn.Module) -> list[int]:
    """What others have put on a module's forward: the keys of hooks, the id of another function."""
    found = []
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        if hooks:
            found += [key for key, hook in hooks.items() if _of_others(hook)]
    instead = module.__dict__.get("forward")
    return found if instead is None or not _of_others(instead) else [*found, id(instead)]


def _of_others(function: Any) -> bool:
    """Not ours, nor transformers' own, which look at outputs that are asked for."""
    return not isinstance(function, Passing) and not str(getattr(function, "__module__", "")).startswith(
        "transformers."
    )
