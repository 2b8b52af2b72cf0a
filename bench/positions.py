"""What a sweep over all heads gains by where the prompt is patched, and what means gain: little is shared early."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import engine
from bench.hooks import patched_logits
from bench.timing import interleaved, ratio
from engine import tasks
from models import Model

SAMPLE = 10  # forwards of the loop that are timed in a round, of one for each head
WHERE = {"last token": 1.0, "at three quarters": 0.75, "in the middle": 0.5, "at a quarter": 0.25}


def measure(model: Model, rounds: int = 3, shots: int = 10) -> dict[str, Any]:
    """Ratios of the hooks loop to ours: a sweep of one ten-shot prompt at a position, and means of ten prompts."""
    task, shape = tasks.load("antonyms"), model.shape
    prompts = [example.prompt for example in task.few_shot(task.split(0).train, shots, 10)]
    ids, n_heads = model.encode(prompts[0]), shape.n_layers * shape.n_heads
    values = engine.mean_activations(model, prompts, progress=False)
    hf, projections = model.hf, model.projections  # type: ignore[attr-defined]
    some = torch.eye(n_heads, dtype=torch.bool).unflatten(1, values.shape[:2])[:: n_heads // SAMPLE][:SAMPLE]
    found: dict[str, Any] = {"tokens": len(ids), "heads": n_heads}
    for name, part in WHERE.items():
        at = round(part * (len(ids) - 1))
        given: dict[str, Any] = dict(metric="probability", targets=[5], positions=at, progress=False)
        ways: dict[str, Callable[[], object]] = {
            "loop": partial(_loop, hf, projections, ids, some, values, at),
            "ours": partial(engine.sweep, model, [ids], values, **given),
        }
        seconds = interleaved(ways, rounds, progress=False)
        loop = [n_heads / SAMPLE * taken for taken in seconds["loop"]]
        found[f"sweep, loop / ours: {name}"] = ratio(loop, seconds["ours"])
    ways = {
        "loop": lambda: [_captured(hf, projections, model.encode(prompt)) for prompt in prompts],
        "ours": lambda: engine.mean_activations(model, prompts, progress=False),
    }
    seconds = interleaved(ways, rounds, progress=False)
    found["means of ten prompts, loop / ours"] = ratio(seconds["loop"], seconds["ours"])
    return found


def _loop(hf: Any, projections: list[Any], ids: Tensor, masks: Tensor, values: Tensor, at: int) -> None:
    for mask in masks:
        patched_logits(hf, projections, ids, mask, values, at)


@torch.no_grad()
def _captured(hf: Any, projections: list[Any], ids: Tensor) -> None:
    """Z of the last token by hooks, as everybody does."""
    kept: list[Tensor] = []
    handles = [p.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1].clone())) for p in projections]
    try:
        hf(input_ids=ids[None])
    finally:
        for handle in handles:
            handle.remove()
