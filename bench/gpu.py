"""Everything that needs a GPU, in one go: `bench/gpu.sh`. Checks first, then the figures; one JSON line last.

Needs torch, transformers, triton, einops, numpy, pillow and what they bring, nothing else; under ten minutes on one
H100. A step that fails is reported and the next one runs; the exit status says whether all passed.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import engine
import models
from bench import attention, edit, shapes
from bench.hooks import patched_logits
from bench.limits import Sizes
from bench.machine import describe, measure_rates
from bench.timing import interleaved, ratio, summary
from engine import naive
from engine.core.ops import edit_heads
from models import zoo

out = Console(width=120)
FAMILIES = ("llama", "gpt2", "qwen3", "mistral", "gemma2")
LIMIT = 1e-5  # float32, as on the CPU


def main() -> int:
    if not torch.cuda.is_available():
        out.print("torch finds no GPU here: nothing was measured")
        return 2
    steps: dict[str, Callable[[], Any]] = {
        "the edit: Triton against plain loops": check_edit,
        "strategies against naive": check_strategies,
        "CUDA graph of the row step against naive": check_rowstep,
        "8B shape, T=1024, 32 rows": lambda: goals("8b", 1024),
        "1B shape, T=256, 32 rows": lambda: goals("1b", 256),
        "the edit, microseconds": edit.measure,
        "the rows' attention, one layer of an 8B shape": lambda: attention.measure(device="cuda"),
    }
    found: dict[str, Any] = {}
    failed = []
    for name, step in steps.items():
        started = time.perf_counter()
        try:
            with torch.no_grad():
                found[name] = step()
            out.print(f"[green]done[/green]   {name} ({time.perf_counter() - started:.0f} s)")
            if not isinstance(found[name], list):
                show(name, found[name])
        except Exception as error:
            failed.append(name)
            found[name] = f"{type(error).__name__}: {error}"
            out.print(f"[red]failed[/red] {name}\n{traceback.format_exc()}", markup=True, highlight=False)
        torch.cuda.empty_cache()
    print(json.dumps({"case": "gpu", "results": found, "failed": failed, "machine": describe("cuda")}), flush=True)
    return 1 if failed else 0


def check_edit() -> list[str]:
    """Bit equality on odd sizes, z a slice of a longer sequence."""
    random, checked = torch.Generator().manual_seed(0), []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows, tokens, heads, head_dim in ((1, 1, 9, 64), (3, 2, 14, 80), (33, 1, 32, 128), (5, 3, 7, 12)):
            sequence = torch.randn(1, 7 + rows * tokens, heads * head_dim, generator=random).to("cuda", dtype)
            mask = (torch.rand(rows, heads, generator=random) < 0.4).cuda()
            for shared in (1, rows):
                values = torch.randn(shared, heads, head_dim, generator=random).to("cuda", dtype)
                for mode in ("replace", "add"):
                    both = []
                    for impl in ("triton", "reference"):
                        z = sequence.clone()
                        rows_of = z[0, 7:].unflatten(0, (rows, tokens)).unflatten(-1, (heads, head_dim))
                        edit_heads(rows_of, mask, values, mode, impl)
                        both.append(z)
                    name = f"{dtype} {[rows, tokens, heads, head_dim]} {mode}"
                    if not torch.equal(*both):
                        raise AssertionError(f"{name}: Triton and the reference differ")
                    checked.append(name)
    return checked


def _tiny(family: str, dtype: torch.dtype) -> models.Model:
    return models.wrap(zoo.tiny(family).to("cuda", dtype), name=f"tiny-{family}")


def _requests(model: models.Model) -> Iterator[dict[str, Any]]:
    random, shape = torch.Generator().manual_seed(0), model.shape
    for tokens in (4, 61):
        prompt = torch.randint(97, (tokens,), generator=random)
        heads = torch.rand(5, shape.n_layers, shape.n_heads, generator=random) < 0.4
        values = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
        yield dict(prompt=prompt, heads=heads, values=values)


def check_strategies() -> list[str]:
    """float32 to 1e-5; bfloat16 within twice naive's own distance to float64."""
    checked = []
    for family in FAMILIES:
        single, half, double = (_tiny(family, t) for t in (torch.float32, torch.bfloat16, torch.float64))
        for strategy in ("packed", "expanded", "batch"):
            for request in _requests(single):
                apart = _apart(engine.patch(single, **request, strategy=strategy), naive.patch(single, **request))
                truth = naive.patch(double, **request)
                off = _apart(engine.patch(half, **request, strategy=strategy), truth)
                noise = _apart(naive.patch(half, **request), truth)
                if apart > LIMIT or off > 2 * noise:
                    raise AssertionError(f"{family} {strategy}: {apart:.1e}; bf16 {off:.1e}, naive's {noise:.1e}")
                checked.append(f"{family} {strategy} {len(request['prompt'])}: {apart:.1e}, {off / noise:.2f}")
    return checked


def check_rowstep() -> list[str]:
    checked = []
    for family in FAMILIES:
        model = _tiny(family, torch.float32)
        step = engine.RowStep(model, rows=5, context=64, impl="graph")
        for request in [*_requests(model), *_requests(model)]:
            got = step(request["prompt"], heads=request["heads"], values=request["values"])
            apart = _apart(got, naive.patch(model, **request))
            if apart > LIMIT:
                raise AssertionError(f"{family}: {apart:.1e}")
            checked.append(f"{family}: {apart:.1e}")
    return checked


def _apart(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def goals(shape: str, tokens: int, rows: int = 32, naive_rows: int = 4, rounds: int = 9) -> dict[str, Any]:
    """32 rollouts in bfloat16 against one forward, against naive, and against the floor; peak memory."""
    hf = shapes.make(shape, torch.bfloat16, "cuda")
    model = models.wrap(hf, name=shape)
    sizes, random = model.shape, torch.Generator().manual_seed(0)
    ids = torch.randint(sizes.vocab_size, (tokens,), generator=random).cuda()
    masks = (torch.rand(rows, sizes.n_layers, sizes.n_heads, generator=random) < 0.27).cuda()
    values = 0.3 * torch.randn(sizes.n_layers, sizes.n_heads, sizes.head_dim, generator=random).cuda()
    few: dict[str, Any] = dict(heads=masks[:naive_rows], values=values)
    every: dict[str, Any] = dict(heads=masks, values=values)
    projections: Any = model.projections  # type: ignore[attr-defined]
    prefix = engine.prefill(model, ids)
    step = engine.RowStep(model, rows=rows, context=tokens - 1, impl="graph")

    def hooks() -> Tensor:
        return torch.stack([patched_logits(hf, projections, ids, mask, values) for mask in masks[:naive_rows]])

    ways: dict[str, Callable[[], Tensor]] = {
        "hooks": hooks,
        "naive": lambda: naive.patch(model, ids, **few),
        "one stock forward": lambda: hf(input_ids=ids[None], logits_to_keep=1).logits,
        "one forward": lambda: model.forward(ids[None]),
        "fresh": lambda: engine.patch(model, ids, **every, strategy="packed"),
        "reused": lambda: engine.patch(model, prefix, **every, strategy="packed"),
        "reused, graph": lambda: step(prefix, **every),
    }
    oracle = ways["naive"]()
    apart = {name: _apart(ways[name]()[:naive_rows], oracle) for name in ways if not name.startswith("one")}
    if max(apart.values()) > 0.05 * oracle.abs().max().item():
        raise AssertionError(f"not timed, they disagree with naive: {apart}")
    seconds = interleaved(ways, rounds, warm_up=2, wait=torch.cuda.synchronize)
    for name in ("hooks", "naive"):
        seconds[name] = [s * rows / naive_rows for s in seconds[name]]
    peaks = {name: _peak(ways[name]) for name in ("one stock forward", "one forward", "fresh", "reused")}
    rates = measure_rates("cuda", torch.bfloat16)
    limits = Sizes.of(hf)
    floors = {
        "fresh": limits.fresh(rows, tokens).seconds(rates),
        "reused": limits.row_step(rows, tokens).seconds(rates),
        "one forward": limits.fresh(1, tokens).seconds(rates),
    }
    pairs = (
        ("fresh", "one forward"), ("fresh", "one stock forward"), ("hooks", "fresh"), ("naive", "fresh"),
        ("hooks", "reused, graph"), ("naive", "reused, graph"), ("reused", "reused, graph"),
    )  # fmt: skip
    return {
        "agreement, largest logit difference to naive": apart,
        "milliseconds": {name: _scaled(samples) for name, samples in seconds.items()},
        "ratios": {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in pairs},
        "TFLOP/s": rates.flops / 1e12,
        "TB/s": rates.bandwidth / 1e12,
        "floor, milliseconds": {name: 1000 * floor for name, floor in floors.items()},
        "over the floor": {
            "fresh": summary(seconds["fresh"])["median"] / floors["fresh"],
            "reused": summary(seconds["reused"])["median"] / floors["reused"],
            "reused, graph": summary(seconds["reused, graph"])["median"] / floors["reused"],
        },
        "peak beyond the weights, MiB": peaks,
        "peak, fresh / one forward": peaks["fresh"] / peaks["one forward"],
    }


def _scaled(samples: list[float]) -> dict[str, float]:
    return {key: 1000 * value for key, value in summary(samples).items()}


def _peak(way: Callable[[], object]) -> float:
    """MiB beyond what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def show(title: str, results: dict[str, Any], indent: str = "") -> None:
    table = Table(show_header=False, title=title, title_justify="left", box=None)
    for key, value in _flat(results):
        table.add_row(key, value)
    out.print(table)


def _flat(results: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in results.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and set(value) == {"median", "low", "high"}:
            yield name, f"{value['median']:.4g} ({value['low']:.4g}-{value['high']:.4g})"
        elif isinstance(value, dict):
            yield from _flat(value, f"{name}: ")
        else:
            yield name, f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
