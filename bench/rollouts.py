"""32 rollouts of one prompt: against 32 naive forwards, and against one unpatched forward."""

from __future__ import annotations

from typing import Any

import torch

import engine
from bench.hooks import patched_logits
from bench.timing import interleaved, ratio, summary
from models import Model


@torch.no_grad()
def measure(model: Model, tokens: int, rows: int = 32, rounds: int = 7, naive_rows: int = 8) -> dict[str, Any]:
    """Times and ratios at one prompt length. Naive ways run `naive_rows` rows a round, scaled to `rows`."""
    shape, random = model.shape, torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab_size, (tokens,), generator=random)
    masks = torch.rand(rows, shape.n_layers, shape.n_heads, generator=random) < 0.27
    values = 0.3 * torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    prefix = engine.prefill(model, ids)
    few: dict[str, Any] = dict(heads=masks[:naive_rows], values=values)
    hf: Any = model.hf  # type: ignore[attr-defined]
    projections: Any = model.projections  # type: ignore[attr-defined]

    def hooks() -> torch.Tensor:
        return torch.stack([patched_logits(hf, projections, ids, mask, values) for mask in masks[:naive_rows]])

    ways = {
        "hooks": hooks,
        "naive": lambda: engine.naive.patch(model, ids, **few),
        "one stock forward": lambda: hf(input_ids=ids[None], logits_to_keep=1).logits,
        "one forward": lambda: model.forward(ids[None]),
        "fresh": lambda: engine.patch(model, ids, heads=masks, values=values, strategy="packed"),
        "reused": lambda: engine.patch(model, prefix, heads=masks, values=values, strategy="packed"),
    }
    oracle = ways["naive"]()
    apart = {name: (ways[name]()[:naive_rows] - oracle).abs().max().item() for name in ("hooks", "fresh", "reused")}
    wrong = {name: difference for name, difference in apart.items() if difference > 1e-4 * oracle.abs().max().item()}
    if wrong:
        raise RuntimeError(f"not timed, since they disagree with engine.naive: {wrong}")

    seconds = interleaved(ways, rounds)
    for name in ("hooks", "naive"):
        seconds[name] = [s * rows / naive_rows for s in seconds[name]]
    return {
        "tokens": tokens,
        "rows": rows,
        "agreement": apart,
        "seconds": {name: summary(samples) for name, samples in seconds.items()},
        "ratios": {
            "hooks / fresh": ratio(seconds["hooks"], seconds["fresh"]),
            "naive / fresh": ratio(seconds["naive"], seconds["fresh"]),
            "hooks / reused": ratio(seconds["hooks"], seconds["reused"]),
            "naive / reused": ratio(seconds["naive"], seconds["reused"]),
            "fresh / one forward": ratio(seconds["fresh"], seconds["one forward"]),
            "fresh / one stock forward": ratio(seconds["fresh"], seconds["one stock forward"]),
        },
        # Tokens through the linear layers, the cost that cannot be avoided: what the ratio to one forward tends to.
        "floor of fresh / one forward": (tokens - 1 + rows) / tokens,
    }
