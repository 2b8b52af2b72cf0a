"""`headpatch extract`: a task vector found, measured on held-out words, and saved with pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_args

import typer
from rich.table import Table

import engine
import models
from engine import plots, tasks
from engine.answers.evaluation import Cost, Score
from engine.artifacts import write_whole
from engine.cli import console
from engine.cli.console import ModelName, PatchedTokens, Quiet, TaskName, interval, note, out, say
from engine.distributed import joined
from engine.methods import mtv
from engine.methods.estimators import ESTIMATORS
from engine.tasks.scoring import Example, Scored

# Of one way of asking: whole answers, their first tokens, what a query costs.
Measured: TypeAlias = tuple[Score, Score, Cost]


def extract(
    model: ModelName = "smollm2-135m",
    task: TaskName = "antonyms",
    preset: Annotated[str, typer.Option(help=f"Constants of the method: {', '.join(mtv.PRESETS)}.")] = "reference",
    steps: Annotated[int | None, typer.Option(help="Search steps; default the preset's.")] = None,
    estimator: Annotated[str, typer.Option(help=f"Of the search's gradient: {', '.join(ESTIMATORS)}.")] = "reinforce",
    rollouts: Annotated[
        int | None, typer.Option(help="Head masks tried in a step; default 32, by gates one a prompt.")
    ] = None,
    prompts_per_step: Annotated[int, typer.Option(help="Examples whose mean loss a step lowers.")] = 1,
    lr: Annotated[float, typer.Option(help="Of Adam; by gates with thresholds 0.2 takes fewer steps.")] = 0.1,
    candidates: Annotated[
        str, typer.Option(help="What the end chooses among: draws, or heads above thresholds of probability.")
    ] = "draws",
    shots: Annotated[int, typer.Option(help="Demonstrations in each prompt that the means are taken from.")] = 8,
    prompts: Annotated[int, typer.Option(help="Number of such prompts, and of examples to search on.")] = 100,
    icl_shots: Annotated[int, typer.Option(help="Demonstrations of the few-shot baseline.")] = 5,
    query_shots: Annotated[int, typer.Option(help="Demonstrations before each query that is patched.")] = 0,
    heads_from: Annotated[
        Path | None, typer.Option(help="A vector.safetensors of another task: its heads, no search.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the prompts and the search.")] = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="Where results go; default out/TASK.")] = None,
    loss: Annotated[
        str, typer.Option(help=f"Of an answer (and its line's end), to search by: {', '.join(get_args(Scored))}.")
    ] = ("first_token"),
    patched: PatchedTokens = "prompt",
    at_once: Annotated[
        int | None, typer.Option(help="Rollouts run together; default all, shared by the ranks.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; under torchrun a GPU each.")] = "cpu",
    quiet: Quiet = False,
) -> None:
    """Find a task vector (MTV-EXTRACT), measure it on held-out words, and save it with pictures.

    A run that is stopped, at any moment, goes on where it was when it is started again. Several processes share the
    work as `torchrun --nproc-per-node 2 -m engine extract ...`; the first of them prints and writes.
    """
    with console.plain_errors(), joined(device) as world:
        out.quiet = note.quiet = world.rank > 0
        searching: dict[str, Any] = dict(
            preset=preset, steps=steps, estimator=estimator, rollouts=rollouts, prompts_per_step=prompts_per_step,
            lr=lr, candidates=candidates, seed=seed, at_once=at_once, world=world,
        )  # fmt: skip
        options = mtv.read_options(**searching)
        if loss not in get_args(Scored):
            raise ValueError(f"--loss must be one of {', '.join(get_args(Scored))}, got {loss!r}")
        tokens = console.read_patched(patched)
        given = None if heads_from is None else engine.TaskVector.load(heads_from)
        opened = tasks.load(task)
        split = opened.split(seed)
        folder = Path("out") / opened.name if folder is None else folder
        checkpoint = folder / "checkpoint.safetensors"
        many_shot = [example.prompt for example in opened.few_shot(split.train, shots, prompts, seed)]
        pool, validation, queries, icl = (
            opened.queries(asked, split.train, n, seed)
            for asked, n in (
                (split.train[:prompts], query_shots),
                (split.validation[:50], query_shots),
                (split.test, query_shots),
                (split.test, icl_shots),
            )
        )
        world.from_first(lambda: console.make_folder(folder))

        lm = models.load(model, device=world.device)
        if given is not None:
            given.check(lm)
        say(f"{lm.name}: {lm.shape}")
        started = time.perf_counter()
        means = engine.mean_activations(lm, many_shot, progress=not quiet, world=world)
        seconds = {"means": time.perf_counter() - started}
        say(f"means of {len(many_shot)} {shots}-shot prompts: {seconds['means']:.1f} s")

        if given is not None:
            vector = given.with_values(means)
            vector.metadata.update(heads_of=given.metadata.get("task"))
            say(f"{len(vector.heads)} heads of {given.metadata.get('task')}, no search")
        else:
            started = time.perf_counter()
            if loss != "first_token":  # the answer ends with its line
                pool, validation = (
                    [Example(one.prompt, f"{one.answer}\n") for one in some] for some in (pool, validation)
                )
            with console.search_line(quiet) as on_step:
                searching |= dict(loss=loss, validation=validation, checkpoint=checkpoint, on_step=on_step)
                vector = mtv.extract(lm, pool, means, progress=not quiet, **searching)
            seconds["search"] = time.perf_counter() - started
            say(
                f"search, {options.steps} steps x {options.rollouts * prompts_per_step} rollouts: "
                f"{seconds['search']:.1f} s; {len(vector.heads)} heads, "
                f"validation loss {vector.metadata['validation_loss']:.2f} nats"
            )
        base = f"{query_shots}-shot" if query_shots else "zero-shot"
        ways: list[tuple[str, list[Example], dict[str, Any]]] = [
            (base, queries, {}),
            (f"{icl_shots}-shot ICL", icl, {}),
            (f"{base} + MTV", queries, dict(heads=vector.heads, values=vector.values)),
        ]
        scores: list[Measured] = []
        for name, asked, carried in ways:
            asking: dict[str, Any] = dict(patched=tokens, progress=not quiet, world=world, **carried)
            exact, first = (engine.evaluate(lm, name, asked, by=by, **asking) for by in ("exact", "first_token"))
            scores.append((exact, first, engine.cost(lm, asked, **carried)))
        if world.rank > 0:
            return
        out.print(_table(opened.name, scores))
        vector.metadata.update(task=opened.name, shots=shots, prompts=prompts, query_shots=query_shots)
        results = {"task": opened.name, "patched": patched, "scores": list(_plain(scores)), "seconds": seconds}
        _save(folder, vector, results, title=f"{opened.name}, {lm.name}", curve=given is None)
        checkpoint.unlink(missing_ok=True)


def _save(folder: Path, vector: engine.TaskVector, results: dict[str, Any], title: str, curve: bool) -> None:
    """The vector, its pictures and all figures; the curve only where there was a search."""
    vector.save(folder / "vector.safetensors")
    plots.heatmap(folder / "heads.png", vector.probabilities, vector.mask, title)
    if curve:
        plots.learning_curve(folder / "curve.png", vector.metadata["losses"], title)
    results = {**results, "heads": vector.heads, **vector.metadata}
    write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    console.list_files(folder, ["vector.safetensors", "heads.png", *(["curve.png"] if curve else []), "results.json"])


def _plain(scores: Iterable[Measured]) -> Iterable[dict[str, Any]]:
    """As JSON."""
    for exact, first, cost in scores:
        both = {one.by: dict(accuracy=one.accuracy, low=one.low, high=one.high) for one in (exact, first)}
        yield dict(asdict(cost), name=exact.name, queries=exact.queries) | both


def _table(task: str, scores: list[Measured]) -> Table:
    """Accuracy of whole answers and of first tokens, cost a query, tokens saved beside few-shot, of each way."""
    few_shot = max(cost.tokens for *_, cost in scores)
    table = Table(title=f"{task}: {scores[0][0].queries} held-out words")
    for column in ("", "exact", "95% interval", "first token", "tokens", "saved", "ms"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for exact, first, cost in scores:
        saved = f"{1 - cost.tokens / few_shot:.0%}" if cost.tokens < few_shot else ""
        table.add_row(
            exact.name,
            f"{exact.accuracy:.2f}",
            interval((exact.low, exact.high)),
            f"{first.accuracy:.2f}",
            f"{cost.tokens:.1f}",
            saved,
            f"{1000 * cost.seconds:.0f}",
        )
    return table
