"""A head sweep as Function Vectors make it, against the loop of hooked forwards; rows that come in layer by layer
against rows that run through all of them; attribution against the exact sweep. On the real model and task.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import engine
from bench.hooks import patched_logits
from bench.limits import Sizes
from bench.timing import interleaved, ratio
from engine import Example, attribute, tasks
from models import Model
from models.shapes import Bool

STEPS = (1, 10)


def measure(
    model: Model, task: str = "antonyms", shots: int = 10, prompts: int = 25, rounds: int = 5
) -> dict[str, Any]:
    """Every head patched alone, by its mean over clean prompts, in prompts whose demonstrations have permuted answers.

    Source: Function Vectors (arXiv 2310.15213), section 2.2: 25 ten-shot prompts, the probability of the first token.
    """
    pairs = tasks.load(task)
    train = pairs.split(0).train
    means = engine.mean_activations(model, [e.prompt for e in pairs.few_shot(train, shots, prompts)], progress=False)
    shuffled = pairs.few_shot(train, shots, prompts, seed=1, shuffled=True)
    examples = [Example(e.prompt, tasks.first_token(model, e)) for e in shuffled]
    lengths = [len(model.encode(e.prompt)) for e in examples]
    exact, sweep = _against_the_loop(model, examples, means)
    return {
        "task": f"{task}, {prompts} prompts of {shots} shots, {min(lengths)} to {max(lengths)} tokens",
        "sweep": sweep,
        "layered": _layered(
            model, sorted(examples, key=lambda e: len(model.encode(e.prompt)))[prompts // 2], means, rounds
        ),
        "attribution": _attribution(model, examples, means, exact),
    }


def _against_the_loop(
    model: Model, examples: Sequence[Example], means: Tensor
) -> tuple[engine.Effects, dict[str, Any]]:
    """Seconds of the sweep; those of the loops from one forward a prompt, each of another head, before and after it."""
    hf: Any = model.hf  # type: ignore[attr-defined]
    projections: Any = model.projections  # type: ignore[attr-defined]
    heads = single_heads(model)
    ids = [model.encode(example.prompt) for example in examples]
    chosen = torch.linspace(0, len(heads) - 1, len(examples)).long().tolist()

    def hooks(n: int) -> Tensor:
        return patched_logits(hf, projections, ids[n], heads[chosen[n]], means)

    def naive(n: int) -> Tensor:
        return engine.naive.patch(model, ids[n], heads=heads[chosen[n]], values=means)[0]

    loops: dict[str, Callable[[int], Tensor]] = {"hooks": hooks, "naive": naive}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    found: dict[str, Tensor] = {}

    def time_loops() -> None:
        for name, one in loops.items():
            started = time.perf_counter()
            logits = [one(n) for n in range(len(examples))]
            seconds[name].append((time.perf_counter() - started) / len(examples))
            targets = [tasks.first_token(model, example) for example in examples]
            found[name] = torch.stack([x.softmax(dim=-1)[t] for x, t in zip(logits, targets, strict=True)]).double()

    for one in loops.values():
        one(0)
    engine.sweep(model, examples[:1], means, progress=False)  # met for the first time, a model is checked
    time_loops()
    started = time.perf_counter()
    effects = engine.sweep(model, examples, means, progress=False)
    taken = time.perf_counter() - started
    time_loops()

    forwards = len(examples) * (1 + len(heads))
    result: dict[str, Any] = {"forwards of the loop": forwards, "sweep seconds": taken}
    probabilities = effects.patched.flatten(1)[range(len(examples)), chosen]
    for name in loops:
        loop = forwards * statistics.fmean(seconds[name])
        result[f"{name} seconds, extrapolated"] = loop
        result[f"{name} / sweep"] = loop / taken
        result[f"{name} - sweep, probability"] = (found[name] - probabilities).abs().max().item()
    sizes = Sizes.of(hf)
    loop_work = sum((1 + len(heads)) * full_forward(sizes, len(x)) for x in ids)
    result["loop / sweep, counted work"] = loop_work / sum(rows(sizes, len(x), len(heads) + 1, True, True) for x in ids)
    return effects, result


def _layered(model: Model, example: Example, means: Tensor, rounds: int) -> dict[str, Any]:
    """The rows of one prompt: each from its first patched layer on, or all from the first."""
    prefix, heads = engine.prefill(model, example.prompt), single_heads(model)
    ids = model.encode(example.prompt)

    def way(prompt: Any, strategy: Any) -> Callable[[], Tensor]:
        return lambda: engine.patch(model, prompt, heads=heads, values=means, strategy=strategy)

    prompts = {"fresh": ids, "reused": prefix}
    ways = {f"{s}, {kind}": way(x, s) for kind, x in prompts.items() for s in ("layered", "packed")}
    seconds = interleaved(ways, rounds, progress=False)
    apart = (ways["layered, fresh"]() - ways["packed, fresh"]()).abs().max().item()
    result: dict[str, Any] = {"tokens": len(ids), "rows": len(heads), "largest logit difference": apart}
    result |= {f"{name}, seconds": statistics.median(taken) for name, taken in seconds.items()}
    sizes = Sizes.of(model.hf)  # type: ignore[attr-defined]
    for kind in prompts:
        result[f"packed / layered, {kind}"] = ratio(seconds[f"packed, {kind}"], seconds[f"layered, {kind}"])
        work = [rows(sizes, len(ids), len(heads), layered, kind == "fresh") for layered in (False, True)]
        result[f"packed / layered, {kind}, counted work"] = work[0] / work[1]
    return result


def _attribution(model: Model, examples: Sequence[Example], means: Tensor, exact: engine.Effects) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for steps in STEPS:
        attribute(model, examples[:1], means, steps=steps, progress=False)
        started = time.perf_counter()
        estimated = attribute(model, examples, means, steps=steps, progress=False)
        result[f"{steps} steps, seconds"] = time.perf_counter() - started
        result[f"{steps} steps, Spearman"] = estimated.rank_correlation(exact)
        result[f"{steps} steps, of the ten strongest heads"] = len(set(estimated.top(10)) & set(exact.top(10)))
    return result


def single_heads(model: Model) -> Bool[Tensor, "units layers heads"]:
    shape = (model.shape.n_layers, model.shape.n_heads)
    return torch.eye(shape[0] * shape[1], dtype=torch.bool).unflatten(1, shape)


def full_forward(sizes: Sizes, tokens: int) -> float:
    """Multiplications and additions of a forward of the loop: all tokens through all blocks, logits of the last."""
    seen = tokens * (tokens + 1) / 2
    return 2 * tokens * sizes.blocks + 4 * sizes.layers * sizes.q_width * seen + 2 * sizes.vocabulary


def rows(sizes: Sizes, tokens: int, n_rows: int, layered: bool, fresh: bool) -> float:
    """The least of all rows of a prompt, the last token of each patched in one head; and of the prefix, if fresh.

    Layer by layer, a row whose head is in layer l of L (from 0) is in L - l of them, and one more row in all. The
    vocabulary projection is whole either way.
    """
    depth = (sizes.layers + 1) / (2 * sizes.layers) + 1 / n_rows if layered else 1.0
    return sizes.row_step(n_rows, tokens, depth).flops + (sizes.prefill(tokens - 1).flops if fresh else 0)


def table(result: dict[str, Any]) -> Table:
    """What `measure` found; ratios with their quartiles."""
    shown = Table(show_header=False, title=f"sweep of single heads: {result['task']}")
    for part in ("sweep", "layered", "attribution"):
        for key, value in result[part].items():
            shown.add_row(part, key, number(value))
        shown.add_section()
    return shown


def number(value: str | float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
    if isinstance(value, int | str):
        return str(value)
    return f"{value:.1e}" if abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
