"""Every task, every seed: finished parts are kept and not done again; then table, pictures and page."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from engine import plots
from engine.answers.evaluation import wilson
from engine.artifacts import TaskVector, versions, write_whole
from engine.core.reading import check_model
from engine.experiments import report
from engine.experiments.methods import methods
from engine.experiments.paper import EXPERIMENTS, FOUR, baselines, main
from engine.experiments.parts import part
from engine.experiments.setting import AnyTask, Options, Record, Setting
from models import Model

# The vector of seed 0 whose heads are drawn; "mtv" for the others.
SHOWN = {"one_shot": "one-shot", "order": "order-0", "scaling": "of-100"}
SAMPLES = 8  # held-out questions of a page whose answers are shown
MEASURES = {
    "accuracy": "accuracy",
    "exact": "exact string",
    "within": "among the labels",
    "distance": "distance to few-shot",
    "heads": "heads patched",
    "tokens": "tokens a query",
    "milliseconds": "ms a query",
    "memory_mib": "MiB a query",
    "search_tokens": "model tokens to find it",
    "prompt_tokens": "of these, for means or states",
    "search_seconds": "seconds to find it",
}


@dataclass(frozen=True)
class Results:
    """What an experiment found.

    records: of every task, seed and way to ask: its scores. folder: where the files are.
    """

    name: str
    model: str
    options: Options
    records: list[Record]
    folder: Path

    def rows(self) -> list[dict[str, str]]:
        """The table: a row for each task and way, mean and standard deviation over seeds; of one seed its interval."""
        import pandas as pd

        frame, rows = pd.DataFrame(self.records), []
        shown = [measure for measure in MEASURES if measure in frame and frame[measure].notna().any()]
        for (task, way), found in frame.groupby(["task", "way"], sort=False):
            row = {"task": str(task), "way": str(way)}
            for measure in shown:
                row[MEASURES[measure]] = _cell(
                    measure, found[measure].dropna().astype(float).tolist(), int(found["queries"].iloc[0])
                )
            if "memory" in found:
                row["memory counted"] = str(found["memory"].iloc[0])
            rows.append(row)
        return rows


def _shown(record: Record) -> str:
    """Of a progress line."""
    return f"{record['accuracy']:.2f}" if "accuracy" in record else f"{record['milliseconds']:.0f} ms"


def _cell(measure: str, values: Sequence[int | float], queries: int) -> str:
    """0.85 ± 0.03; of one seed 0.85 (0.77-0.91), the 95% Wilson interval (wide for scores between 0 and 1)."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    if measure == "distance":
        return f"{mean:.2f}"
    if measure not in ("accuracy", "exact", "within"):
        return f"{mean:,.0f}" if measure.endswith("_tokens") else f"{mean:.1f}"
    if len(values) == 1:
        low, high = wilson(round(mean * queries), queries)
        return f"{mean:.2f} ({low:.2f}-{high:.2f})"
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.2f} ± {deviation:.2f}"


def run(
    name: str,
    model: Model | Callable[[], Model],
    tasks: Sequence[AnyTask],
    options: Options | None = None,
    *,
    folder: str | Path,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Run an experiment of the paper on tasks, for each seed, and write its files.

    name:     of `EXPERIMENTS`. tasks: from `engine.tasks.load`; "transfer" takes two or more.
    model:    or a function that opens it, called when everything else is checked.
    options:  seeds and sizes, default `Options()`.
    folder:   gets results.json (every seed's scores), scores.png and more pictures, report.html, vectors/ and parts/.
              Parts and vectors that are there are not done again if model, data and sizes agree.
    progress: bars, default shown. say: called with a line after every part, default nobody.

    Raises ValueError for an unknown name, no task, one task where two are compared, fewer shots than asked for; OSError
    if the folder cannot be written. All before the model is opened.

    Source: Multimodal Task Vectors (arXiv 2406.15334), section 4 and appendix A.

    >>> small = engine.experiments.Options(seeds=1, shots=1, examples=2, steps=1, queries=2)
    >>> tasks = [engine.tasks.load("antonyms")]
    >>> results = engine.experiments.run("main", model, tasks, small, folder="main", progress=False)
    >>> [record["way"] for record in results.records]
    ['zero-shot', '1-shot ICL', 'zero-shot + MTV', 'zero-shot + random heads']
    """
    if isinstance(model, nn.Module):  # which can be called, too
        check_model(model)
    options, folder = options or Options(), Path(folder)
    _check(name, tasks, options)
    folder.mkdir(parents=True, exist_ok=True)
    opened = model() if callable(model) and not isinstance(model, Model) else model
    check_model(opened)
    records: list[Record] = []
    samples: dict[str, list[dict[str, str]]] = {}
    for task in tasks:
        for seed in range(options.seeds):
            started = time.perf_counter()
            setting = Setting(opened, task, seed, options, folder, tuple(tasks), progress)
            done = _done(name, setting)
            records += done["records"]
            if seed == 0:
                samples[task.name] = done["samples"]
            if say:
                said = ", ".join(f"{record['way']} {_shown(record)}" for record in done["records"])
                say(f"{task.name}, seed {seed}: {said} ({time.perf_counter() - started:.0f} s)")
    results = Results(name, opened.name, options, records, folder)
    _write(results, tasks, samples)
    return results


def _check(name: str, tasks: Sequence[AnyTask], options: Options) -> None:
    """Everything that can be wrong, before the model is opened: all prompts can be drawn."""
    if name not in EXPERIMENTS:
        raise ValueError(f"no experiment {name!r}: expected one of {', '.join(EXPERIMENTS)}")
    names = [task.name for task in tasks]
    if len(names) < (least := 2 if name == "transfer" else 1) or len(set(names)) < len(names):
        raise ValueError(f"experiment {name!r} needs {least} or more tasks, each once, got {names}")
    if name == "order" and options.shots < 2:
        raise ValueError(f"experiment 'order' permutes demonstrations: expected shots >= 2, got {options.shots}")
    if name == "methods" and options.shots < 1:
        raise ValueError(f"experiment 'methods' needs few-shot prompts: expected shots >= 1, got {options.shots}")
    most = max(options.shots, FOUR if name == "one_shot" else 1)
    for task in tasks:
        for seed in range(options.seeds):
            split: Any = task.split(seed)
            if not split.test or not split.train:
                raise ValueError(
                    f"task {task.name!r} has {len(split.train)} questions to train on and {len(split.test)} held out"
                )
            task.few_shot(split.train, most, options.examples, seed)
            task.queries(split.train[: options.examples], split.train, most, seed)
            task.queries(split.test[: options.queries], split.train, most, seed)


def _done(name: str, setting: Setting) -> dict[str, Any]:
    """One task at one seed: from its file if that agrees, else done and written there."""
    path = setting.folder / "parts" / f"{name}-{setting.task.name}-{setting.seed}.json"
    compared = setting.tasks if name == "transfer" else ()
    data = {task.name: replace(setting, task=task).identity["data"] for task in compared}
    identity = {"experiment": name, "compared": data, **setting.identity}
    shows = setting.seed == 0 and EXPERIMENTS[name] in (main, baselines, methods)

    def make() -> dict[str, Any]:
        records = [dict(task=setting.task.name, seed=setting.seed) | record for record in EXPERIMENTS[name](setting)]
        return dict(records=records, samples=_samples(setting) if shows else [])

    return part(path, identity, make)


def _samples(setting: Setting) -> list[dict[str, str]]:
    """Generated answers to a few held-out questions, by way to ask (the paper's Figure 2).

    One of the labels is the whole answer: a patched model says it again at every token that is patched.
    """
    labels = [label.strip() for label in getattr(setting.task, "labels", ())]
    base, shots, vector = setting.asked(0), setting.options.shots, setting.vector()
    asked: dict[str, tuple[int, dict[str, Any]]] = {base: (0, {})}
    if shots:
        asked[f"{setting.asked(shots)} ICL"] = (shots, {})
    asked[f"{base} + MTV"] = (0, dict(heads=vector.mask, values=vector.values))
    found: list[dict[str, str]] = [{} for _ in setting.held_out[:SAMPLES]]
    for way, (n, patched) in asked.items():
        prompts = [example.prompt for example in setting.queries(n)[:SAMPLES]]
        for (answer,), of in zip(setting.answers(prompts, **patched), found, strict=True):
            said = answer.strip()
            of[way] = next((label for label in labels if re.match(rf"{re.escape(label)}\b", said)), said)
    return found


def _write(results: Results, tasks: Sequence[AnyTask], samples: dict[str, list[dict[str, str]]]) -> None:
    """All files of the folder that are no parts."""
    name, folder, records = results.name, results.folder, results.records
    said = dict(
        experiment=name, model=results.model, options=asdict(results.options), tasks=[task.name for task in tasks],
        records=records, table=results.rows(), versions=versions(),
    )  # fmt: skip
    write_whole(folder / "results.json", json.dumps(said, indent=1) + "\n")
    title, pictures = f"{name}, {results.model}", {}
    measures = [
        measure
        for measure in ("accuracy", "exact", "milliseconds", "memory_mib")
        if records[0].get(measure) is not None
    ]
    for measure in measures:
        path = folder / ("scores.png" if measure == "accuracy" else f"{measure}.png")
        values: dict[str, dict[str, list[float]]] = {}
        for record in records:
            if "examples" not in record:
                values.setdefault(record["task"], {}).setdefault(record["way"], []).append(record[measure])
        plots.scores(path, values, MEASURES[measure], title)
        pictures[path] = f"{MEASURES[measure]} of each way to ask, by task"
    if name == "scaling":
        curves: dict[str, dict[int, list[float]]] = {}
        for record in records:
            if "examples" in record:
                curves.setdefault(record["task"], {}).setdefault(record["examples"], []).append(record["accuracy"])
        plots.scaling(folder / "scaling.png", curves, title)
        pictures[folder / "scaling.png"] = "accuracy by the number of examples behind the mean activations"
    for task in tasks:
        path = folder / "vectors" / f"{task.name}-0-{SHOWN.get(name, 'mtv')}.safetensors"
        if path.is_file():
            vector = TaskVector.load(path)
            heads, curve = folder / f"heads-{task.name}.png", folder / f"curve-{task.name}.png"
            plots.heatmap(heads, vector.probabilities, vector.mask, f"{task.name}, {results.model}")
            plots.learning_curve(curve, vector.metadata["losses"], f"{task.name}, {results.model}")
            pictures[heads] = f"{task.name}: probability of each head to be patched, by layer and head; dots: chosen"
            pictures[curve] = f"{task.name}: loss of the search, step by step"
    asked = {task.name: list(zip(task.split(0).test, samples[task.name], strict=False)) for task in tasks}
    page = report.page(name, results.model, asdict(results.options), results.rows(), asked, pictures)
    write_whole(folder / "report.html", page)
