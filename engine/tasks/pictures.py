"""Tasks on pictures: questions with pictures in them, and the prompts made of several."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image

from engine.tasks.scoring import Example
from models import Prompt
from models.interface import IMAGE
from models.reading import read_int, read_seed
from models.shapes import Integer


@dataclass(frozen=True)
class Question:
    """A question about one or more pictures, and its answer.

    text:     up to the answer, with an `<image>` for each picture.
    images:   PIL images or paths, in the order of their markers.
    answer:   as it follows the text: " red", with its space.
    answers:  of all annotators, for the VQA accuracy; () where only `answer` is right.
    pictures: what the pictures are called: none of a query's is shown in its demonstrations. Default the paths, and a
              digest of each picture in memory.

    >>> from engine.tasks import Question
    >>> Question("<image>Which colour? Answer:", ("a.png",), " red").pictures
    ('a.png',)
    """

    text: str
    images: tuple[Any, ...]
    answer: str
    answers: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.text.count(IMAGE) != len(self.images):
            raise ValueError(
                f"the question has {self.text.count(IMAGE)} {IMAGE} marker(s) and {len(self.images)} image(s): "
                f"{self.text[:80]!r}"
            )
        if not self.answer.strip():
            raise ValueError(f"the question has no answer: {self.text[:80]!r}")
        if not self.pictures:
            object.__setattr__(self, "pictures", tuple(map(_called, self.images)))


def _called(image: Any) -> str:
    """A path as it is; a picture in memory by what it shows, so that it is called the same in every process."""
    if not isinstance(image, Image):
        return str(image)
    shown = repr((image.mode, image.size, image.getpalette())).encode()
    return hashlib.sha256(shown + image.tobytes()).hexdigest()


class Questions(NamedTuple):
    """The questions of a task in three parts; no picture that one asks about is asked about in another."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]


@dataclass(frozen=True)
class PictureTask:
    """Questions to search on and to be measured by; few-shot prompts are questions one after the other.

    train, test: the official parts, or a partition of the pictures.
    labels:      all answers there are, as they follow the text; () where any text may be one.
    open_ended:  answers are generated, up to ten tokens, and scored by the VQA accuracy; else by their first token.
    separator:   between an answer and the next question.
    instruction: what every prompt begins with.

    >>> from engine.tasks import PictureTask, Question
    >>> red, blue = (Question("<image> Colour:", (f"{name}.png",), f" {name}") for name in ("red", "blue"))
    >>> PictureTask("colours", (red,), (blue,)).example(blue, [red]).prompt.text
    '<image> Colour: red\\n<image> Colour:'
    """

    name: str
    train: tuple[Question, ...]
    test: tuple[Question, ...]
    labels: tuple[str, ...] = ()
    open_ended: bool = False
    separator: str = "\n"
    instruction: str = ""

    def split(self, seed: Integer = 0) -> Questions:
        """Seven in ten of the training pictures to search on, the rest to validate; each part shuffled by the seed."""
        draw = random.Random(read_seed(seed))
        asked = sorted({question.pictures[-1] for question in self.train})
        draw.shuffle(asked)
        first = set(asked[: round(0.7 * len(asked))])
        parts = (
            [question for question in self.train if question.pictures[-1] in first],
            [question for question in self.train if question.pictures[-1] not in first],
            list(self.test),
        )
        for part in parts:
            draw.shuffle(part)
        return Questions(*parts)

    def example(self, query: Question, shots: Sequence[Question] = ()) -> Example:
        shown = "".join(shot.text + shot.answer + self.separator for shot in shots)
        images = [image for question in (*shots, query) for image in question.images]
        return Example(Prompt(self.instruction + shown + query.text, tuple(images)), query.answer)

    def few_shot(
        self, questions: Sequence[Question], shots: Integer, count: Integer, seed: Integer = 0, shuffled: bool = False
    ) -> list[Example]:
        """`count` prompts of `shots` demonstrations each, queries and demonstrations drawn from `questions`.

        shuffled: the demonstrations' answers are permuted, so that they do not show the task.

        Raises ValueError where there are too few questions about other pictures than a query's.
        """
        shots, count = read_int(shots, "shots", 0), read_int(count, "count", 0)
        if not questions:
            raise ValueError(f"there are no questions here to draw from, task {self.name!r}")
        draw = random.Random(read_seed(seed))
        return [
            self._after(draw.choice(questions), questions, shots, draw, shuffled, overlap=False) for _ in range(count)
        ]

    def queries(
        self,
        questions: Sequence[Question],
        demonstrations: Sequence[Question],
        shots: Integer,
        seed: Integer = 0,
        shuffled: bool = False,
        overlap: bool = False,
    ) -> list[Example]:
        """Each question after `shots` demonstrations drawn for it; shuffled as in `few_shot`.

        overlap: demonstrations may show a picture of the query, as public code lets them; default they may not.

        Raises ValueError as `few_shot`.
        """
        shots, draw = read_int(shots, "shots", 0), random.Random(read_seed(seed))
        return [self._after(query, demonstrations, shots, draw, shuffled, overlap) for query in questions]

    def _after(
        self,
        query: Question,
        demonstrations: Sequence[Question],
        shots: int,
        draw: random.Random,
        shuffled: bool,
        overlap: bool,
    ) -> Example:
        taken: list[Question] = []
        left = list(range(len(demonstrations))) if shots else []
        while left and len(taken) < shots:
            at = draw.randrange(len(left))
            left[at], left[-1] = left[-1], left[at]
            shot = demonstrations[left.pop()]
            if overlap or set(query.pictures).isdisjoint(shot.pictures):
                taken.append(shot)
        if len(taken) < shots:
            raise ValueError(
                f"{shots} shots were asked for, task {self.name!r} has {len(taken)} question(s) here about other "
                f"pictures than {', '.join(query.pictures)}"
            )
        if shuffled:
            answers = draw.sample([shot.answer for shot in taken], len(taken))
            taken = [replace(shot, answer=answer) for shot, answer in zip(taken, answers, strict=True)]
        return self.example(query, taken)


def required(path: Path, expected: str) -> Path:
    """The path of a file or folder that a data set must have.

    Raises FileNotFoundError that says what was expected there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: expected {expected}")
    return path


def required_images(paths: Iterable[Path], name: str) -> None:
    """Raises FileNotFoundError that names the first image file that is not there, and says how many are not."""
    paths = dict.fromkeys(paths)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of the {len(paths)} images of {name} are missing: first {missing[0]}")


def read_json(path: Path, expected: str) -> Any:
    """The content of a JSON file.

    Raises FileNotFoundError, or ValueError for what is not JSON; both say what was expected.
    """
    text = required(path, expected).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected {expected}") from error
