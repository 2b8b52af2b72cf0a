"""What a model can do, seen: every way that may be taken is compared with naive, on the caller's own prompt.

Rules (`models.rules`) decide what is exact. This is the net under them, for models whose code, or whose hooks, do
something that no rule knows of. It looks where the fast ways differ from plain forwards: several rows of several
prompts in one pass, rows of several tokens, a prefix used again. It is made anew when the model is in another state,
and when a prompt is more than twice as long as the longest that was compared (with hooks of others: longer at all).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.core import naive, runner
from engine.core.capabilities import Established, known, learn
from engine.core.patches import Change, Patch, Patches
from engine.core.planning import Request, Strategy, make_plan
from engine.core.prefix import Prefix, compute, why_not_split
from models import Capabilities, Edits, Encoded, KeyValues, Model, Site, UnsupportedModelError
from models.shapes import Float

# Rounding, in units of what rounding every head's output once more does to the logits; tiny models of all families: at
# most 1.5, in float32 as in half precision.
TIMES = 4
# Of the largest logit: what counts as exact in float32. SmolLM2, one thread, was 4.1 units (2.6e-6) apart, and 7.6
# (1.1e-5) with queries drawn at random, which multiply its large keys.
EXACT = 2e-5
SHORTEST = 8  # tokens; shorter prompts are repeated
UNCLEAR = "a prompt gives infinite or undefined logits, by which no way can be compared: its rows are batched"
SAYS = {
    "layered": "rows no longer come in layer by layer",
    "packed": "rows are not packed from now on",
    "expanded": "rows do not go on from its cache from now on",
    "batch": "rows are not batched from now on",
}


def able(
    model: Model,
    prompts: Sequence[Prefix],
    strategy: Strategy = "auto",
    layered: bool = False,
    found: Mapping[bool, Established] | None = None,
    sites: Collection[Site] = frozenset({"z"}),
) -> list[Capabilities]:
    """What is exact for each of these prompts, the ways compared that may be taken, patched at these sites; layered:
    rows may come in late.

    auto: one that is not exact is warned of and refused, so that the next is taken. A named strategy that is not exact
    raises UnsupportedModelError with the figure. Refusals of the rules are the plan's business.
    found: what is known already (`of_kinds`).
    """
    seen: dict[bool, Capabilities] = {}
    for images, here in (found or of_kinds(model, prompts)).items():
        some = [prompt for prompt in prompts if bool(prompt.prompt.inputs) == images]
        seen[images] = _established(model, some, images, strategy, layered, here, sites).can
    return [seen[bool(prompt.prompt.inputs)] for prompt in prompts]


def of_kinds(model: Model, prompts: Sequence[Prefix]) -> dict[bool, Established]:
    """What is known of prompts without images, and with them, as far as there are such."""
    state = next((prompt.state for prompt in prompts if len(prompt.cache)), None)  # which `as_prefix` has seen to hold
    return {images: known(model, images, state) for images in {bool(prompt.prompt.inputs) for prompt in prompts}}


def _established(
    model: Model,
    prompts: Sequence[Prefix],
    images: bool,
    strategy: Strategy,
    layered: bool,
    here: Established,
    sites: Collection[Site],
) -> Established:
    for way, site in ((way, site) for way in _ways(strategy, layered) for site in sorted(sites)):
        packs = not here.can.why_not("packed", sites=sites)
        if here.can.why_not(way, sites=[site]) or (way == "expanded" and strategy == "auto" and packs):
            continue
        limit = here.can.longest if way != "batch" else model.shape.max_tokens
        fitting = [prompt for prompt in prompts if len(prompt.tokens) <= limit]
        longest = max((len(prompt.tokens) for prompt in fitting), default=0)
        checked = here.checked.get((way, site), 0)
        if longest <= checked or not fitting:
            continue
        if 2 * checked >= longest and not model.foreign_hooks():
            continue
        probes = _probes(model, fitting, limit)
        if not probes:
            continue
        if site == "z":
            _see_heads(model, probes[0])
        refused = _compare(model, probes, way, here.can, site)
        if refused is None:  # for this call nothing is shared, and nothing is known of others
            warnings.warn(f"{model.name}: {UNCLEAR}", stacklevel=5)
            return here if strategy != "auto" else replace(here, can=Capabilities(UNCLEAR, UNCLEAR, UNCLEAR))
        can = here.can
        if refused and way == strategy:
            raise UnsupportedModelError(f"strategy {way!r} is not exact on {model.name}: {refused}")
        if refused:
            warnings.warn(f"{model.name}: {SAYS[way]}, {refused}", stacklevel=5)
            can = can.without(way, refused)
        here = learn(model, images, Established(here.state, can, {**here.checked, (way, site): longest}))
    return here


def _ways(strategy: Strategy, layered: bool) -> Iterator[str]:
    if strategy == "auto":
        yield from ("packed", "expanded", "batch")
    if strategy in ("packed", "expanded", "layered"):
        yield "packed"  # prefixes are computed so, where that is exact
    if strategy in ("expanded", "batch"):
        yield strategy
    if strategy == "layered" or (layered and strategy == "auto"):
        yield "layered"


def _probes(model: Model, prompts: Sequence[Prefix], limit: int) -> list[Prefix]:
    """The longest of the prompts and, if it is text, one that is a token shorter."""
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    if longest.prompt.inputs or not model.generates:
        whole = why_not_split(longest.prompt, len(longest.tokens) - 1)
        return [] if whole else [replace(longest, cache=KeyValues(), places=1)]
    ids, shortest = longest.tokens, min(SHORTEST, limit, model.shape.max_tokens)
    if len(ids) < shortest:
        ids = ids.repeat(shortest)[:shortest]
    return [Prefix(Encoded(some), KeyValues(), model) for some in (ids, ids[1:])] if len(ids) > 3 else []


@torch.no_grad()
def _see_heads(model: Model, probe: Prefix) -> None:
    """Raises UnsupportedModelError if a forward passes by all heads: patching would have no effect."""
    seen: set[int] = set()

    def see(layer: int, z: Tensor) -> Tensor:
        seen.add(layer)
        return z

    edits: Edits = {"z": {layer: partial(see, layer) for layer in range(model.shape.n_layers)}}
    model.forward(
        probe.tokens[None] if probe.prompt.inputs else probe.tokens[None, :4], edits, None, probe.prompt.inputs
    )
    if not seen:
        raise UnsupportedModelError(
            f"{model.name}: patching has no effect, its logits do not come through the output projections that were "
            "found: declare others, models.wrap(model, projections=[...])"
        )


@torch.no_grad()
def _compare(model: Model, probes: Sequence[Prefix], way: str, can: Capabilities, site: Site) -> str | None:
    """How far rows are from naive ones if that is more than rounding, empty if it is not; None if nobody can say."""
    patch = _some_rows(model, way, site)
    want = torch.stack([naive.rows(model, patch, probe) for probe in probes])
    noise = torch.stack([naive.rows(model, patch, probe, rounding=True) for probe in probes])
    if not (want.isfinite().all() and noise.isfinite().all()):
        return None
    try:
        apart = max(_apart(want, got) for got in _runs(model, patch, probes, way, can))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's code may raise where it is given what it does not expect
        said = (str(error).splitlines() or [""])[0]
        return said if isinstance(error, UnsupportedModelError) else f"they fail: {said} ({type(error).__name__})"
    bound = max(EXACT, TIMES * _apart(want, noise))
    if apart <= bound:
        return ""
    hooks = model.foreign_hooks()
    carried = f"; it carries hooks that others put on {', '.join(hooks[:3])}" if hooks else ""
    return f"{way} rows were off the naive ones by {apart:.1e} of the largest logit (rounding: {bound:.0e}){carried}"


def _some_rows(model: Model, way: str, site: Site) -> Patches:
    """Two rows of half of the units each; what attention computes is shifted, so that it stays what it can be."""
    size, random = model.site(site), torch.Generator().manual_seed(0)
    units = torch.rand(2, size.n_layers, size.units, generator=random) < 0.5
    for layer, (here, _) in enumerate(size.sizes):
        units[:, layer, here:] = False
    if way == "layered":
        units[1, : size.n_layers // 2] = False
    if not size.width:
        units[:, :, 0] |= units.sum(dim=(1, 2))[:, None] == 0
        values, mode = torch.rand(1, 1, 1, 1, 1, generator=random), "scale"
    else:
        values, mode = torch.randn(1, 1, size.n_layers, size.units, size.width, generator=random), "replace"
    patch = Patch(site, units, values, -1, mode)  # type: ignore[arg-type]
    return Patches((Change(patch, site, units, (-1,), values),), 2, size.n_layers)


def _runs(
    model: Model, patch: Patches, probes: Sequence[Prefix], way: str, can: Capabilities
) -> Iterator[Float[Tensor, "prompts rows vocab"]]:
    """All rows of all prompts in one pass where the way can: rows of one token and of two (some hooks do nothing to
    one, others to the last of two), with prefixes fresh and used again.
    """
    asked = [Request(len(p.tokens), patch.n_rows, patch.at(len(p.tokens)), entry=patch.first_layers()) for p in probes]
    plans = [make_plan(model.shape, can, one, way) for one in asked]  # type: ignore[arg-type]
    yield runner.run(model, patch, probes, plans)
    if way in ("packed", "layered"):
        yield runner.run(model, patch, compute(probes, [plan.split for plan in plans]), plans)
    if way != "batch" and not any(why_not_split(probe.prompt, len(probe.tokens) - 2) for probe in probes):
        yield runner.run(model, patch, probes, [replace(plan, split=plan.split - 1) for plan in plans])


def _apart(want: Tensor, got: Tensor) -> float:
    """The largest difference of logits, as a share of the largest."""
    far = ((got - want).abs().amax() / want.abs().amax()).item()
    return far if far == far else float("inf")
