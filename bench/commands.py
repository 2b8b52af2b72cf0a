"""Subcommands: a measurement each, which prints a table and, last, one JSON line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import models
from bench import answers as answers_case
from bench import by_site
from bench import contrasts as contrasts_case
from bench import edges as edges_case
from bench import estimators as estimators_case
from bench import exactness as exactness_case
from bench import families as families_case
from bench import generation as generation_case
from bench import memory as memory_case
from bench import pictures as pictures_case
from bench import positions as positions_case
from bench import questions as questions_case
from bench import search as search_case
from bench import sites as sites_case
from bench import survey as survey_case
from bench import sweeps as sweeps_case
from bench import weights as weights_case
from bench.machine import describe
from engine.artifacts import write_whole
from engine.tasks import CONTRASTS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
out = Console(width=140)


def read_names(option: str, text: str, known: Sequence[str] | dict[str, Any] | None = None) -> list[str]:
    """Names separated by commas, each of them known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if known is not None and name not in known]
    if unknown or not names:
        expected = f"of {', '.join(known)}" if known is not None else "at least one name"
        raise typer.BadParameter(f"{option}: expected {expected}, got {text!r}")
    return names


def read_numbers(option: str, text: str) -> list[int]:
    names = read_names(option, text)
    if not all(name.isdecimal() and int(name) > 0 for name in names):
        raise typer.BadParameter(f"{option}: expected positive integers separated by commas, got {text!r}")
    return [int(name) for name in names]


@app.command(hidden=True)
def memory_child() -> None:
    """Peaks, in the process that the suite starts for them; what is asked comes as JSON on standard input."""
    memory_case.serve(sys.stdin.read())


def _show(case: str, title: str, result: dict[str, Any]) -> None:
    table = Table(show_header=False, title=title)
    for key, value in result.items():
        table.add_row(key, sweeps_case.number(value))
    out.print(table)
    _record(case, [result])


@app.command()
def search(model: str = "smollm2-135m", task: str = "antonyms", steps: int = 100) -> None:
    """The whole MTV search against the loop of hooked forwards."""
    result = search_case.measure(models.load(model), task, steps)
    _show("search", f"MTV search, {model}", result)


@app.command()
def sweeps(model: str = "smollm2-135m", task: str = "antonyms", prompts: int = 25, rounds: int = 5) -> None:
    """A function vector's sweep against the loop; layered against packed rows; attribution against the sweep."""
    result = sweeps_case.measure(models.load(model), task, prompts=prompts, rounds=rounds)
    out.print(sweeps_case.table(result))
    _record("sweeps", [result])


@app.command()
def pictures(model: str = "smollm2-eyes", rounds: int = 5) -> None:
    """32 rollouts on a prompt of three pictures against 32 naive forwards."""
    result = pictures_case.measure(models.load(model), rounds=rounds)
    _show("pictures", f"32 rollouts, three pictures, {model}", result)


@app.command()
def generation(model: str = "smollm2-135m", rows: int = 32, tokens: int = 128, rounds: int = 5) -> None:
    """20 tokens of 32 rows patched at the prompt's last token, against transformers' generate on as many copies."""
    result = generation_case.measure(models.load(model), rows, tokens, rounds=rounds)
    _show("generation", f"{rows} answers of 20 tokens, {model}", result)


@app.command()
def positions(model: str = "smollm2-135m", rounds: int = 3) -> None:
    """Sweeps over all heads by where the prompt is patched, and means, against the loop of hooks."""
    result = positions_case.measure(models.load(model), rounds=rounds)
    _show("positions", f"the loop over ours, {model}", result)


@app.command()
def sites(model: str = "smollm2-135m", rounds: int = 3, tokens: int = 512) -> None:
    """32 rows of every site against the loop of hooked forwards."""
    result = sites_case.rows(models.load(model), tokens=tokens, rounds=rounds)
    _show("sites", f"32 rows, T={tokens}: the loop over ours, {model}", result)


@app.command()
def questions(model: str = "smollm2-135m", rounds: int = 3) -> None:
    """Causal tracing, heads at all tokens, path patching and faithfulness against loops of hooked forwards."""
    opened = models.load(model)
    for ask in (questions_case.trace, questions_case.heads, questions_case.paths, questions_case.curve):
        _show(ask.__name__, f"{ask.__name__}, {model}", ask(opened, rounds=rounds))


@app.command()
def circuits(
    model: str = "smollm2-135m",
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
    pairs: Annotated[int, typer.Option(help="To rank on, and as many others to keep circuits on.")] = 5,
) -> None:
    """CPR and CMD of circuits of IOI by what ranks their heads, or edges: on pairs that the ranking did not see."""
    result = questions_case.areas(models.load(model), range(seeds), pairs)
    out.print(questions_case.table(result))
    _record("circuits", result)


@app.command()
def edges(
    model: str = "smollm2-135m",
    prompts: int = 20,
    steps: int = 5,
    exact: Annotated[int, typer.Option(help="Edges that are run, drawn from all.")] = 500,
    compared: Annotated[int, typer.Option(help="Prompts of which they are run, the first.")] = 3,
) -> None:
    """Edge attribution of pairs of prompts: seconds, peak memory, and rank correlation with edges that are run."""
    result = edges_case.measure(models.load(model), prompts, steps, exact, compared)
    _show("edges", f"edges, {prompts} pairs, {steps} steps, {model}", result)


@app.command()
def weights(
    tokens: Annotated[str, typer.Option(help="Lengths, separated by commas.")] = "4,16,64",
    samples: int = 64,
    vectors: int = 8,
    rank: Annotated[int, typer.Option(help="Of the vectors; 0: whole.")] = 0,
    rounds: int = 5,
) -> None:
    """Weights of each sample's own against loops that merge sample by sample, and the plain forward."""
    for count in read_numbers("--tokens", tokens):
        result = weights_case.measure(count, samples, vectors, rank, rounds)
        _show("weights", f"weights of each sample's own, {count} tokens", result)


@app.command()
def estimators(
    model: str = "smollm2-135m",
    names: Annotated[str, typer.Option("--tasks", help="Separated by commas.")] = ",".join(estimators_case.NAMES),
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 5,
    ways: Annotated[str, typer.Option(help="Separated by semicolons.")] = ";".join(estimators_case.WAYS),
) -> None:
    """Model tokens that each gradient estimate of the MTV search needs to reach what 300 steps of REINFORCE reach."""
    chosen = [way.strip() for way in ways.split(";")]
    if unknown := [way for way in chosen if way not in estimators_case.WAYS]:
        raise typer.BadParameter(f"--ways: expected of {'; '.join(estimators_case.WAYS)}, got {unknown}")
    if seeds < 1:
        raise typer.BadParameter(f"--seeds must be at least 1, got {seeds}")
    result = estimators_case.measure(models.load(model), read_names("--tasks", names), range(seeds), chosen)
    out.print(estimators_case.table(result))
    _record("estimators", [result])


@app.command()
def answers(
    names: Annotated[str, typer.Option("--tasks", help="Separated by commas.")] = ",".join(answers_case.WORDS),
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 5,
    steps: Annotated[int, typer.Option(help="Of a search.")] = 100,
    losses: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(answers_case.LOSSES),
    path: Annotated[Path, typer.Option("--out", help="Records, kept as they come.")] = Path("out/answers.json"),
    write: Annotated[Path | None, typer.Option(help="A file for the table, as Markdown.")] = None,
) -> None:
    """Exact strings and first tokens by which tokens are patched, and by the loss that heads are searched by."""
    records = answers_case.run(names.split(","), seeds, steps, losses.split(","), path)
    out.print(answers_case.table(records))
    if write is not None:
        write_whole(write, answers_case.markdown(records))


@app.command()
def contrasts(
    model: str = "smollm2-135m",
    names: Annotated[str, typer.Option("--tasks", help="Separated by commas.")] = ",".join(CONTRASTS),
    count: Annotated[int, typer.Option(help="Pairs of a task and seed.")] = 50,
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
) -> None:
    """Logit differences of the shipped contrasts: can the model do them?"""
    records = contrasts_case.measure(models.load(model), read_names("--tasks", names, CONTRASTS), count, seeds)
    print(contrasts_case.markdown(records))
    _record("contrasts", records)


@app.command()
def exactness() -> None:
    """Largest logit differences to naive and to float64."""
    results = exactness_case.measure()
    table = Table(title="largest absolute logit difference, 32 random masks")
    for key in results[0]:
        table.add_column(key)
    for result in results:
        table.add_row(*(f"{v:.1e}" if isinstance(v, float) else str(v) for v in result.values()))
    out.print(table)
    _record("exactness", results)


@app.command()
def families(
    only: Annotated[str, typer.Option(help="Families, separated by commas; default all.")] = "",
    backends: Annotated[str, typer.Option(help="Backends, separated by commas.")] = ",".join(families_case.BACKENDS),
    write: Annotated[Path | None, typer.Option(help="A Markdown file for the table.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All of transformers' architectures that can be small.")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="Every site, in float32.")] = False,
) -> None:
    """Every family and strategy against naive (float32) and float64 (bfloat16), on tiny random models.

    --all: every architecture of transformers against plain hooked forwards, by the ways that `auto` takes.
    """
    if every:
        looked = survey_case.survey(only.split(",") if only else ())
        print(survey_case.markdown(looked))
        out.print(survey_case.tally(looked))
        if write:
            write_whole(write, survey_case.markdown(looked))
        _record("architectures", [asdict(one) for one in looked])
        raise typer.Exit(not all(one.right for one in looked))
    if sites:
        seen = by_site.measure(only.split(",") if only else (), backends.split(","))
        text, wrong = by_site.markdown(seen), [cell for cell in seen if not cell.exact]
        print(text)
        out.print(
            f"{len(seen)} cells, {sum(bool(c.refused) for c in seen)} not there; beyond {families_case.LIMIT}: {wrong}"
        )
        if write:
            write_whole(write, text)
        _record("sites by family", [asdict(cell) for cell in seen])
        raise typer.Exit(bool(wrong))
    found = families_case.measure(only.split(",") if only else None, backends.split(","))
    table = Table("family", *families_case.STRATEGIES, title="largest logit difference to naive (bf16: over naive's)")
    for one in dict.fromkeys((cell.family, cell.backend) for cell in found):
        table.add_row(*one, *(str(cell) for cell in found if (cell.family, cell.backend) == one))
    out.print(table)
    exact = [cell for cell in found if cell.exact]
    worst = max((cell for cell in found if not cell.refused), key=lambda cell: cell.difference)
    out.print(
        f"{len(exact)} cells exact, {sum(bool(c.refused) for c in found)} refused, of {len(found)}; worst: {worst}"
    )
    if write:
        write_whole(write, families_case.markdown(found))
    _record("families", [asdict(cell) for cell in found])


def _record(case: str, results: Any) -> None:
    print(json.dumps({"case": case, "results": results, "machine": describe()}))
