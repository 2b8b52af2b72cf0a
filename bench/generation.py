"""Answers of 32 patched rows, the patch at the prompt's last token, against transformers' generate on 32 copies."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import engine
import models
from bench.timing import interleaved, ratio
from engine import tasks
from models import Model
from models.calls import Passing


def measure(
    model: Model, rows: int = 32, n_prompt: int = 128, n_new: int = 20, rounds: int = 5, shots: int = 8
) -> dict[str, Any]:
    """Seconds, their ratio, and whether all tokens are equal. The answers have their full length: nothing ends them."""
    hf: Any = model.hf  # type: ignore[attr-defined]
    endless = models.wrap(hf, model.tokenizer, name=model.name)
    endless.eos = frozenset()
    task, shape = tasks.load("antonyms"), model.shape
    ids = model.encode(task.few_shot(task.split(0).train, 3 * shots, 1)[0].prompt)[-n_prompt:]
    random = torch.Generator().manual_seed(0)
    heads = torch.rand(rows, shape.n_layers, shape.n_heads, generator=random) < 0.27
    few_shot = [example.prompt for example in task.few_shot(task.split(0).train, shots, 20)]
    values = 4 * engine.mean_activations(model, few_shot, progress=False)  # times four: else all rows say the same
    given: dict[str, Any] = dict(heads=heads, values=values, max_new_tokens=n_new)
    prefix = engine.prefill(endless, ids)
    how: dict[str, Any] = dict(do_sample=False, max_new_tokens=n_new, eos_token_id=shape.vocab_size - 1, pad_token_id=0)

    def transformers() -> Tensor:
        copies = ids.expand(rows, -1)
        with patching(model, heads, values):
            return hf.generate(copies, attention_mask=torch.ones_like(copies), **how)[:, len(ids) :]

    ways = {
        "transformers": transformers,
        "ours": lambda: engine.generate(endless, ids, **given),
        "ours, prefix reused": lambda: engine.generate(endless, prefix, **given),
        "ours, all tokens patched": lambda: engine.generate(endless, ids, patched="all", **given),
    }
    want = [model.decode(row) for row in transformers()]
    equal = {name: ways[name]() == want for name in ("ours", "ours, prefix reused")}
    seconds = interleaved(ways, rounds, progress=False)
    return {
        "tokens of the prompt": len(ids),
        "rows": rows,
        "new tokens": n_new,
        "equal tokens": all(equal.values()),
        "different answers among the rows": len(set(want)),
        **{f"{name}, seconds": statistics.median(taken) for name, taken in seconds.items()},
        **{f"transformers / {name}": ratio(seconds["transformers"], seconds[name]) for name in list(ways)[1:]},
    }


@contextmanager
def patching(model: Any, heads: Tensor, values: Tensor) -> Iterator[None]:
    """Within: forwards of more than one token are patched at their last, a mask a row, as everybody's hooks do."""

    def hook(layer: int) -> Any:
        def pre(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if args[0].shape[1] == 1:
                return None
            z = args[0].clone().unflatten(-1, values.shape[1:])  # [rows, T, H, D]
            z[:, -1] = torch.where(heads[:, layer, :, None], values[layer], z[:, -1])
            return (z.flatten(-2), *args[1:])

        return Passing(pre)

    handles = [p.register_forward_pre_hook(hook(layer)) for layer, p in enumerate(model.projections)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
