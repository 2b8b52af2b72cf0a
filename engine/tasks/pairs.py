"""A task is a list of input/output pairs, shipped as data or read from a JSONL file of one's own."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from engine.tasks.scoring import Example
from models.reading import read_int, read_seed
from models.shapes import Integer

DATA = Path(__file__).parent / "data"
SHIPPED = ("antonyms", "past_tense", "comparatives", "capitals")


class Pair(NamedTuple):
    """One input of a task and its output."""

    input: str
    output: str


class Split(NamedTuple):
    """The pairs of a task in three parts that share no input."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


@dataclass(frozen=True)
class Task:
    """Pairs under the template "Q: {input}\\nA: {output}\\n\\n" of Function Vectors (arXiv 2310.15213).

    >>> task = engine.tasks.load("antonyms")
    >>> task.prompt([Pair("hot", "cold")], "big")
    'Q: hot\\nA: cold\\n\\nQ: big\\nA:'
    """

    name: str
    pairs: tuple[Pair, ...]

    def split(self, seed: Integer = 0) -> Split:
        """Half to train on, a fifth to validate, the rest to test; shuffled by the seed.

        It is inputs that are divided: several pairs of one stay together, so that none is asked that was shown.
        """
        of_input: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            of_input.setdefault(pair.input, []).append(pair)
        groups = list(of_input.values())
        random.Random(read_seed(seed)).shuffle(groups)
        first, second = round(0.5 * len(groups)), round(0.7 * len(groups))
        return Split(*(list(chain(*part)) for part in (groups[:first], groups[first:second], groups[second:])))

    @staticmethod
    def prompt(shots: Sequence[Pair], query: str) -> str:
        return "".join(f"Q: {x}\nA: {y}\n\n" for x, y in shots) + f"Q: {query}\nA:"

    def example(self, query: Pair, shots: Sequence[Pair] = ()) -> Example:
        return Example(self.prompt(shots, query.input), f" {query.output}")

    def few_shot(
        self, pairs: Sequence[Pair], shots: Integer, count: Integer, seed: Integer = 0, shuffled: bool = False
    ) -> list[Example]:
        """`count` prompts of `shots` demonstrations each, none of which has the query's input.

        shuffled: the demonstrations' answers are permuted, so that they do not show the task.
        """
        shots, count = read_int(shots, "shots", 0), read_int(count, "count", 0)
        if len(pairs) <= shots:
            raise ValueError(
                f"{shots} shots and a query need {shots + 1} pairs, task {self.name!r} has {len(pairs)} here"
            )
        draw = random.Random(read_seed(seed))
        drawn = [draw.sample(list(pairs), shots + 1) for _ in range(count)]
        examples = []
        for *shown, query in drawn:
            if any(shot.input == query.input for shot in shown):
                shown = draw.sample(self._others(pairs, query, shots), shots)
            examples.append(self.example(query, _shuffled(shown, draw) if shuffled else shown))
        return examples

    def queries(
        self,
        pairs: Sequence[Pair],
        demonstrations: Sequence[Pair],
        shots: Integer,
        seed: Integer = 0,
        shuffled: bool = False,
    ) -> list[Example]:
        """Each of `pairs` as a query after `shots` demonstrations of other inputs; shuffled as in `few_shot`."""
        shots, draw = read_int(shots, "shots", 0), random.Random(read_seed(seed))
        examples = []
        for query in pairs:
            drawn = draw.sample(self._others(demonstrations, query, shots), shots)
            examples.append(self.example(query, _shuffled(drawn, draw) if shuffled else drawn))
        return examples

    def _others(self, demonstrations: Sequence[Pair], query: Pair, shots: int) -> list[Pair]:
        """The pairs of other inputs than a query's. Raises ValueError for fewer than are to be shown."""
        others = [pair for pair in demonstrations if pair.input != query.input]
        if len(others) < shots:
            raise ValueError(
                f"{shots} shots need as many pairs of other inputs than {query.input!r}, "
                f"task {self.name!r} has {len(others)} here"
            )
        return others


def _shuffled(shots: Sequence[Pair], draw: random.Random) -> list[Pair]:
    outputs = draw.sample([shot.output for shot in shots], len(shots))
    return [Pair(shot.input, output) for shot, output in zip(shots, outputs, strict=True)]


def load(name: str | Path) -> Task:
    """A shipped task by name (of `SHIPPED`), or a JSONL file of {"input": ..., "output": ...} lines.

    Lines that repeat a pair are left out, with a warning.

    Raises FileNotFoundError for an unknown name or missing file, ValueError naming the line that is broken.

    >>> len(engine.tasks.load("past_tense").pairs) > 100
    True
    """
    path = DATA / f"{name}.jsonl" if str(name) in SHIPPED else Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"no task {str(name)!r}: expected one of {', '.join(SHIPPED)}, or a JSONL file of pairs"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: expected UTF-8, got {error}") from error
    numbered = [(_pair(line, path, number), number) for number, line in enumerate(lines, start=1) if line.strip()]
    pairs = tuple(dict.fromkeys(pair for pair, _ in numbered))
    if len(pairs) < len(numbered):
        first = {pair: number for pair, number in reversed(numbered)}
        again = [number for pair, number in numbered if number != first[pair]]
        warnings.warn(f"{path}: lines left out because they repeat a pair: {again}", stacklevel=3)
    inputs = len({pair.input for pair in pairs})
    if inputs < 10:
        raise ValueError(f"{path} has {len(pairs)} pairs of {inputs} inputs: a task needs at least 10 to be split")
    return Task(path.stem, pairs)


def _pair(line: str, path: Path, number: int) -> Pair:
    try:
        record = json.loads(line)
        pair = Pair(record["input"], record["output"])
    except (ValueError, TypeError, KeyError):
        pair = Pair("", "")
    if not all(isinstance(side, str) and side.strip() for side in pair):
        raise ValueError(
            f'{path}, line {number}: expected {{"input": "...", "output": "..."}}, got {line.strip()[:80]!r}'
        )
    return pair
