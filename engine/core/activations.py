"""What the heads output: z captured at chosen tokens, and its mean over many prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.core.checking import able
from engine.core.patches import Positions, check_model, read_patch
from engine.core.planning import MAX_TOKENS
from engine.core.prefix import Prefix, as_prefix
from engine.core.runner import segments
from engine.distributed import ALONE, World, digest, identity
from engine.progress import track
from models import Model, PromptLike
from models.reading import as_int
from models.shapes import Float

# Prompts that share a forward, with the positions wanted of each.
Group: TypeAlias = list[tuple[Prefix, list[int]]]


def capture(
    model: Model, prompts: Iterable[PromptLike], positions: Positions = -1, *, progress: bool = False
) -> Float[Tensor, "prompts ..."]:
    """z, what every head outputs before W_O, at one token of each prompt (default the last) or at several.

    Returns Float[N, L, H, D] in the model's dtype, or Float[N, P, L, H, D] if `positions` is a list of P. Raises
    ValueError for no prompts or an empty one, IndexError for a position outside a prompt.

    >>> engine.capture(model, ["Q: hot\\nA:", "Q: big\\nA:"]).shape[0]
    2
    """
    one = as_int(positions) is not None
    at = read_patch(model, None, None, positions).positions
    chunks = [_capture(model, few) for few in _groups(model, prompts, at, progress)]
    if not chunks:
        raise ValueError("no prompts were given")
    z = torch.cat(chunks)
    return z[:, 0] if one else z


def mean_activations(
    model: Model, prompts: Iterable[PromptLike], *, progress: bool = True, world: World = ALONE
) -> Float[Tensor, "layers heads head_dim"]:
    """Mean over prompts of z at the last token: the values a task vector carries.

    Streamed: memory does not grow with the number of prompts. Summed in float64, returned in float32.

    world: the ranks (`engine.distributed.joined`) that share out the forwards; default this process alone. Every rank
           is given all prompts and gets the same means, bit by bit those of one process.

    Raises ValueError for no prompts, an empty one, a model whose activations are not finite, or ranks that were given
    different prompts; LostRankError if a rank is lost.

    Source: Multimodal Task Vectors (arXiv 2406.15334), section 3.1.

    >>> means = engine.mean_activations(model, ["Q: hot\\nA:", "Q: big\\nA:"], progress=False)
    """
    check_model(model)
    if world.size > 1:
        world.same(identity(model))
    shape = (model.shape.n_layers, model.shape.n_heads, model.shape.head_dim)
    groups = _groups(model, prompts, (-1,), progress and world.rank == 0)
    total, count = None, 0
    while True:
        some = list(islice(groups, world.size))  # one forward a rank
        if world.size > 1:
            packed = [one.packed for few in some for one in able(model, [prompt for prompt, _ in few])]
            world.same({"prompts": _digest(some), "rows packed": [not why for why in packed]})
        if not some:
            break
        mine = torch.zeros(0, *shape, dtype=torch.float64, device=model.device)
        for few in some[world.share(len(some))]:
            mine = torch.cat([mine, _capture(model, few).double().sum(dim=0)])
        # Every forward's sum, added in the order of the prompts: the bits do not depend on the number of ranks.
        for summed in world.gather(mine, len(some)):
            total = summed if total is None else total + summed
        count += sum(len(few) for few in some)
    if total is None:
        raise ValueError("no prompts were given")
    if not total.isfinite().all():
        raise ValueError(f"{model.name} gives NaN or infinite activations on these prompts")
    return (total / count).float()


def _groups(model: Model, prompts: Iterable[PromptLike], positions: tuple[int, ...], progress: bool) -> Iterator[Group]:
    """A few prompts at a time, as many as one forward takes, with the positions wanted of each."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, got one string")
    few: Group = []
    for one in track(prompts, "activations", progress):
        prompt = as_prefix(model, one)
        n_tokens = len(prompt.tokens)
        outside = [p for p in positions if not -n_tokens <= p < n_tokens]
        if outside:
            raise IndexError(f"position {outside[0]} lies outside the prompt, which has {n_tokens} tokens")
        at = [p % n_tokens for p in positions]
        full = sum(len(p.tokens) for p, _ in few) + n_tokens > MAX_TOKENS
        unlike = few and n_tokens - min(at) != len(few[0][0].tokens) - min(few[0][1])
        alone = prompt.prompt.inputs or (few and few[0][0].prompt.inputs)
        if few and (full or unlike or alone):
            yield few
            few = []
        few.append((prompt, at))
    if few:
        yield few


def _digest(groups: Sequence[Group]) -> str:
    prompts = [[prompt.prompt for prompt, _ in few] for few in groups]
    lengths = [[len(one.ids) for one in few] for few in prompts]
    return digest(lengths, *(part for few in prompts for one in few for part in (one.ids, *one.inputs.values())))


@torch.no_grad()
def _capture(model: Model, few: Group) -> Float[Tensor, "some positions layers heads head_dim"]:
    """One forward. Prompts are packed with one unpatched row each, from the first wanted position on."""
    found = zip(few, able(model, [prompt for prompt, _ in few]), strict=True)
    plain = any(prompt.prompt.inputs or can.why_not("packed", len(prompt.tokens)) for (prompt, _), can in found)
    if plain and len(few) > 1:
        return torch.cat([_capture(model, [one]) for one in few])
    starts = [0 if plain else min(at) for _, at in few]
    where = torch.tensor([[p - s for p in at] for (_, at), s in zip(few, starts, strict=True)], device=model.device)
    prompt = torch.arange(len(few), device=model.device)[:, None]
    kept: list[Tensor] = []

    def keep(layer: int, z: Tensor) -> Tensor:
        here = z[prompt.to(z.device), where.to(z.device)]  # [prompts, positions, H, D]
        kept.append(pad(here, (0, model.shape.head_dim - z.shape[-1])))
        return z

    if plain:
        model.forward(few[0][0].tokens[None], keep, inputs=few[0][0].prompt.inputs)
    else:
        model.pack(segments([p for p, _ in few], starts, 1), keep, logits=0)
    return model.all_heads(torch.stack([z.to(model.device) for z in kept], dim=2), -2)
