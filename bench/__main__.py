"""`python -m bench CASE`: a table, then one JSON line with the machine and versions it was measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import models
from bench import backends as backends_case
from bench import exactness as exactness_case
from bench import families as families_case
from bench import memory as memory_case
from bench import rollouts as rollouts_case
from bench import search as search_case
from engine.artifacts import write_whole

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
out = Console(width=120)


@app.command()
def rollouts(
    model: str = "smollm2-135m",
    tokens: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "8,32,128,512",
    rows: int = 32,
    rounds: int = 7,
) -> None:
    """Rows of one prompt against naive forwards and against one unpatched forward."""
    lm = models.load(model)
    results = [rollouts_case.measure(lm, int(n), rows, rounds) for n in tokens.split(",")]
    table = Table(title=f"{rows} rollouts, {model}: ratios, median (quartiles) of {rounds} rounds")
    table.add_column("")
    for result in results:
        table.add_column(f"T={result['tokens']}", justify="right")
    for key in results[0]["ratios"]:
        table.add_row(key, *(_spread(result["ratios"][key]) for result in results))
    table.add_row("its floor, tokens", *(f"{result['floor of fresh / one forward']:.2f}" for result in results))
    for key in results[0]["seconds"]:
        table.add_row(f"{key}, ms", *(_spread(result["seconds"][key], 1000) for result in results))
    out.print(table)
    _record("rollouts", results)


@app.command()
def search(model: str = "smollm2-135m", task: str = "antonyms", steps: int = 100) -> None:
    """The whole MTV search against the loop of hooked forwards."""
    result = search_case.measure(models.load(model), task, steps)
    table = Table(show_header=False, title=f"MTV search, {model}")
    for key, value in result.items():
        table.add_row(key, f"{value:.2f}" if isinstance(value, float) else str(value))
    out.print(table)
    _record("search", [result])


@app.command()
def memory(model: str = "smollm2-135m", tokens: str = "512,2048", rows: int = 32) -> None:
    """Peak memory beyond the weights (Linux)."""
    results = [memory_case.measure(model, int(n), rows) for n in tokens.split(",")]
    table = Table(title=f"peak memory beyond the weights, {model}, {rows} rows, MiB")
    table.add_column("")
    for result in results:
        table.add_column(f"T={result['tokens']}", justify="right")
    for way in memory_case.WAYS:
        table.add_row(way, *(f"{result['peak MiB'][way]:.1f}" for result in results))
    for key in ("fresh / one forward", "fresh / one stock forward"):
        table.add_row(key, *(f"{result[key]:.2f}" for result in results))
    out.print(table)
    _record("memory", results)


@app.command(hidden=True)
def memory_child(model: str, way: str, tokens: int, rows: int) -> None:
    """One measurement, in the process that `memory` starts for it."""
    print(memory_case.peak(models.load(model), way, tokens, rows))


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
) -> None:
    """Every family and strategy against naive (float32) and float64 (bfloat16), on tiny random models."""
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


@app.command()
def backends(tokens: int = 512, rows: int = 32, rounds: int = 3) -> None:
    """Rows of one prompt by each backend against its own naive forwards, on SmolLM2's shape."""
    results = [backends_case.measure(backend, tokens, rows, rounds) for backend in families_case.BACKENDS]
    table = Table("backend", "naive / fresh", "naive / reused", "apart", title=f"{rows} rollouts, T={tokens}")
    for result in results:
        ratios = (_spread(result[key]) for key in ("naive / fresh", "naive / reused"))
        table.add_row(result["backend"], *ratios, f"{result['agreement']:.0e}")
    out.print(table)
    _record("backends", results)


def _spread(samples: dict[str, float], scale: float = 1) -> str:
    median, low, high = (scale * samples[key] for key in ("median", "low", "high"))
    digits = 2 if median < 10 else 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _record(case: str, results: Any) -> None:
    print(json.dumps({"case": case, "results": results, "machine": _machine()}))


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    app()
