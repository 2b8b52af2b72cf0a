"""easy-VQA: pictures of one coloured shape, and questions about them (the package easy-vqa, MIT licence)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from engine.tasks.pictures import PictureTask, Question, read_json, required, required_images

Kind: TypeAlias = Literal["colour", "shape", "yes_no"]

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
# What a question of the task says, up to its answer.
TEXT = {
    "colour": "Q: <image> Colour?\nA:",
    "shape": "Q: <image> Shape?\nA:",
    "yes_no": "Q: <image> {question}\nA:",
}
LABELS = {"colour": COLOURS, "shape": SHAPES, "yes_no": ("yes", "no")}

_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_THING = rf"(?:(?P<colour>{_COLOUR}) shape|(?P<shape>{_SHAPE})|shape)"
_PRESENT = re.compile(
    rf"(?:does the image (?:not )?contain a|is (?:a|no)|is there (?:not )?a) {_THING}(?: present| in the image)?\?"
)
_WHICH_COLOUR = re.compile(rf"what (?:color is|is the color of) the {_THING}\?")
_WHICH_SHAPE = re.compile(
    rf"what is the (?P<colour>{_COLOUR}) shape\?|what shape (?:does the image contain|is in the image|is present)\?"
)


def load(kind: Kind, folder: str | Path | None = None) -> PictureTask:
    """A task on the pictures of easy-VQA, of 64 x 64 pixels; its train and test pictures are the official ones.

    kind:   "colour" (8 labels) or "shape" (3 labels) of every picture whose questions tell it, or "yes_no": the
            questions that are answered by yes or no, as they are.
    folder: with train/ and test/, a questions.json and images/ in each; default the data of the installed package.

    Raises ValueError for another kind, or a question that is none of easy-VQA's, FileNotFoundError for a missing file.

    >>> task = engine.tasks.load("easy_vqa_shape")
    >>> task.example(task.test[0]).prompt.text, task.labels
    ('Q: <image> Shape?\\nA:', (' circle', ' rectangle', ' triangle'))
    """
    if kind not in get_args(Kind):
        raise ValueError(f"there is no easy-VQA task {kind!r}: expected one of {', '.join(get_args(Kind))}")
    data = _package() if folder is None else Path(folder)
    labels = tuple(f" {label}" for label in LABELS[kind])
    train, test = _part(kind, data / "train"), _part(kind, data / "test")
    return PictureTask(f"easy_vqa_{kind}", train, test, labels, separator="\n\n")


def told(question: str, answer: str) -> dict[str, str]:
    """The colour and the shape that an answered question gives a picture; none where it says what they are not.

    Raises ValueError for a question or an answer that is none of easy-VQA's.

    >>> from engine.tasks.easy_vqa import told
    >>> told("is there not a red shape in the image?", "no"), told("is there a circle?", "no")
    ({'colour': 'red'}, {})
    """
    if found := _PRESENT.fullmatch(question):
        if answer in ("yes", "no"):
            negated = " not " in question or " no " in question
            return _said(found) if (answer == "yes") != negated else {}
    elif found := _WHICH_COLOUR.fullmatch(question):
        if answer in COLOURS:
            return _said(found) | {"colour": answer}
    elif (found := _WHICH_SHAPE.fullmatch(question)) and answer in SHAPES:
        return _said(found) | {"shape": answer}
    raise ValueError(f"not a question of easy-VQA and its answer: {question!r}, {answer!r}")


def _said(found: re.Match[str]) -> dict[str, str]:
    return {what: word for what, word in found.groupdict().items() if word is not None}


def _part(kind: Kind, folder: Path) -> tuple[Question, ...]:
    path = required(folder, "train/ and test/ of easy-VQA") / "questions.json"
    expected = "a list of [question, answer, number of the picture]"
    records = read_json(path, expected)
    if not isinstance(records, list) or not records or not all(map(_is_record, records)):
        raise ValueError(f"{path}: expected {expected}")
    labels: dict[int, dict[str, str]] = {number: {} for *_, number in records}
    for question, answer, number in records:
        for what, word in told(question, answer).items():
            if labels[number].setdefault(what, word) != word:
                raise ValueError(f"{path}: picture {number} is both {labels[number][what]} and {word}")
    if kind == "yes_no":
        asked = [(number, question, answer) for question, answer, number in records if answer in LABELS[kind]]
    else:
        asked = [(number, "", label[kind]) for number, label in labels.items() if kind in label]
    images = {number: folder / "images" / f"{number}.png" for number, *_ in asked}
    required_images(images.values(), str(folder))
    return tuple(
        Question(TEXT[kind].format(question=question), (str(images[number]),), f" {answer}")
        for number, question, answer in asked
    )


def _is_record(record: object) -> bool:
    return isinstance(record, list) and [type(part) for part in record] == [str, str, int]


def _package() -> Path:
    """The data folder of the package easy-vqa, which is not imported: it reads all of it when it is."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the pictures of easy-VQA are not installed: pip install easy-vqa, or give folder=")
    return Path(spec.submodule_search_locations[0]) / "data"
