"""32 rollouts by each backend, against 32 of its own naive forwards, on SmolLM2's shape."""

from __future__ import annotations

from typing import Any

import torch

import engine
import models
from bench.timing import interleaved, ratio, summary
from models import lens, nnsight_backend, zoo


@torch.no_grad()
def measure(backend: str, tokens: int = 512, rows: int = 32, rounds: int = 3, naive_rows: int = 2) -> dict[str, Any]:
    """Ratios at one prompt length; the naive way runs `naive_rows` rows a round, scaled to `rows`."""
    hf = zoo.smollm2_shape()
    if backend == "huggingface":
        model = models.wrap(hf)
    else:
        model = (lens if backend == "transformer_lens" else nnsight_backend).from_huggingface(hf)
    shape, random = model.shape, torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab_size, (tokens,), generator=random)
    heads = torch.rand(rows, shape.n_layers, shape.n_heads, generator=random) < 0.27
    values = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    prefix = engine.prefill(model, ids)
    ways = {
        "naive": lambda: engine.naive.patch(model, ids, heads=heads[:naive_rows], values=values),
        "fresh": lambda: engine.patch(model, ids, heads=heads, values=values, strategy="packed"),
        "reused": lambda: engine.patch(model, prefix, heads=heads, values=values, strategy="packed"),
    }
    apart = max((ways[way]()[:naive_rows] - ways["naive"]()).abs().max().item() for way in ("fresh", "reused"))
    if apart > 1e-5:
        raise RuntimeError(f"not timed, {backend} disagrees with its naive rows by {apart}")
    seconds = interleaved(ways, rounds)
    seconds["naive"] = [s * rows / naive_rows for s in seconds["naive"]]
    return {
        "backend": backend,
        "tokens": tokens,
        "rows": rows,
        "agreement": apart,
        "seconds": {name: summary(samples) for name, samples in seconds.items()},
        "naive / fresh": ratio(seconds["naive"], seconds["fresh"]),
        "naive / reused": ratio(seconds["naive"], seconds["reused"]),
    }
