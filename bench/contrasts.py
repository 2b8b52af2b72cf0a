"""Which of the shipped contrasts a model can do: its logit differences on the clean and on the corrupted prompts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from engine import tasks
from models import Model

COLUMNS = ("task", "clean", "corrupted", "clean above 0", "clean above corrupted", "target the likeliest token")


def measure(model: Model, names: Iterable[str], count: int, seeds: int) -> list[dict[str, Any]]:
    """A record a task and seed: mean logit differences, and shares of the pairs."""
    records = []
    for name in names:
        for seed in range(seeds):
            pairs = tasks.contrast(name, model, count, seed)  # type: ignore[arg-type]
            clean, corrupted = pairs.differences(model)
            hits = tasks.first_token_hits(model, list(zip(pairs.prompts, pairs.targets, strict=True)))
            found = (clean, corrupted, clean > 0, clean > corrupted, hits)
            means = dict(zip(COLUMNS[1:], (x.float().mean().item() for x in found), strict=True))
            records.append({"task": name, "seed": seed, "pairs": count, **means})
    return records


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The table as it stands in docs/tasks.md: means over seeds, and the least and the most of a seed."""
    lines: list[Sequence[str]] = [COLUMNS, ["---"] * len(COLUMNS)]
    for name in dict.fromkeys(record["task"] for record in records):
        some = [[record[column] for column in COLUMNS[1:]] for record in records if record["task"] == name]
        by_column = zip(*some, strict=True)
        lines.append([name, *(f"{statistics.fmean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in by_column)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
