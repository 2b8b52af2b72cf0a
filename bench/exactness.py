"""How far packed rows are from naive ones, and both from float64, on random weights and on the real model."""

from __future__ import annotations

from typing import Any

import torch

import engine
import models
from engine import tasks
from models import zoo


@torch.no_grad()
def measure() -> list[dict[str, Any]]:
    """Largest absolute logit differences over 32 random masks and prompts of odd lengths."""
    rows = []
    random = torch.Generator().manual_seed(0)
    for family in ("llama", "gpt2", "qwen3"):
        prompts = [torch.randint(97, (n,), generator=random).tolist() for n in (1, 2, 13, 37, 101)]
        rows.append(_compare(f"tiny {family}, random prompts", lambda family=family: zoo.tiny(family), prompts, None))
    prompts = [torch.randint(49152, (n,), generator=random).tolist() for n in (7, 63, 255)]
    rows.append(_compare("SmolLM2's shape, random weights and prompts", zoo.smollm2_shape, prompts, None))

    tokenizer = zoo.smollm2()[1]
    task = tasks.load("antonyms")
    train = task.split(0).train
    texts = [example.prompt for shots in (0, 3, 8) for example in task.few_shot(train, shots, 2, seed=shots)]
    real = [tokenizer(text)["input_ids"] for text in texts]
    means = engine.mean_activations(
        models.load("smollm2-135m"), [e.prompt for e in task.few_shot(train, 8, 50)], progress=False
    )
    rows.append(_compare("SmolLM2-135M, task prompts, mean activations", lambda: zoo.smollm2()[0], real, means))
    return rows


def _compare(name: str, make: Any, prompts: list[list[int]], means: Any) -> dict[str, Any]:
    single, double = models.wrap(make()), models.wrap(make().double())
    shape, random = single.shape, torch.Generator().manual_seed(1)
    masks = torch.rand(32, shape.n_layers, shape.n_heads, generator=random) < 0.27
    if means is None:
        means = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    options: dict[str, Any] = dict(heads=masks, values=means)
    worst = dict.fromkeys(("packed - naive", "naive - float64", "packed - float64", "in float64"), 0.0)
    for prompt in prompts:
        packed = engine.patch(single, prompt, strategy="packed", **options)
        naive = engine.naive.patch(single, prompt, **options)
        packed64 = engine.patch(double, prompt, strategy="packed", **options)
        naive64 = engine.naive.patch(double, prompt, **options)
        for key, difference in {
            "packed - naive": packed - naive,
            "naive - float64": naive - naive64,
            "packed - float64": packed - naive64,
            "in float64": packed64 - naive64,
        }.items():
            worst[key] = max(worst[key], difference.abs().max().item())
    return {"case": name, "prompts": [len(p) for p in prompts], **worst}
