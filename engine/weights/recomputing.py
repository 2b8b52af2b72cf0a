"""Activation checkpointing while a model is lent composed weights.

A backward pass comes after the weights were put back, so what it ran again would read the base's, and give them
gradients. While any model is lent weights, torch's checkpoints therefore keep what they compute: more memory, the same
gradients. Callers hold `checkpoint` itself, so what it looks up is replaced; others that use it meanwhile are as right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch.utils import checkpoint as torchs

_lock = Lock()
_within = [0]  # how many lend weights now: threads may leave in another order than they came
_reentrant, _other = torchs.CheckpointFunction, torchs._checkpoint_without_reentrant_generator


@dataclass(frozen=True)
class Own:
    """A function that brings its weights along: running it again is right at any time."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def again(function: Callable[..., Any], *args: Any) -> Any:
    """What the function gives; nothing that it computes is kept for gradients, the backward pass runs it again."""
    return torchs.checkpoint(Own(function), *args, use_reentrant=False)


class _Kept:
    """In place of `CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _kept(function: Callable[..., Any], preserve: bool, contexts: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    if isinstance(function, Own):
        yield from _other(function, preserve, contexts, *args, **kwargs)
        return
    with contexts()[0]:
        yield


@contextmanager
def nothing_recomputed() -> Iterator[None]:
    """Within: checkpoints keep what they compute."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(by: int) -> None:
    with _lock:
        _within[0] += by
        torchs.CheckpointFunction = _Kept if _within[0] else _reentrant  # type: ignore[misc,assignment]
        torchs._checkpoint_without_reentrant_generator = _kept if _within[0] else _other  # type: ignore[assignment]
