"""The MTV search of 100 steps x 32 rollouts, against the loop of hooked forwards, on the real task."""

from __future__ import annotations

import time
from typing import Any

import torch

import engine
from bench.hooks import patched_logits
from engine import tasks
from engine.methods import mtv
from models import Model


def measure(model: Model, task: str = "antonyms", steps: int = 100, rollouts: int = 32, naive_steps: int = 3) -> Any:
    """Seconds of the whole search, final choice included; the naive loops from a few steps, before and after it."""
    pairs = tasks.load(task)
    split = pairs.split(0)
    pool = [pairs.example(query) for query in split.train[:100]]
    validation = [pairs.example(query) for query in split.validation[:50]]
    many_shot = [example.prompt for example in pairs.few_shot(split.train, 8, 100)]
    means = engine.mean_activations(model, many_shot)
    hf: Any = model.hf  # type: ignore[attr-defined]
    projections: Any = model.projections  # type: ignore[attr-defined]

    def naive_loop(hooks: bool) -> float:
        """Seconds a step: draw, `rollouts` forwards, update. What is left out (pool, choice) only favours the loop."""
        search = mtv.Search(mtv.PRESETS["reference"], (model.shape.n_layers, model.shape.n_heads), 0.1, 0)
        started = time.perf_counter()
        for _ in range(naive_steps):
            example = pool[search.draw_example(len(pool))]
            ids, target = model.encode(example.prompt), tasks.first_token(model, example)
            masks = search.draw(rollouts)
            if hooks:
                logits = torch.stack([patched_logits(hf, projections, ids, mask, means) for mask in masks])
            else:
                logits = engine.naive.patch(model, ids, heads=masks, values=means)
            losses = torch.nn.functional.cross_entropy(logits, torch.full((rollouts,), target), reduction="none")
            search.update(masks, losses)
        return (time.perf_counter() - started) / naive_steps

    before = {"hooks": naive_loop(True), "naive": naive_loop(False)}
    started = time.perf_counter()
    vector = mtv.extract(model, pool, means, steps=steps, rollouts=rollouts, validation=validation)
    seconds = time.perf_counter() - started
    after = {"hooks": naive_loop(True), "naive": naive_loop(False)}

    result: dict[str, Any] = {"task": task, "steps": steps, "rollouts": rollouts, "search seconds": seconds}
    for name in before:
        loop = steps * (before[name] + after[name]) / 2
        result[f"{name} seconds, extrapolated"] = loop
        result[f"{name} / search"] = loop / seconds
    result["validation loss"] = vector.metadata["validation_loss"]
    return result
