"""32 rollouts on a prompt of three pictures (2-way, one-shot), against 32 forwards; the real image-text model."""

from __future__ import annotations

import statistics
from typing import Any

import torch

import engine
from bench.hooks import patched_logits
from bench.timing import interleaved, ratio
from engine import tasks
from models import Model
from models.calls import Passing


def measure(model: Model, rows: int = 32, rounds: int = 5) -> dict[str, Any]:
    """Seconds of all ways, ratios, how far their logits are apart, and runs of the vision tower in one step."""
    task = tasks.load("digits")
    prompt = task.example(task.split(0).test[0]).prompt
    random = torch.Generator().manual_seed(0)
    shape, read = model.shape, model.read(prompt)
    heads = torch.rand(rows, shape.n_layers, shape.n_heads, generator=random) < 0.27
    values = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random) * 0.1
    given: dict[str, Any] = dict(heads=heads, values=values)
    hf, projections = model.hf, model.projections  # type: ignore[attr-defined]
    prefix = engine.prefill(model, prompt)
    ways = {
        "ours": lambda: engine.patch(model, prompt, **given),
        "ours, prefix reused": lambda: engine.patch(model, prefix, **given),
        "naive": lambda: engine.naive.patch(model, prompt, **given),
        "hooks": lambda: torch.stack(
            [patched_logits(hf, projections, read.ids, mask, values, inputs=read.inputs) for mask in heads]
        ),
        "one forward": lambda: model.forward(read.ids[None], inputs=read.inputs),
    }
    ways["ours"]()  # met for the first time, a model is checked
    runs: list[int] = []
    handle = hf.vision.register_forward_hook(Passing(lambda *_: runs.append(1)))  # others' would be looked into
    ours = ways["ours"]()
    towers = len(runs)
    handle.remove()
    apart = max((ours - ways[name]()).abs().max().item() for name in ("naive", "hooks"))
    with torch.no_grad():
        seconds = interleaved(ways, rounds, progress=False)
    return {
        "tokens": len(read.ids),
        "rollouts": rows,
        "vision tower runs": towers,
        "largest logit difference": apart,
        **{f"{name}, seconds": statistics.median(taken) for name, taken in seconds.items()},
        "hooks / ours": ratio(seconds["hooks"], seconds["ours"]),
        "naive / ours": ratio(seconds["naive"], seconds["ours"]),
        "naive / ours, prefix reused": ratio(seconds["naive"], seconds["ours, prefix reused"]),
        "ours / one forward": ratio(seconds["ours"], seconds["one forward"]),
    }
