"""32 rollouts on a prompt of three pictures (2-way, one-shot), against 32 naive forwards; the real image-text model."""

from __future__ import annotations

import statistics
from typing import Any

import torch

import engine
from bench.timing import interleaved, ratio
from engine import tasks
from models import Model


def measure(model: Model, rows: int = 32, rounds: int = 5) -> dict[str, Any]:
    """Seconds of both ways, their ratio, how far their logits are apart, and runs of the vision tower in one step."""
    task = tasks.load("digits")
    prompt = task.example(task.split(0).test[0]).prompt
    random = torch.Generator().manual_seed(0)
    shape = model.shape
    heads = torch.rand(rows, shape.n_layers, shape.n_heads, generator=random) < 0.27
    values = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random) * 0.1
    given: dict[str, Any] = dict(heads=heads, values=values)
    ways = {
        "ours": lambda: engine.patch(model, prompt, **given),
        "naive": lambda: engine.naive.patch(model, prompt, **given),
    }
    ways["ours"]()  # met for the first time, a model is checked
    runs: list[int] = []
    handle = model.hf.vision.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[attr-defined]
    ours = ways["ours"]()
    towers = len(runs)
    handle.remove()
    apart = (ours - ways["naive"]()).abs().max().item()
    seconds = interleaved(ways, rounds, progress=False)
    return {
        "tokens": len(model.encode(prompt)),
        "rollouts": rows,
        "vision tower runs": towers,
        "largest logit difference": apart,
        **{f"{name}, seconds": statistics.median(taken) for name, taken in seconds.items()},
        "naive / ours": ratio(seconds["naive"], seconds["ours"]),
    }
