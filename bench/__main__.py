"""Ways to patch, compared with the oracle and then timed: a table a case, `bench.csv`, `bench.json` and a picture in
`--out`, and one JSON line last. Subcommands measure what is not a grid.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer

from bench import compare as compare_runs
from bench import records as records_of
from bench import report
from bench.cases import CASES
from bench.commands import app, out, read_names, read_numbers
from bench.providers import PROVIDERS
from bench.shapes import SHAPES
from bench.suite import TOLERANCE, Settings, grid
from bench.suite import run as run_suite
from models.opening import Backend

DTYPES = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
# Lengths and numbers of rows: at the first of either the other is varied.
TOKENS, ROWS = "512,32,128,600,2000,2048,4096", "32,1,4,8,64,128,256"
QUICK = {
    "rollouts": ("32,128", "32,8"),
    "reused": ("128", "32"),
    "sweep": ("32", "32"),
    "means": ("32", "8"),
    "search": ("32", "32"),
    "generate": ("32", "8"),
}
QUICK_SETTINGS = Settings(rounds=8, loop_rows=1, patience=0.9, budget=6, memory=1, memory_cases=("rollouts",))


@app.callback(invoke_without_command=True, help=__doc__)
def suite(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Small cells, for a laptop: under three minutes.")] = False,
    compare: Annotated[
        Path | None, typer.Option(help="A bench.json of an earlier run; give --rounds, 8 or so, to both.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for bench.csv, bench.json, bench.png.")] = Path(
        "out/bench"
    ),
    cases: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(CASES),
    providers: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(PROVIDERS),
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}. Default 135m; on a GPU 135m,1b,8b.")] = "",
    tokens: Annotated[str, typer.Option(help=f"Prompt lengths; rows vary at the first. Default {TOKENS}.")] = "",
    rows: Annotated[str, typer.Option(help=f"Lengths vary at the first. Default {ROWS}.")] = "",
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(DTYPES)}. Default float32; on a GPU bfloat16.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, or both. Default: the GPU if there is one.")] = "",
    backend: Annotated[str, typer.Option(help="That runs naive and this engine.")] = "huggingface",
    rounds: Annotated[
        int | None, typer.Option(help="Of each way, interleaved. Default 9 or, where they take long, fewer.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Also the peak memory.")] = True,
) -> None:
    """The suite. A way whose name carries a star ran some of its rows, and its time is scaled to all."""
    if context.invoked_subcommand is not None:
        return
    devices = read_names("--device", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = all(name.startswith("cuda") for name in devices)
    on = (
        read_names("--shapes", shapes or ("135m,1b,8b" if gpu and not quick else "135m"), SHAPES),
        read_names("--dtype", dtype or ("bfloat16" if gpu else "float32"), DTYPES),
        devices,
        read_names("--backend", backend, get_args(Backend))[0],
    )
    sizes = {case: QUICK[case] if quick else (TOKENS, ROWS) for case in read_names("--cases", cases, CASES)}
    asked = {
        case: (read_numbers("--tokens", tokens or t), read_numbers("--rows", rows or r))
        for case, (t, r) in sizes.items()
    }
    cells = grid(asked, *on)
    settings = QUICK_SETTINGS if quick else Settings()
    if rounds is not None:
        if rounds < 1:
            raise typer.BadParameter(f"--rounds must be at least 1, got {rounds}")
        settings = replace(settings, rounds=rounds, budget=None)
    if not memory:
        settings = replace(settings, memory=0)
    old = _old(compare)
    results = run_suite(cells, read_names("--providers", providers, PROVIDERS), settings)
    for table in report.tables(results):
        out.print(table)
    if (reasons := report.left_out(results)) is not None:
        out.print(reasons)
    records_of.save(folder, results)
    report.picture(folder / "bench.png", results.records)
    out.print(f"{', '.join(str(folder / name) for name in ('bench.csv', 'bench.json', 'bench.png'))}")
    if old is not None:
        _compare(results, old)
    print(records_of.to_json(results, samples=False))


def _compare(results: records_of.Results, old: records_of.Results) -> None:
    found = compare_runs.compare(results.records, old.records)
    out.print(report.compared(found))
    few = sum(c.verdict == "too few rounds" for c in found)
    if few:
        rounds = compare_runs.rounds_needed(len(found))
        out.print(f"{few} records have too few rounds to show anything: measure both times with --rounds {rounds}")
    missing = len({r.key for r in old.records if r.seconds} - {c.old.key for c in found})
    if missing:
        out.print(f"{missing} records of the old run have no counterpart in this one")
    changed = {k: (old.machine.get(k), v) for k, v in results.machine.items() if old.machine.get(k) != v}
    for name, (before, now) in changed.items():
        out.print(f"{name}: was {before}, is {now}")


def _old(path: Path | None) -> records_of.Results | None:
    """Read before anything is measured, so that a wrong file is said at once."""
    if path is None:
        return None
    try:
        return records_of.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(f"--compare: {error}") from error


if __name__ == "__main__":
    app()
