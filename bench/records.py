"""One record a provider and cell; all of them as CSV, as JSON, and back."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.artifacts import write_whole

KEY = ("case", "provider", "shape", "tokens", "rows", "dtype", "device", "backend")
# What other ways' times are divided by this one's, or this one's by theirs, round by round.
LOOPS = ("hooks", "naive")
FORWARDS = ("one stock forward", "one forward")


@dataclass
class Record:
    """What was found of one way to do one thing.

    status:         "measured"; "wrong", disagrees with the oracle and is not timed; "cannot", "not installed",
                    "skipped", "failed": why is in `reason`.
    apart:          from the oracle, as a share of its answer.
    rows_run:       rows that a round ran; `seconds` are scaled from them to all rows.
    seconds:        of each round.
    computed:       tokens through the linear layers, a row.
    memory:         MiB beyond the weights, at the peak of a call with `rows_run` rows.
    prefill_floor, row_floor, floor: seconds that the machine cannot go below, for the prompt but its last token, for
                    one token of every row, and for the whole call.
    speedup:        the loops' seconds over these, quartiles; a loop's own is 1.
    cost:           these seconds over those of one unpatched forward, quartiles.
    """

    case: str
    provider: str
    shape: str
    tokens: int
    rows: int
    dtype: str
    device: str
    backend: str
    status: str = "measured"
    reason: str = ""
    apart: float | None = None
    rows_run: int | None = None
    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    low: float | None = None
    high: float | None = None
    rows_per_second: float | None = None
    computed: float | None = None
    memory: float | None = None
    prefill_floor: float | None = None
    row_floor: float | None = None
    floor: float | None = None
    percent_of_floor: float | None = None
    speedup: dict[str, dict[str, float]] = field(default_factory=dict)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)

    @property
    def baseline(self) -> bool:
        """Not a way to patch, but what stands beside them."""
        return self.provider in FORWARDS


@dataclass
class Results:
    """A run: where it was made, how fast that machine multiplies and copies, and its records."""

    machine: dict[str, Any]
    rates: list[dict[str, Any]]
    settings: dict[str, Any]
    records: list[Record]


def to_json(results: Results, samples: bool = True) -> str:
    """Without samples it is one compact line."""
    whole = asdict(results)
    if samples:
        return json.dumps(whole, indent=1)
    for record in whole["records"]:
        del record["seconds"]
        for name in [name for name, value in record.items() if value in (None, "", {})]:
            del record[name]
        for name, value in record.items():
            record[name] = _rounded(value)
    return json.dumps(whole, separators=(",", ":"))


def to_csv(records: Sequence[Record]) -> str:
    """A line a record, the quartiles of a ratio as columns of their own; samples are in the JSON."""
    plain = [f.name for f in fields(Record) if f.name not in ("seconds", "speedup", "cost")]
    ratios = [(kind, other) for kind, others in (("speedup", LOOPS), ("cost", FORWARDS)) for other in others]
    columns = [f"{kind} {other} {q}" for kind, other in ratios for q in ("median", "low", "high")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*plain, *columns])
    for record in records:
        found = [getattr(record, kind).get(other, {}) for kind, other in ratios]
        quartiles = [one.get(q, "") for one in found for q in ("median", "low", "high")]
        writer.writerow([*("" if getattr(record, n) is None else getattr(record, n) for n in plain), *quartiles])
    return out.getvalue()


def save(folder: str | Path, results: Results) -> None:
    write_whole(Path(folder) / "bench.json", to_json(results) + "\n")
    write_whole(Path(folder) / "bench.csv", to_csv(results.records))


def load(path: str | Path) -> Results:
    """Raises FileNotFoundError, or ValueError for a file that is not one of these."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        whole = json.loads(Path(path).read_text())
        return Results(**{**whole, "records": [Record(**record) for record in whole["records"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not what `python -m bench` writes (bench.json): {error}") from error


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value
