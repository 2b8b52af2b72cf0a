"""Progress bars, drawn by rich on standard error, switchable by every verb that takes long."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

Item = TypeVar("Item")


def track(items: Iterable[Item], label: str, show: bool) -> Iterable[Item]:
    total = len(items) if isinstance(items, Sized) else None
    return rich_track(items, label, total=total, console=Console(stderr=True), disable=not show, transient=True)
