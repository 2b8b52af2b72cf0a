"""Whole answers: which tokens to patch, and by which loss to search, on tasks of words and of pictures, over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from rich.table import Table

import engine
import models
from engine import tasks
from engine.artifacts import write_whole
from engine.tasks.scoring import Scored

WORDS = ("antonyms", "past_tense", "comparatives", "capitals")
PATCHED: tuple[Any, ...] = ("prompt", 1, "all")
LOSSES = ("first_token", "answer", "answer and end")
END = "\n"  # of an answer's line
EXAMPLES, SHOTS, ICL_SHOTS, VALIDATION, QUERIES = 100, 8, 5, 50, 100
BY = ("exact", "first_token")


def asked(task: Any, seed: int) -> dict[str, Any]:
    """Prompts of a task at a seed, as `headpatch extract` makes them."""
    split = task.split(seed)
    return dict(
        many_shot=[example.prompt for example in task.few_shot(split.train, SHOTS, EXAMPLES, seed)],
        searched=task.queries(split.train[:EXAMPLES], split.train, 0, seed),
        validation=task.queries(split.validation[:VALIDATION], split.train, 0, seed),
        zero_shot=task.queries(split.test[:QUERIES], split.train, 0, seed),
        few_shot=task.queries(split.test[:QUERIES], split.train, ICL_SHOTS, seed),
    )


def scores(model: Any, examples: Sequence[Any], **given: Any) -> dict[str, float]:
    """Accuracy of the exact string, and of the first token."""
    return {by: engine.evaluate(model, "", examples, by=by, **given).accuracy for by in BY}  # type: ignore[arg-type]


def measure(model: Any, task: Any, seed: int, steps: int, losses: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Records of every way to ask: {"way", "loss", "patched", "exact", "first_token"}."""
    prompts = asked(task, seed)
    known = dict(task=task.name, seed=seed)
    yield dict(known, way="zero-shot", **scores(model, prompts["zero_shot"]))
    yield dict(known, way=f"{ICL_SHOTS}-shot", **scores(model, prompts["few_shot"]))
    means = engine.mean_activations(model, prompts["many_shot"], progress=False)
    for loss in losses:
        end = END if loss == "answer and end" else ""
        searched, validation = (ended(prompts[part], end) for part in ("searched", "validation"))
        vector = engine.mtv.extract(
            model, searched, means, steps=steps, loss=cast(Scored, loss.split()[0]), seed=seed,
            validation=validation, progress=False,
        )  # fmt: skip
        for patched in PATCHED:
            given = dict(heads=vector.heads, values=vector.values, patched=patched)
            found = scores(model, prompts["zero_shot"], **given)
            yield dict(known, way="MTV", loss=loss, patched=str(patched), heads=len(vector.heads), **found)


def ended(examples: Sequence[engine.Example], end: str) -> list[engine.Example]:
    """With the end of the line as part of the answer: a loss over it asks for answers that end there."""
    return [engine.Example(example.prompt, f"{example.answer}{end}") for example in examples]


def run(names: Sequence[str], seeds: int, steps: int, losses: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """All records, kept in a file as they come: a run that is stopped goes on where it was."""
    records: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    for name in names:
        model = models.load("smollm2-eyes" if name in tasks.PICTURES else "smollm2-135m")
        task = tasks.load(name)
        for seed in range(seeds):
            if not any(one["task"] == name and one["seed"] == seed for one in records):
                records += measure(model, task, seed, steps, losses)
                write_whole(path, json.dumps(records, indent=0) + "\n")
    return records


COLUMNS = ("task", "asked", "searched by", "patched", "exact string", "first token")


def rows(records: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Means and standard deviations over seeds."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in records:
        key: tuple[str, ...] = (one["task"], one["way"], one.get("loss", ""), one.get("patched", ""))
        found.setdefault(key, []).append(one)
    return [(*key, *(_spread([one[by] for one in some]) for by in BY)) for key, some in found.items()]


def _spread(each: Sequence[float]) -> str:
    return f"{statistics.fmean(each):.2f} ± {statistics.stdev(each) if len(each) > 1 else 0:.2f}"


def table(records: Sequence[dict[str, Any]]) -> Table:
    shown = Table(*COLUMNS, title="mean over seeds, and standard deviation")
    for row in rows(records):
        shown.add_row(*row)
    return shown


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The table as it stands in docs/answers.md."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows(records)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
