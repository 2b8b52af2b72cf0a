"""What commands share: options, what is printed and where, errors told in one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from engine import tasks
from engine.answers.steps import Patched
from engine.distributed import LostRankError
from engine.methods import mtv

ModelName: TypeAlias = Annotated[str, typer.Option(help="smollm2-135m, a local folder, or a hub id.")]
TaskName: TypeAlias = Annotated[
    str, typer.Option(help=f"{', '.join(tasks.SHIPPED)}, or a JSONL file of input/output pairs.")
]
PatchedTokens: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Which tokens of an answer are patched: prompt (the prompt's last), all, or so many new ones too."
    ),
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", help="No progress lines.")]

# What is printed is text of users, models and files, tables included: brackets and colons in it are no markup.
PLAIN: dict[str, Any] = dict(markup=False, emoji=False)
out = Console(**PLAIN)
note = Console(stderr=True, **PLAIN)


def say(line: str) -> None:
    """A line of progress."""
    note.print(line, highlight=False)


def list_files(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        out.print(folder / name, highlight=False, soft_wrap=True)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can mend is told in one line, without a traceback; by every rank that has something to say."""
    try:
        yield
    except (ValueError, TypeError, IndexError, OSError, ImportError, LostRankError) as error:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        told = Text.assemble(rank, ("error:", "red"), f" {error}")
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def search_line(quiet: bool) -> Iterator[Callable[[mtv.Step], None]]:
    """A progress line with step, loss, heads on and rollouts a second."""
    shown = "{task.fields[said]}"
    columns = (TextColumn("search"), BarColumn(), TextColumn(shown), TimeElapsedColumn())
    with Progress(*columns, console=note, transient=True, disable=quiet) as progress:
        line = progress.add_task("search", total=None, said="")

        def on_step(step: mtv.Step) -> None:
            said = (
                f"step {step.step}/{step.steps}  loss {step.loss:.2f}  heads on {step.heads:.0f}  "
                f"{step.rollouts_per_second:.0f} rollouts/s"
            )
            progress.update(line, total=step.steps, completed=step.step, said=said)

        yield on_step


def interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.2f}-{ends[1]:.2f}"


def read_patched(patched: str) -> Patched:
    if patched in ("prompt", "all") or patched.isdigit():
        return int(patched) if patched.isdigit() else patched  # type: ignore[return-value]
    raise ValueError(f"--patched must be 'prompt', 'all' or a number of new tokens, got {patched!r}")


def make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
