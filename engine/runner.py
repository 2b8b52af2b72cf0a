"""The one place that executes rows: a plan and a patch in, last-token logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from engine import naive
from engine.edit import edit_heads
from engine.intervention import Patch
from engine.planning import MAX_TOKENS, Plan
from engine.prefix import Prefix, compute
from models import Edit, Model, Segment
from models.shapes import Float


def run(
    model: Model, patch: Patch, prompts: Sequence[Prefix], plans: Sequence[Plan]
) -> Float[Tensor, "prompts rows vocab"]:
    """Run each prompt by its plan; neighbours that are packed alike share forwards."""
    grad = torch.is_grad_enabled() and patch.values.requires_grad
    with torch.set_grad_enabled(grad):
        if grad:  # the prefix does not depend on the values: no graph is kept for it
            prompts = [_ready(prompt, plan) for prompt, plan in zip(prompts, plans, strict=True)]
        logits: list[Tensor] = []
        for packed, group in groupby(zip(prompts, plans, strict=True), key=lambda one: _alike(one[1])):
            if packed is None:
                logits += [_single(model, patch, prompt, plan) for prompt, plan in group]
            else:
                for few in _few(list(group)):
                    logits += _packed(model, patch, few)
        # One prompt's logits are not copied: 32 rows of them can outweigh all else a forward holds.
        return torch.stack(logits) if len(logits) > 1 else logits[0][None]


def make_edit(model: Model, patch: Patch, tail: Sequence[int], n_tail: int, n_prompts: int = 1) -> Edit:
    """The patch as edit(layer, z), for rows of the last `n_tail` tokens, patched at `tail` (counted within them).

    z is [prompts * rows, n_tail, heads, head_dim]: every prompt has the same rows.
    """
    touched = patch.heads.any(dim=2).any(dim=0).tolist()
    mask = patch.heads.to(model.device).transpose(0, 1)[:, :, None, :, None]  # [L, R, 1, H, 1]
    values = patch.values.to(model.device, model.dtype)
    values = values[:, None, None] if values.ndim == 3 else values.transpose(0, 1)[:, :, None]  # [L, 1|R, 1, H, D]
    mask = mask.repeat(1, n_prompts, 1, 1, 1)
    values = values.repeat(1, n_prompts, 1, 1, 1) if values.shape[1] > 1 else values
    where = None if len(tail) == n_tail else torch.as_tensor(tail, device=model.device)

    def edit(layer: int, z: Tensor) -> Tensor:
        if not touched[layer]:
            return z
        if where is None:
            return edit_heads(z, mask[layer], values[layer], patch.mode)
        return z.index_copy(1, where, edit_heads(z[:, where], mask[layer], values[layer], patch.mode))

    return edit


def _ready(prompt: Prefix, plan: Plan) -> Prefix:
    return compute([prompt], [plan.split])[0]


def segment(prompt: Prefix, split: int, n_rows: int) -> Segment:
    """Rows of a prompt from token `split` on. A context not computed yet rides along, unless it has pixels."""
    if prompt.prompt.inputs:
        prompt = compute([prompt], [split])[0]
    ready = split and split <= len(prompt.cache)
    context = prompt.cache[:split] if ready else prompt.tokens[:split]
    return Segment(context, prompt.tokens[split:].expand(n_rows, -1))


def _alike(plan: Plan) -> tuple[int, ...] | None:
    """Plans with equal keys can share a packed forward; None: this one runs alone."""
    if plan.strategy != "packed" or plan.rows_per_pass < plan.n_rows:
        return None
    return (plan.n_tokens - plan.split,)


def _few(prompts: list[tuple[Prefix, Plan]]) -> Iterator[list[tuple[Prefix, Plan]]]:
    """Groups that one forward can take."""
    group: list[tuple[Prefix, Plan]] = []
    size = 0
    for prompt, plan in prompts:
        cost = plan.n_rows * (plan.n_tokens - plan.split) + max(0, plan.split - len(prompt.cache))
        if group and size + cost > MAX_TOKENS:
            yield group
            group, size = [], 0
        group.append((prompt, plan))
        size += cost
    yield group


def _packed(model: Model, patch: Patch, group: list[tuple[Prefix, Plan]]) -> list[Tensor]:
    """Several prompts with all their rows: prefixes not yet computed ride along in the same forward."""
    segments = [segment(prompt, plan.split, patch.n_rows) for prompt, plan in group]
    plan = group[0][1]
    tail = [p - plan.split for p in patch.at(plan.n_tokens)]
    edit = make_edit(model, patch, tail, plan.n_tokens - plan.split, len(group))
    return list(model.pack(segments, edit).logits)


def _single(model: Model, patch: Patch, prompt: Prefix, plan: Plan) -> Float[Tensor, "rows vocab"]:
    """One prompt, its rows in as many passes as the plan says."""
    if plan.strategy == "naive":
        return naive.rows(model, patch, prompt)
    if plan.strategy == "packed":
        prompt = _ready(prompt, plan)
    prefix = _ready(prompt, plan).cache[: plan.split] if plan.strategy == "expanded" and plan.split else None
    tail = [p - plan.split for p in patch.at(plan.n_tokens)]
    ids = prompt.tokens[plan.split :]
    inputs = None if prefix else prompt.prompt.inputs
    logits = []
    for start in range(0, plan.n_rows, plan.rows_per_pass):
        some = patch.rows(start, start + plan.rows_per_pass)
        if plan.strategy == "packed":
            logits += _packed(model, some, [(prompt, plan)])
        else:
            edit = make_edit(model, some, tail, len(ids))
            logits.append(model.forward(ids.expand(some.n_rows, -1), edit, prefix, inputs))
    return torch.cat(logits) if len(logits) > 1 else logits[0]
