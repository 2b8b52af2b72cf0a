"""One task at one seed: its prompts, mean activations, task vectors and scores, as every experiment needs them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Generator, Tensor

from engine.answers.evaluation import exact
from engine.answers.generation import generate
from engine.artifacts import TaskVector
from engine.core.activations import mean_activations
from engine.core.patches import One
from engine.core.patching import patch
from engine.core.prefix import Prefix, as_prefix, compute, shareable
from engine.distributed import digest, identity
from engine.methods import mtv
from engine.methods.options import PRESETS
from engine.progress import track
from engine.tasks import Example, Task, first_token
from engine.tasks.pictures import PictureTask
from engine.tasks.scoring import AT_ONCE
from engine.tasks.vqa import accuracy, first_line
from models import Model, PromptLike
from models.reading import read_int
from models.shapes import Bool, Float

ANSWER_TOKENS = 10  # of a generated answer, and it ends with its line: appendix C of the paper
PRESET = PRESETS["reference"]
RANDOM_DRAWS = 5  # of heads, as many as the task vector has
VALIDATION = 50  # examples that choose among a search's candidates

AnyTask: TypeAlias = Task | PictureTask
# What one way of asking scored: {"way": "zero-shot", "accuracy": 0.4, "within": 0.5, "tokens": 12.0, ...}
Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Sizes of an experiment.

    seeds:    of the split, the prompts and the search: 0, 1, ...
    shots:    demonstrations in the prompts that the means are taken from, and of the few-shot baseline.
    examples: such prompts, and examples that heads are searched on, as far as there are.
    steps:    of a search. queries: held-out questions, as far as there are.

    Raises ValueError for sizes that are no integers, or below one (shots: below zero).

    >>> engine.experiments.Options(seeds=1).shots
    8
    """

    seeds: int = 5
    shots: int = 8
    examples: int = 100
    steps: int = 100
    queries: int = 100

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            read_int(value, name, 0 if name == "shots" else 1)


class Way(NamedTuple):
    """A way to ask: with these heads carrying these values, or (None) unpatched. Those of one name are averaged."""

    name: str
    mask: Bool[Tensor, "layers heads"] | None = None
    values: Float[Tensor, "layers heads head_dim"] | None = None


@dataclass(frozen=True)
class Setting:
    """A model, a task, a seed. Prompts are drawn alike by every experiment; vectors are searched once and kept.

    folder: where vectors are kept, and found again by a run that goes on.
    tasks:  all tasks of the experiment.
    """

    model: Model
    task: AnyTask
    seed: int
    options: Options
    folder: Path
    tasks: tuple[AnyTask, ...] = ()
    progress: bool = True

    @cached_property
    def split(self) -> Any:
        return self.task.split(self.seed)

    @property
    def held_out(self) -> list[Any]:
        """The questions asked, in the order of `queries`."""
        return self.split.test[: self.options.queries]

    @property
    def one(self) -> int:
        """Demonstrations in a one-shot prompt: none where a question brings its own pair (2-way 1-shot)."""
        return 0 if brings_pair(self.task) else 1

    def asked(self, shots: int) -> str:
        """How a prompt of so many demonstrations is called."""
        if not self.one:
            return f"1-shot after {shots} others" if shots else "1-shot"
        return f"{shots}-shot" if shots else "zero-shot"

    def queries(self, shots: int) -> list[Example]:
        """The held-out questions, each after demonstrations of the training part."""
        return self.task.queries(self.held_out, self.split.train, shots, self.seed)

    @cached_property
    def many_shot(self) -> list[PromptLike]:
        """The few-shot prompts whose mean activations a task vector carries."""
        drawn = self.task.few_shot(self.split.train, self.options.shots, self.options.examples, self.seed)
        return [example.prompt for example in drawn]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What results that are kept must agree with: model and weights, task and its questions, seed, sizes."""
        sizes = {key: value for key, value in asdict(self.options).items() if key != "seeds"}
        said = [_said(self.task, question) for part in self.split for question in part]
        ways = {"answers": "exact, or the reference code's"}
        return {
            **identity(self.model),
            **ways,
            "task": self.task.name,
            "data": digest(said),
            "seed": self.seed,
            **sizes,
        }

    def path(self, name: str) -> Path:
        """Of a vector of this task and seed."""
        return self.folder / "vectors" / f"{self.task.name}-{self.seed}-{name}.safetensors"

    def vector(self, name: str = "mtv", prompts: Sequence[PromptLike] | None = None, shots: int = 0) -> TaskVector:
        """MTV: the means of `prompts` (default the many-shot ones), heads searched on examples of so many shots."""
        path = self.path(name)
        if path.is_file() and (kept := TaskVector.load(path)).metadata.get("setting") == self.identity:
            return kept
        means = mean_activations(self.model, self.many_shot if prompts is None else prompts, progress=self.progress)
        searched, validation = (
            self.task.queries(questions, self.split.train, shots, self.seed)
            for questions in (self.split.train[: self.options.examples], self.split.validation[:VALIDATION])
        )
        checkpoint = path.with_name(f".{path.stem}-{digest(means.cpu(), self.identity)}.checkpoint")
        vector = mtv.extract(
            self.model, searched, means, steps=self.options.steps, seed=self.seed, validation=validation or None,
            checkpoint=checkpoint, progress=self.progress,
        )  # fmt: skip
        vector.metadata.update(task=self.task.name, setting=self.identity)
        vector.save(path)
        checkpoint.unlink()
        return vector

    def random_heads(self, vector: TaskVector, name: str) -> list[Way]:
        """Draws of as many heads as the vector has, carrying its values."""
        draw, count = Generator().manual_seed(self.seed), int(vector.mask.sum())
        ways = []
        for _ in range(RANDOM_DRAWS):
            mask = torch.zeros(vector.mask.numel(), dtype=torch.bool)
            mask[torch.randperm(len(mask), generator=draw)[:count]] = True
            ways.append(Way(name, mask.view_as(vector.mask), vector.values))
        return ways

    def ask(self, examples: Sequence[Example], ways: Sequence[Way], patches: One | None = None) -> list[Record]:
        """The held-out questions, asked in all ways at once: ways are rows of one forward.

        examples: of `queries`. patches: what is patched besides, in each way.

        accuracy: of the first token; of tasks with open answers, the VQA accuracy of the generated text.
        exact:    of the whole string, the patch at the prompt's last token; None for open answers.
        within:   as accuracy, where only the labels' first tokens may be answered; None without labels.
        """
        heads, values = rows_of(ways)
        labels = getattr(self.task, "labels", ())
        right: list[list[float]] = []  # [examples][ways]
        within: list[list[float]] = []
        exactly: list[list[float]] = []
        tokens: list[int] = []
        for start in track(range(0, len(examples), AT_ONCE), f"{self.task.name}, {ways[0].name}", self.progress):
            some = examples[start : start + AT_ONCE]
            prompts = [as_prefix(self.model, example.prompt) for example in some]
            tokens += [len(prompt.tokens) for prompt in prompts]
            prompts = compute(prompts, [shareable(prompt, len(prompt.tokens) - 1) for prompt in prompts])
            patched: dict[str, Any] = dict(patches=patches, heads=heads, values=values)
            if getattr(self.task, "open_ended", False):
                right += self._vqa(self.held_out[start : start + AT_ONCE], prompts, len(ways), patched)
                continue
            with torch.no_grad():
                logits = patch(self.model, prompts, **patched).float().cpu()  # [prompts, ways, vocab]
            for example, said in zip(some, self.answers(prompts, len(ways), **patched), strict=True):
                exactly.append([exact(answer, example) for answer in said])
            target = torch.tensor([[first_token(self.model, example)] for example in some])
            right += (logits.argmax(dim=-1) == target).float().tolist()
            if labels:
                ids = torch.tensor(
                    [[first_token(self.model, Example(e.prompt, word)) for word in labels] for e in some]
                )
                if len(set(ids[0].tolist())) < len(labels):
                    warnings.warn(
                        f"{self.task.name}: some of the labels {labels} begin with the same token, which first-token "
                        "scores do not tell apart",
                        stacklevel=2,
                    )
                best = logits.gather(-1, ids[:, None].expand(-1, len(ways), -1)).argmax(dim=-1)
                within += (ids.gather(1, best) == target).float().tolist()
        records = []
        for name in dict.fromkeys(way.name for way in ways):
            rows = [row for row, way in enumerate(ways) if way.name == name]
            accuracy, whole, among = (
                fmean(scores[row] for scores in found for row in rows) if found else None
                for found in (right, exactly, within)
            )
            n_heads = sum(int(mask.sum()) for row in rows if (mask := ways[row].mask) is not None) // len(rows)
            records.append(
                dict(
                    way=name,
                    accuracy=accuracy,
                    exact=whole,
                    within=among,
                    tokens=fmean(tokens),
                    queries=len(examples),
                    heads=n_heads,
                )
            )
        return records

    def _vqa(
        self, questions: Sequence[Any], prompts: Sequence[Prefix], n_ways: int, patched: dict[str, Any]
    ) -> list[list[float]]:
        """VQA accuracy of each question's generated answer, in every way."""
        return [
            [accuracy(first_line(answer), question.answers or (question.answer.strip(),)) for answer in row]
            for question, row in zip(questions, self.answers(prompts, n_ways, **patched), strict=True)
        ]

    def answers(self, prompts: Sequence[PromptLike | Prefix], n_ways: int = 1, **patched: Any) -> list[list[str]]:
        """Text, [prompts][ways]. Open answers as the reference code makes them: all tokens patched, cut at "." too."""
        reference = getattr(self.task, "open_ended", False)
        how = dict(patched=PRESET.patched, stop=PRESET.stops) if reference else dict(patched="prompt", stop="\n")
        said = generate(self.model, list(prompts), max_new_tokens=ANSWER_TOKENS, **how, **patched)
        return said if n_ways > 1 else [[answer] for answer in said]

    def demonstrations(self, query: Any, draw: random.Random) -> list[Any]:
        """As many as there are shots, about other pictures than the query's."""
        shown = set(getattr(query, "pictures", ()))
        others = [q for q in self.split.train if q != query and shown.isdisjoint(getattr(q, "pictures", ()))]
        return draw.sample(others, self.options.shots)


def brings_pair(task: AnyTask) -> bool:
    """Whether its questions show an example of each answer themselves (2-way 1-shot)."""
    return isinstance(task, PictureTask) and any(len(question.images) > 1 for question in task.test[:1])


def _said(task: AnyTask, question: Any) -> list[Any]:
    """All of a question but its pixels: as it is asked after itself, its annotators' answers, its pictures' names."""
    prompt: Any = task.example(question, [question]).prompt
    text = prompt if isinstance(prompt, str) else prompt.text
    return [text, [*getattr(question, "answers", ())], [*getattr(question, "pictures", ())]]


def rows_of(
    ways: Sequence[Way],
) -> tuple[Bool[Tensor, "ways layers heads"] | None, Float[Tensor, "*ways layers heads head_dim"] | None]:
    """Heads and values of all ways, a row each: one set of values if they all carry the same."""
    carried = [way.values for way in ways if way.values is not None]
    if not carried:
        return None, None
    none = torch.zeros(carried[0].shape[:2], dtype=torch.bool)
    heads = torch.stack([none if way.mask is None else way.mask for way in ways])
    if all(values is carried[0] for values in carried):
        return heads, carried[0]
    return heads, torch.stack([carried[0] if way.values is None else way.values for way in ways])
