"""The one place that executes rows: a plan and a patch in, logits of the last tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from engine.core import naive
from engine.core.ops import edit_heads
from engine.core.patches import Patch
from engine.core.planning import MAX_TOKENS, Plan
from engine.core.prefix import Prefix, compute
from models import Edit, KeyValues, Model, Segment, Steer
from models.shapes import Float


def run(
    model: Model, patch: Patch, prompts: Sequence[Prefix], plans: Sequence[Plan]
) -> Float[Tensor, "prompts rows *places vocab"]:
    """Run each prompt by its plan; neighbours that are packed alike share forwards."""
    grad = torch.is_grad_enabled() and patch.values.requires_grad
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


def make_edit(model: Model, patch: Patch, tail: Sequence[int], n_tail: int, n_prompts: int = 1) -> Edit:
    """The patch as edit(layer, z), for rows of the last `n_tail` tokens, patched at `tail` (counted within them).

    z is [prompts * rows, n_tail, heads, head_dim]: every prompt has the same rows. It is written to and returned; a new
    tensor where gradients are recorded.
    """
    touched = patch.heads.any(dim=2).any(dim=0).tolist()
    spans = contiguous(tail)
    mask = model.own_heads(patch.heads.to(model.device), -1).transpose(0, 1).repeat(1, n_prompts, 1)  # [L, P*R, H]
    values = model.own_heads(patch.values.to(model.device, model.dtype), -2)
    values = values[:, None] if values.ndim == 3 else values.transpose(0, 1)  # [L, 1|R, H, D]
    values = values.repeat(1, n_prompts, 1, 1) if values.shape[1] > 1 else values
    # By device and dtype: a model may be spread over several.
    ready = {(model.device, model.dtype): (mask, values)}

    def edit(layer: int, z: Tensor) -> Tensor:
        if not touched[layer]:
            return z
        where = (z.device, z.dtype)
        if where not in ready:
            ready[where] = mask.to(z.device), values.to(z.device, z.dtype)
        masks, new = ready[where]
        for span in spans:
            part = z[:, span]
            # Rows that are still to come in are the last ones; a layer's heads may be narrower than the widest.
            edited = edit_heads(part, masks[layer][: len(z)], new[layer][: len(z), :, : z.shape[-1]], patch.mode)
            if edited is not part:
                z = z.slice_scatter(edited, 1, span.start, span.stop)
        return z

    return edit


def make_steer(patch: Patch, tail: Sequence[int], n_prompts: int = 1) -> Steer | None:
    """The patch's steering by layer, for the rows [prompts * rows, n_tail, d_model] that `make_edit` is for."""
    rows_after: dict[int, list[int]] = {}
    for row, layer in enumerate(list(patch.steered_after) * n_prompts):
        if layer is not None:
            rows_after.setdefault(layer, []).append(row)

    def adding(rows: list[int]) -> Callable[[Tensor], Tensor]:
        def add(h: Tensor) -> Tensor:
            which = torch.tensor(rows, device=h.device)[:, None]
            vector = patch.steering.vector.to(h)  # type: ignore[union-attr]
            return h.index_put((which, torch.tensor(tail, device=h.device)), vector, accumulate=True)

        return add

    return {layer: adding(rows) for layer, rows in rows_after.items()} or None


def contiguous(positions: Sequence[int]) -> list[slice]:
    """Positions in order as the fewest slices.

    >>> contiguous([0, 1, 2, 5])
    [slice(0, 3, None), slice(5, 6, None)]
    """
    spans: list[slice] = []
    for p in positions:
        if spans and spans[-1].stop == p:
            spans[-1] = slice(spans[-1].start, p + 1)
        else:
            spans.append(slice(p, p + 1))
    return spans


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


def _alike(patch: Patch, prompt: Prefix, plan: Plan) -> tuple[int, ...] | None:
    """Plans with equal keys can share a packed forward; None: this one runs alone.

    Rows of equal length, read and patched at the same tokens of it: counted from either end, positions may coincide in
    one prompt and not in another.
    """
    if plan.strategy != "packed" or plan.rows_per_pass < plan.n_rows:
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


def _packed(model: Model, patch: Patch, group: list[tuple[Prefix, Plan]]) -> list[Tensor]:
    """Several prompts with all their rows: prefixes not yet computed ride along in the same forward."""
    packed = segments([prompt for prompt, _ in group], [plan.split for _, plan in group], patch.n_rows)
    plan = group[0][1]
    tail = [p - plan.split for p in patch.at(plan.n_tokens)]
    edit = make_edit(model, patch, tail, plan.n_tokens - plan.split, len(group))
    steer = make_steer(patch, tail, len(group))
    return list(model.pack(packed, edit, steer=steer, logits=group[0][0].places).logits)


def _batch(model: Model, patch: Patch, prompt: Prefix, plan: Plan) -> Float[Tensor, "rows *places vocab"]:
    """Whole rows beside each other."""
    return _forwards(model, patch, prompt, plan, None, prompt.prompt.inputs)


def _expanded(model: Model, patch: Patch, prompt: Prefix, plan: Plan) -> Float[Tensor, "rows *places vocab"]:
    """Rows from copies of the model's own cache on."""
    if not plan.split:
        return _batch(model, patch, prompt, plan)
    return _forwards(model, patch, prompt, plan, _ready(prompt, plan).cache[: plan.split], None)


def _forwards(
    model: Model,
    patch: Patch,
    prompt: Prefix,
    plan: Plan,
    prefix: KeyValues | None,
    inputs: Mapping[str, Tensor] | None,
) -> Float[Tensor, "rows *places vocab"]:
    """Plain forwards of some rows at a time."""
    ids, tail = prompt.tokens[plan.split :], [p - plan.split for p in patch.at(plan.n_tokens)]
    logits = []
    for some in _passes(patch, plan):
        edit, steer = make_edit(model, some, tail, len(ids)), make_steer(some, tail)
        logits.append(model.forward(ids.expand(some.n_rows, -1), edit, prefix, inputs, steer, prompt.places))
    return torch.cat(logits) if len(logits) > 1 else logits[0]


def _in_passes(model: Model, patch: Patch, prompt: Prefix, plan: Plan) -> Float[Tensor, "rows *places vocab"]:
    """More packed rows than one forward takes."""
    prompt = _ready(prompt, plan)
    return torch.cat([_packed(model, some, [(prompt, plan)])[0] for some in _passes(patch, plan)])


def _passes(patch: Patch, plan: Plan) -> Iterator[Patch]:
    for start in range(0, plan.n_rows, plan.rows_per_pass):
        yield patch.rows(start, start + plan.rows_per_pass)


def _layered(model: Model, patch: Patch, prompt: Prefix, plan: Plan) -> Float[Tensor, "rows *places vocab"]:
    """Rows in the order of their first patched layer, each coming in there as a copy of one that nobody patches."""
    if plan.rows_per_pass < plan.n_rows:
        prompt = _ready(prompt, plan)
    entry = patch.first_layers()
    order = sorted(range(plan.n_rows), key=entry.__getitem__)
    tail = [p - plan.split for p in patch.at(plan.n_tokens)]
    logits: list[Tensor] = [torch.empty(0)] * plan.n_rows
    for start in range(0, plan.n_rows, plan.rows_per_pass):
        some = order[start : start + plan.rows_per_pass]
        rows = with_unpatched(patch.select(some))
        (one,) = segments([prompt], [plan.split], rows.n_rows)
        one = replace(one, entry=(0, *(entry[i] for i in some)))
        edit = make_edit(model, rows, tail, plan.n_tokens - plan.split)
        found = model.pack([one], edit, steer=make_steer(rows, tail), logits=prompt.places).logits[0][1:]
        for index, row in zip(some, found, strict=True):
            logits[index] = row
    return torch.stack(logits)


# Each runs one prompt; packed prompts that are alike share forwards before it comes to this.
WAYS: Mapping[str, Callable[[Model, Patch, Prefix, Plan], Tensor]] = {
    "naive": lambda model, patch, prompt, _: naive.rows(model, patch, prompt),
    "batch": _batch,
    "expanded": _expanded,
    "packed": _in_passes,
    "layered": _layered,
}


def with_unpatched(patch: Patch) -> Patch:
    """A row of nothing before the others."""
    values, steering = patch.values, patch.steering
    if values.ndim == 4:
        values = torch.cat([torch.zeros_like(values[:1]), values])
    if steering is not None:
        steering = replace(steering, layers=[None, *patch.steered_after])
    heads = torch.cat([torch.zeros_like(patch.heads[:1]), patch.heads])
    return replace(patch, heads=heads, values=values, steering=steering)
