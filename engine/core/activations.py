"""What a model computes at its sites: captured at chosen tokens, patched or not, and its mean over many prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.core.checking import able
from engine.core.edits import keeping, make_edits, placed
from engine.core.patches import One, Patches, Positions
from engine.core.planning import MAX_TOKENS
from engine.core.prefix import Prefix, as_prefix, patched_positions
from engine.core.reading import SITES, check_model, read_patches, read_positions, read_site
from engine.core.runner import segments
from engine.distributed import ALONE, World, digest, identity
from engine.progress import track
from models import Model, PromptLike, Site
from models.reading import as_int
from models.shapes import Float

# Prompts that share a forward, with the positions wanted of each.
Group: TypeAlias = list[tuple[Prefix, list[int]]]


def capture(
    model: Model,
    prompts: Iterable[PromptLike],
    positions: Positions = -1,
    *,
    sites: Site | Sequence[Site] = "z",
    patches: One | Sequence[One] | None = None,
    progress: bool = False,
) -> Any:  # a tensor, or a dict of them by site
    """Activations at one token of each prompt (default the last) or at several; by default z, what every head outputs.

    sites:   one (default z), or several: `engine.Patch` says which there are.
    patches: captured under these, which have R rows: what they leave.

    Returns Float[N, L, U, W] in the model's dtype, for N prompts, with U units of W numbers ("scores" and "pattern":
    one for each token of the longest prompt, 0 where a shorter one has none); with an axis for rows, Float[N, R, ...],
    under patches, and one for positions before L if `positions` is a list: Float[N, P, L, U, W]. For several sites a
    dict of these. Raises ValueError for no prompts or an empty one, IndexError for a position outside a prompt,
    UnsupportedModelError for a site that the model does not have.

    >>> engine.capture(model, ["Q: hot\\nA:", "Q: big\\nA:"]).shape[0]
    2
    >>> sorted(engine.capture(model, ["Q: hot\\nA:"], sites=("resid_post", "q")))
    ['q', 'resid_post']
    """
    check_model(model)
    one, at = as_int(positions) is not None, read_positions(positions)
    wanted = read_sites(model, sites)
    rows = None if patches is None else read_patches(model, patches)
    chunks = [captured(model, few, wanted, rows) for few in _groups(model, prompts, at, progress, rows)]
    if not chunks:
        raise ValueError("no prompts were given")
    found = {site: _joined([chunk[site] for chunk in chunks]) for site in wanted}
    found = {site: x[:, 0] if rows is None else x for site, x in found.items()}  # [N, (R), P, L, U, W]
    found = {site: x.select(-4, 0) if one else x for site, x in found.items()}
    return found[sites] if isinstance(sites, str) else found


def mean_activations(
    model: Model,
    prompts: Iterable[PromptLike],
    *,
    sites: Site | Sequence[Site] = "z",
    progress: bool = True,
    world: World = ALONE,
) -> Any:  # a tensor, or a dict of them by site
    """Mean over prompts of z, or of other sites, at the last token: the values a task vector carries.

    Streamed: memory does not grow with the number of prompts. Summed in float64, returned in float32.

    sites: one (default z), or several; but for "scores" and "pattern", which have a number for each token.
    world: the ranks (`engine.distributed.joined`) that share out the forwards; default this process alone. Every rank
           is given all prompts and gets the same means, bit by bit those of one process.

    Returns Float[L, U, W], or a dict of them by site. Raises ValueError for no prompts, an empty one, a model whose
    activations are not finite, or ranks that were given different prompts; LostRankError if a rank is lost.

    Source: Multimodal Task Vectors (arXiv 2406.15334), section 3.1.

    >>> means = engine.mean_activations(model, ["Q: hot\\nA:", "Q: big\\nA:"], progress=False)
    """
    check_model(model)
    wanted = read_sites(model, sites)
    if odd := [site for site in wanted if not model.site(site).width]:
        raise ValueError(f"{odd[0]} has a number for each token of a prompt, of which there is no mean over prompts")
    if world.size > 1:
        world.same(identity(model))
    groups = _groups(model, prompts, (-1,), progress and world.rank == 0)
    sizes = {site: model.site(site) for site in wanted}
    total: dict[Site, Tensor] = {}
    count = 0
    while some := list(islice(groups, world.size)):  # one forward a rank
        if world.size > 1:
            packed = [one.packed for few in some for one in able(model, [prompt for prompt, _ in few])]
            world.same({"prompts": _digest(some), "rows packed": [not why for why in packed]})
        mine = [captured(model, few, wanted) for few in some[world.share(len(some))]]
        for site, size in sizes.items():
            none = torch.zeros(0, size.n_layers, size.units, size.width, dtype=torch.float64, device=model.device)
            summed = torch.cat([none, *(one[site].double().sum(dim=0)[0] for one in mine)])
            # Every forward's sum, added in the order of the prompts: the bits do not depend on the number of ranks.
            for each in world.gather(summed, len(some)):
                total[site] = total[site] + each if site in total else each
        count += sum(len(few) for few in some)
    if world.size > 1:
        world.same({"prompts": _digest([]), "rows packed": []})
    if not total:
        raise ValueError("no prompts were given")
    if not all(x.isfinite().all() for x in total.values()):
        raise ValueError(f"{model.name} gives NaN or infinite activations on these prompts")
    means = {site: (x / count).float() for site, x in total.items()}
    return means[sites] if isinstance(sites, str) else means


def read_sites(model: Model, sites: Site | Sequence[Site]) -> list[Site]:
    """Raises ValueError or UnsupportedModelError for what is no site of the model."""
    given = [sites] if isinstance(sites, str) else list(sites)
    if not given:
        raise ValueError(f"no sites were given: expected some of {list(SITES)}")
    for site in given:
        read_site(model, site)
    return given


def _joined(chunks: Sequence[Tensor]) -> Tensor:
    """One after the other; the last axis of all as long as the longest."""
    longest = max(x.shape[-1] for x in chunks)
    return torch.cat([pad(x, (0, longest - x.shape[-1])) for x in chunks])


def _groups(
    model: Model, prompts: Iterable[PromptLike], positions: tuple[int, ...], progress: bool, rows: Patches | None = None
) -> Iterator[Group]:
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
        if rows is not None:
            patched_positions(rows, prompt)
        full = sum(len(p.tokens) for p, _ in few) + n_tokens > MAX_TOKENS
        unlike = few and (n_tokens - min(at) != len(few[0][0].tokens) - min(few[0][1]) or rows is not None)
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
def captured(
    model: Model, few: Group, sites: Sequence[Site], patch: Patches | None = None, before: Collection[Site] = ()
) -> dict[Site, Float[Tensor, "some rows positions layers units width"]]:
    """One forward. Prompts are packed with their rows, one if nothing is patched, from the first wanted token on.

    before: sites of which is kept what the model computes there, not what patches make of it.
    """
    every = sorted({*sites, *(patch.sites if patch else ())})
    found = zip(few, able(model, [prompt for prompt, _ in few], sites=every), strict=True)
    plain = any(prompt.prompt.inputs or can.why_not("packed", len(prompt.tokens), every) for (prompt, _), can in found)
    if (plain or not {"scores", "pattern"}.isdisjoint(every)) and len(few) > 1:
        chunks = [captured(model, [one], sites, patch, before) for one in few]
        return {site: _joined([chunk[site] for chunk in chunks]) for site in sites}
    prompts, n_tokens, n_layers = [p for p, _ in few], len(few[0][0].tokens), model.shape.n_layers
    first = [min(at) if patch is None else min(*at, *patch.at(len(p.tokens))) for p, at in few]
    starts = [0] * len(few) if plain else first
    n_rows = 1 if patch is None else patch.n_rows
    where = torch.tensor([[p - s for p in at] for (_, at), s in zip(few, starts, strict=True)], device=model.device)
    where = where.repeat_interleave(n_rows, dim=0)  # [prompts * rows, positions]
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def keep(site: Site, _: int, x: Tensor) -> None:
        size, row = model.site(site), torch.arange(len(x), device=x.device)[:, None]
        here = x[row, where.to(x.device)]  # [prompts * rows, positions, units, width]
        units, width = size.units - here.shape[2], (size.width or n_tokens) - here.shape[3]
        kept[site].append(pad(here, (0, width, 0, units if site != "z" else 0)).to(model.device))

    edits = {} if patch is None else make_edits(model, placed(patch, n_tokens, starts[0]), len(few), n_tokens)
    edits = keeping(edits, sites, n_layers, keep, before)
    if plain:
        inputs = few[0][0].prompt.inputs
        model.forward(few[0][0].tokens.expand(n_rows, -1), edits, inputs=inputs)
    else:
        model.pack(segments(prompts, starts, n_rows), edits, logits=0)
    stacked = {site: torch.stack(x, dim=2).unflatten(0, (len(few), n_rows)) for site, x in kept.items()}
    return {site: model.all_heads(x, -2) if site == "z" else x for site, x in stacked.items()}
