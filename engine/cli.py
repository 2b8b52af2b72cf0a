"""The command line: `headpatch extract` finds a task vector, `apply` answers with it; `fv` finds a function vector."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast, get_args

try:
    import typer
except ImportError as error:
    raise SystemExit("the command line needs its extra: pip install 'headpatch[cli]'") from error
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import engine
import models
from engine import plots, tasks
from engine.answers.evaluation import Cost, Score, wilson
from engine.answers.steps import Patched
from engine.artifacts import write_whole
from engine.distributed import LostRankError, joined
from engine.experiments import DATA_SETS, EXPERIMENTS, Options, default_shots
from engine.experiments import run as run_experiment
from engine.methods import mtv
from engine.methods.estimators import Estimator
from engine.tasks.scoring import Example, Scored

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
PATCHED = "Which tokens of an answer are patched: prompt (the prompt's last), all, or so many new ones too."
out = Console()
note = Console(stderr=True)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can mend is told in one line, without a traceback; by every rank that has something to say."""
    try:
        yield
    except (ValueError, TypeError, IndexError, OSError, ImportError, LostRankError) as error:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        Console(stderr=True).print(f"{rank}[red]error:[/red] {error}", highlight=False, markup=True, soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def extract(
    model: Annotated[str, typer.Option(help="smollm2-135m, a local folder, or a hub id.")] = "smollm2-135m",
    task: Annotated[str, typer.Option(help=f"{', '.join(tasks.SHIPPED)}, or a JSONL file of input/output pairs.")] = (
        "antonyms"
    ),
    preset: Annotated[str, typer.Option(help=f"Constants of the method: {', '.join(mtv.PRESETS)}.")] = "reference",
    steps: Annotated[int | None, typer.Option(help="Search steps; default the preset's.")] = None,
    estimator: Annotated[
        str, typer.Option(help=f"Of the search's gradient: {', '.join(get_args(Estimator))}.")
    ] = "reinforce",
    rollouts: Annotated[
        int | None, typer.Option(help="Head masks tried in a step; default 32, by gates one a prompt.")
    ] = None,
    prompts_per_step: Annotated[int, typer.Option(help="Examples whose mean loss a step lowers.")] = 1,
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
    patched: Annotated[str, typer.Option(help=PATCHED)] = "prompt",
    at_once: Annotated[
        int | None, typer.Option(help="Rollouts run together; default all, shared by the ranks.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; under torchrun a GPU each.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress lines.")] = False,
) -> None:
    """Find a task vector (MTV-EXTRACT), measure it on held-out words, and save it with pictures.

    A run that is stopped, at any moment, goes on where it was when it is started again. Several processes share the
    work as `torchrun --nproc-per-node 2 -m engine extract ...`; the first of them prints and writes.
    """
    with plain_errors(), joined(device) as world:
        out.quiet = note.quiet = world.rank > 0
        _, n_steps, n_rollouts = mtv.read_options(
            preset, steps, rollouts, at_once=at_once, world=world, estimator=estimator,
            prompts_per_step=prompts_per_step,
        )  # fmt: skip
        if loss not in get_args(Scored):
            raise ValueError(f"--loss must be one of {', '.join(get_args(Scored))}, got {loss!r}")
        tokens = read_patched(patched)
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
        world.from_first(lambda: make_folder(folder))

        lm = models.load(model, device=world.device)
        if given is not None:
            given.check(lm)
        note.print(f"{lm.name}: {lm.shape}", highlight=False)
        started = time.perf_counter()
        means = engine.mean_activations(lm, many_shot, progress=not quiet, world=world)
        seconds = {"means": time.perf_counter() - started}
        note.print(f"means of {len(many_shot)} {shots}-shot prompts: {seconds['means']:.1f} s", highlight=False)

        if given is not None:
            vector = given.with_values(means)
            vector.metadata.update(heads_of=given.metadata.get("task"))
            note.print(f"{len(vector.heads)} heads of {given.metadata.get('task')}, no search", highlight=False)
        else:
            started = time.perf_counter()
            with search_line(quiet) as on_step:
                if loss != "first_token":  # the answer ends with its line
                    pool, validation = (
                        [Example(one.prompt, f"{one.answer}\n") for one in some] for some in (pool, validation)
                    )
                vector = mtv.extract(
                    lm, pool, means, preset=preset, steps=steps, estimator=cast(Estimator, estimator),
                    rollouts=rollouts, prompts_per_step=prompts_per_step, loss=cast(Scored, loss), seed=seed,
                    validation=validation,
                    checkpoint=checkpoint, at_once=at_once, progress=not quiet, on_step=on_step, world=world,
                )  # fmt: skip
            seconds["search"] = time.perf_counter() - started
            note.print(
                f"search, {n_steps} steps x {n_rollouts * prompts_per_step} rollouts: {seconds['search']:.1f} s; "
                f"{len(vector.heads)} heads, validation loss {vector.metadata['validation_loss']:.2f} nats",
                highlight=False,
            )
        base = f"{query_shots}-shot" if query_shots else "zero-shot"
        carried: dict[str, Any] = dict(heads=vector.heads, values=vector.values)
        scores = []
        for name, asked, more in (
            (base, queries, {}),
            (f"{icl_shots}-shot ICL", icl, {}),
            (f"{base} + MTV", queries, carried),
        ):
            asking: dict[str, Any] = dict(patched=tokens, progress=not quiet, world=world, **more)
            exact, first = (engine.evaluate(lm, name, asked, by=by, **asking) for by in ("exact", "first_token"))
            scores.append((exact, first, engine.cost(lm, asked, **more)))
        if world.rank > 0:
            return
        out.print(score_table(opened.name, scores))

        vector.metadata.update(task=opened.name, shots=shots, prompts=prompts, query_shots=query_shots)
        vector.save(folder / "vector.safetensors")
        title = f"{opened.name}, {lm.name}"
        plots.heatmap(folder / "heads.png", vector.probabilities, vector.mask, title)
        if given is None:
            plots.learning_curve(folder / "curve.png", vector.metadata["losses"], title)
        results = {
            "task": opened.name,
            "patched": patched,
            "scores": [
                dict(asdict(cost), name=exact.name, queries=exact.queries)
                | {one.by: dict(accuracy=one.accuracy, low=one.low, high=one.high) for one in (exact, first)}
                for exact, first, cost in scores
            ],
            "seconds": seconds,
            "heads": vector.heads,
            **vector.metadata,
        }
        write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
        checkpoint.unlink(missing_ok=True)
        for name in ("vector.safetensors", "heads.png", *(["curve.png"] if given is None else []), "results.json"):
            out.print(folder / name, highlight=False, soft_wrap=True)


@app.command()
def fv(
    model: Annotated[str, typer.Option(help="smollm2-135m, a local folder, or a hub id.")] = "smollm2-135m",
    task: Annotated[str, typer.Option(help=f"{', '.join(tasks.SHIPPED)}, or a JSONL file of input/output pairs.")] = (
        "antonyms"
    ),
    k: Annotated[int, typer.Option(help="Heads whose outputs are summed.")] = 10,
    shots: Annotated[int, typer.Option(help="Demonstrations in each prompt.")] = 10,
    prompts: Annotated[int, typer.Option(help="Clean prompts that the means are taken from.")] = 100,
    shuffled: Annotated[int, typer.Option(help="Shuffled prompts that heads are ranked on.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the split and the prompts.")] = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="Where results go; default out/TASK-fv.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress lines.")] = False,
) -> None:
    """Find a function vector, add it after every layer, and measure it on zero-shot and shuffled-label prompts.

    The layer is chosen on validation words, for each kind of prompt; the figures are of held-out words.
    """
    with plain_errors():
        opened = tasks.load(task)
        split = opened.split(seed)
        folder = Path("out") / f"{opened.name}-fv" if folder is None else folder
        make_folder(folder)
        clean = [example.prompt for example in opened.few_shot(split.train, shots, prompts, seed)]
        corrupted = opened.few_shot(split.train, shots, shuffled, seed + 1, shuffled=True)
        lm = models.load(model)
        note.print(f"{lm.name}: {lm.shape}", highlight=False)
        vector, effects = engine.fv.extract(
            lm, clean, corrupted, k=k, checkpoint=folder / "checkpoint.safetensors", progress=not quiet
        )
        table = Table(title=f"{opened.name}: first-token accuracy on {len(split.test)} held-out words, {k} heads")
        for column in ("", "without", "95% interval", "with", "95% interval", "after layer"):
            table.add_column(column, justify="right" if column else "left")
        results: dict[str, Any] = {}
        for kind in ("zero-shot", "shuffled labels"):
            held_out, validation = (
                [opened.example(pair) for pair in pairs] for pairs in (split.test, split.validation)
            )
            if kind != "zero-shot":
                held_out, validation = (
                    opened.queries(pairs, split.train, shots, seed + 2, shuffled=True)
                    for pairs in (split.test, split.validation)
                )
            layer = int(engine.fv.hits_by_layer(lm, validation, vector.vector)[:, :-1].float().mean(dim=0).argmax())
            hits = engine.fv.hits_by_layer(lm, held_out, vector.vector)
            each = hits.float().mean(dim=0).tolist()
            before, after = (wilson(int(hits[:, row].sum()), len(hits)) for row in (-1, layer))
            table.add_row(
                kind, f"{each[-1]:.2f}", _interval(before), f"{each[layer]:.2f}", _interval(after), str(layer)
            )
            results[kind] = dict(without=each[-1], by_layer=each[:-1], layer=layer, before=before, after=after)
        out.print(table)
        vector.save(folder / "vector.safetensors")
        effects.save(folder / "effects.safetensors")
        effects.heatmap(folder / "heads.png")
        lines, without = ({kind: found[key] for kind, found in results.items()} for key in ("by_layer", "without"))
        plots.by_layer(folder / "layers.png", lines, without, f"{opened.name}, {lm.name}, {k} heads")
        write_whole(folder / "results.json", json.dumps(dict(vector.metadata, heads=vector.heads, **results)) + "\n")
        for name in ("vector.safetensors", "effects.safetensors", "heads.png", "layers.png", "results.json"):
            out.print(folder / name, highlight=False, soft_wrap=True)


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.2f}-{ends[1]:.2f}"


@app.command()
def apply(
    vector: Annotated[Path, typer.Argument(help="A vector.safetensors written by `extract`.")],
    queries: Annotated[list[str], typer.Argument(help="Words to answer, or whole prompts with --raw.")],
    model: Annotated[str | None, typer.Option(help="Default: the model that the vector was made with.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the queries as whole prompts, no template.")] = False,
    values_from: Annotated[
        Path | None, typer.Option(help="The vector.safetensors of another task, whose means the heads carry.")
    ] = None,
    shot: Annotated[list[str] | None, typer.Option(help="A demonstration, as in hot=cold; may be repeated.")] = None,
    patched: Annotated[str, typer.Option(help=PATCHED)] = "prompt",
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 20,
) -> None:
    """Answer prompts from the command line with a saved task vector, and without it."""
    with plain_errors():
        loaded = engine.TaskVector.load(vector)
        if values_from is not None:
            loaded = loaded.with_values(engine.TaskVector.load(values_from).values)
        shots = [tasks.Pair(*map(str.strip, one.split("=", 1))) for one in shot or () if "=" in one.strip("= ")]
        if len(shots) < len(shot or ()) or (raw and shot):
            raise ValueError(f"expected --shot INPUT=OUTPUT, and not with --raw, got {shot}")
        lm = models.load(model or loaded.metadata["model"])
        loaded.check(lm)
        prompts = queries if raw else [tasks.Task.prompt(shots, query) for query in queries]
        options: dict[str, Any] = dict(patched=read_patched(patched), max_new_tokens=max_new_tokens, stop="\n")
        plain = engine.generate(lm, prompts, **options)
        patched = engine.generate(lm, prompts, heads=loaded.heads, values=loaded.values, **options)
        table = Table("query", "without", "with the vector", box=None)
        for row in zip(queries, plain, patched, strict=True):
            table.add_row(*(str(cell).strip() for cell in row))
        out.print(table)


@app.command()
def info(vector: Annotated[Path, typer.Argument(help="A vector.safetensors written by `extract`.")]) -> None:
    """Show what a saved task vector holds."""
    with plain_errors():
        loaded = engine.TaskVector.load(vector)
        table = Table(show_header=False, box=None)
        for key, value in loaded.metadata.items():
            if key != "losses":
                table.add_row(key, json.dumps(value) if isinstance(value, dict) else str(value))
        table.add_row("heads", f"{len(loaded.heads)}: " + ", ".join(f"{la}.{h}" for la, h in loaded.heads))
        out.print(table)


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    model: Annotated[str, typer.Option(help="smollm2-eyes, smollm2-135m, a local folder, or a hub id.")] = (
        "smollm2-eyes"
    ),
    task: Annotated[
        list[str] | None, typer.Option(help="May be repeated; default easy_vqa_colour and easy_vqa_shape.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of a data set that is not packaged, in its official layout.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Of the split, the prompts and the search: 0, 1, ...")] = 5,
    shots: Annotated[
        int | None, typer.Option(help="Demonstrations; default 8, 4 for vizwiz and okvqa, 0 for 2-way tasks.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Prompts behind the means, and examples to search on.")] = 100,
    steps: Annotated[int, typer.Option(help="Of a search.")] = 100,
    queries: Annotated[int, typer.Option(help="Held-out questions asked, as far as there are.")] = 100,
    folder: Annotated[Path | None, typer.Option("--out", help="Where results go; default out/NAME.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress lines.")] = False,
) -> None:
    """An experiment of the MTV paper: its table, pictures, every seed's scores, and a page to look at.

    A run that is stopped goes on where it was. vizwiz, okvqa, flowers and cub are `main` on that data set, with --data.
    """
    with plain_errors():
        if name not in EXPERIMENTS:
            raise ValueError(f"no experiment {name!r}: expected one of {', '.join(EXPERIMENTS)}")
        if name in DATA_SETS and (task or data is None):
            raise ValueError(f"experiment {name!r} is on its own data: expected --data FOLDER, and no --task")
        names = [name] if name in DATA_SETS else task or ["easy_vqa_colour", "easy_vqa_shape"]
        opened = [tasks.load(one, data) for one in names]
        shots = default_shots(name, opened) if shots is None else shots
        options = Options(seeds, shots, examples, steps, queries)
        folder = Path("out") / name if folder is None else folder
        make_folder(folder)
        results = run_experiment(
            name, lambda: models.load(model, device=device), opened, options, folder=folder, progress=not quiet,
            say=None if quiet else lambda line: note.print(line, highlight=False, soft_wrap=True),
        )  # fmt: skip
        rows = results.rows()
        table = Table(title=f"{name}, {results.model}, {seeds} seed{'s' if seeds > 1 else ''}")
        for column in rows[0]:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        out.print(table)
        out.print(folder / "report.html", highlight=False, soft_wrap=True)


def read_patched(patched: str) -> Patched:
    if patched in ("prompt", "all") or patched.isdigit():
        return int(patched) if patched.isdigit() else patched  # type: ignore[return-value]
    raise ValueError(f"--patched must be 'prompt', 'all' or a number of new tokens, got {patched!r}")


def make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def search_line(quiet: bool) -> Iterator[Callable[[mtv.Step], None]]:
    """A progress line with step, loss, heads on and rollouts a second."""
    shown = "{task.fields[said]}"
    columns = (TextColumn("search"), BarColumn(), TextColumn(shown), TimeElapsedColumn())
    with Progress(*columns, console=note, transient=True, disable=quiet) as progress:
        line = progress.add_task("search", total=None, said="")

        def on_step(step: mtv.Step) -> None:
            said = (
                f"step {step.step}/{step.steps}  loss {step.loss:.2f}  heads on {step.heads:.0f}  "
                f"{step.rollouts_per_second:.0f} rollouts/s"
            )
            progress.update(line, total=step.steps, completed=step.step, said=said)

        yield on_step


def score_table(task: str, scores: list[tuple[Score, Score, Cost]]) -> Table:
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
            _interval((exact.low, exact.high)),
            f"{first.accuracy:.2f}",
            f"{cost.tokens:.1f}",
            saved,
            f"{1000 * cost.seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(app())
