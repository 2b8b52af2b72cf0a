"""The one place that executes rows: a plan and a patch in, logits of the last tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from engine.core import naive
from engine.core.edits import make_edits, placed
from engine.core.patches import Patches
from engine.core.planning import MAX_TOKENS, Plan
from engine.core.prefix import Prefix, compute
from models import KeyValues, Model, Segment
from models.shapes import Float


def run(
    model: Model, patch: Patches, prompts: Sequence[Prefix], plans: Sequence[Plan]
) -> Float[Tensor, "prompts rows *places vocab"]:
    """Run each prompt by its plan; neighbours that are packed alike share forwards."""
    grad = torch.is_grad_enabled() and patch.requires_grad
    with torch.set_grad_enabled(grad):
        if grad:  # the prefix does not depend on the values: no graph is kept for it
            prompts = [_ready(prompt, plan) for prompt, plan in zip(prompts, plans, strict=True)]
        logits: list[Tensor] = []
        for packed, group in groupby(zip(prompts, plans, strict=True), key=lambda one: _alike(patch, *one)):
            if packed is None:
                logits += [WAYS[plan.strategy](model, patch, prompt, plan) for prompt, plan in group]
            else:
                for few in _few(list(group)):
                    logits += _packed(model, patch, few)
        # One prompt's logits are not copied: 32 rows of them can outweigh all else a forward holds.
        return torch.stack(logits) if len(logits) > 1 else logits[0][None]


def _ready(prompt: Prefix, plan: Plan) -> Prefix:
    return compute([prompt], [plan.split])[0]


def segments(prompts: Sequence[Prefix], splits: Sequence[int], n_rows: int) -> list[Segment]:
    """Rows of each prompt from token `split` on. A context not computed yet rides along; one with images only if it is
    the only one, on a model that packs them.
    """
    found = []
    for prompt, split in zip(prompts, splits, strict=True):
        inputs = prompt.prompt.inputs
        if inputs and not (len(prompts) == 1 and prompt.model.packs_images(prompt.prompt)):
            prompt = compute([prompt], [split])[0]
        rows = prompt.tokens[split:].expand(n_rows, -1)
        if split and split <= len(prompt.cache):
            found.append(Segment(prompt.cache[:split], rows))
        else:
            found.append(Segment(prompt.tokens[:split], rows, inputs=inputs))
    return found


def _alike(patch: Patches, prompt: Prefix, plan: Plan) -> tuple[int, ...] | None:
    """Plans with equal keys can share a packed forward; None: this one runs alone.

    Rows of equal length, read and patched at the same tokens of it: counted from either end, positions may coincide in
    one prompt and not in another.
    """
    if plan.strategy != "packed" or plan.rows_per_pass < plan.n_rows or patch.by_prompt:
        return None
    return (prompt.places, plan.n_tokens - plan.split, *(p - plan.split for p in patch.at(plan.n_tokens)))


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


def _packed(model: Model, patch: Patches, group: list[tuple[Prefix, Plan]]) -> list[Tensor]:
    """Several prompts with all their rows: prefixes not yet computed ride along in the same forward."""
    packed = segments([prompt for prompt, _ in group], [plan.split for _, plan in group], patch.n_rows)
    plan = group[0][1]
    edits = make_edits(model, placed(patch, plan.n_tokens, plan.split), len(group), plan.n_tokens)
    return list(model.pack(packed, edits, logits=group[0][0].places).logits)


def _batch(model: Model, patch: Patches, prompt: Prefix, plan: Plan) -> Float[Tensor, "rows *places vocab"]:
    """Whole rows beside each other."""
    return _forwards(model, patch, prompt, plan, None, prompt.prompt.inputs)


def _expanded(model: Model, patch: Patches, prompt: Prefix, plan: Plan) -> Float[Tensor, "rows *places vocab"]:
    """Rows from copies of the model's own cache on."""
    if not plan.split:
        return _batch(model, patch, prompt, plan)
    return _forwards(model, patch, prompt, plan, _ready(prompt, plan).cache[: plan.split], None)


def _forwards(
    model: Model,
    patch: Patches,
    prompt: Prefix,
    plan: Plan,
    prefix: KeyValues | None,
    inputs: Mapping[str, Tensor] | None,
) -> Float[Tensor, "rows *places vocab"]:
    """Plain forwards of some rows at a time."""
    ids, logits = prompt.tokens[plan.split :], []
    for some in _passes(patch, plan):
        edits = make_edits(model, placed(some, plan.n_tokens, plan.split), 1, plan.n_tokens)
        logits.append(model.forward(ids.expand(some.n_rows, -1), edits, prefix, inputs, prompt.places))
    return torch.cat(logits) if len(logits) > 1 else logits[0]


def _in_passes(model: Model, patch: Patches, prompt: Prefix, plan: Plan) -> Float[Tensor, "rows *places vocab"]:
    """More packed rows than one forward takes."""
    prompt = _ready(prompt, plan)
    return torch.cat([_packed(model, some, [(prompt, plan)])[0] for some in _passes(patch, plan)])


def _passes(patch: Patches, plan: Plan) -> Iterator[Patches]:
    for start in range(0, plan.n_rows, plan.rows_per_pass):
        yield patch.rows(start, start + plan.rows_per_pass)


def _layered(model: Model, patch: Patches, prompt: Prefix, plan: Plan) -> Float[Tensor, "rows *places vocab"]:
    """Rows in the order of their first patched layer, each coming in there as a copy of one that nobody patches."""
    if plan.rows_per_pass < plan.n_rows:
        prompt = _ready(prompt, plan)
    entry = patch.first_layers()
    order = sorted(range(plan.n_rows), key=entry.__getitem__)
    logits: list[Tensor] = [torch.empty(0)] * plan.n_rows
    for start in range(0, plan.n_rows, plan.rows_per_pass):
        some = order[start : start + plan.rows_per_pass]
        rows = patch.select([None, *some])
        (one,) = segments([prompt], [plan.split], rows.n_rows)
        one = replace(one, entry=(0, *(entry[i] for i in some)))
        edits = make_edits(model, placed(rows, plan.n_tokens, plan.split), 1, plan.n_tokens)
        found = model.pack([one], edits, logits=prompt.places).logits[0][1:]
        for index, row in zip(some, found, strict=True):
            logits[index] = row
    return torch.stack(logits)


# Each runs one prompt; packed prompts that are alike share forwards before it comes to this.
WAYS: Mapping[str, Callable[[Model, Patches, Prefix, Plan], Tensor]] = {
    "naive": lambda model, patch, prompt, _: naive.rows(model, patch, prompt),
    "batch": _batch,
    "expanded": _expanded,
    "packed": _in_passes,
    "layered": _layered,
}
