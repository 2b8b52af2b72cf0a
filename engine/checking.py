"""A model met for the first time is checked once: one row of each strategy against naive, on the caller's own prompt.

Rules decide what is exact (`packing_refused`, `sharing_refused`); this is the net under them, for models whose code
does something that no rule here knows of.
"""

from __future__ import annotations

import warnings

import torch

from engine import naive, runner
from engine.intervention import Patch
from engine.planning import Strategy, make_plan
from engine.prefix import Prefix, why_not_split
from models import Model, UnsupportedModelError

# Largest logit difference, as a share of the largest logit, that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}
COARSE = 0.05  # half precision: only gross errors show

# By architecture, strategy, and whether the prompt had images.
_differences: dict[tuple[str, str, bool], float] = {}


def check_once(model: Model, prompt: Prefix, strategy: Strategy = "auto") -> None:
    """See that the strategies that may be chosen are exact on models of this architecture.

    auto: one that is not is warned of and refused from now on, so that the next is taken. A named strategy that is not
    exact raises UnsupportedModelError with the figure.
    """
    if strategy in ("batch", "naive") or model.sharing_refused or len(prompt.tokens) < 3:
        return
    if why_not_split(prompt.prompt, len(prompt.tokens) - 1):
        return
    if strategy in ("auto", "packed") and not model.packing_refused and (found := _wrong(model, prompt, "packed")):
        if strategy == "packed":
            raise UnsupportedModelError(f"strategy 'packed' is not exact on {model.name}: {found}")
        warnings.warn(f"{model.name}: rows are not packed from now on, {found}", stacklevel=4)
        model.packing_refused = found
    if (strategy == "expanded" or model.packing_refused) and (found := _wrong(model, prompt, "expanded")):
        if strategy == "expanded":
            raise UnsupportedModelError(f"strategy 'expanded' is not exact on {model.name}: {found}")
        warnings.warn(f"{model.name}: no prefix is shared from now on, {found}", stacklevel=4)
        model.sharing_refused = found


def check_layered(model: Model, prompt: Prefix, strategy: Strategy) -> None:
    """The same for rows that come in layer by layer, when they are about to."""
    if model.layering_refused or why_not_split(prompt.prompt, len(prompt.tokens) - 1):
        return
    if found := _wrong(model, prompt, "layered"):
        if strategy == "layered":
            raise UnsupportedModelError(f"strategy 'layered' is not exact on {model.name}: {found}")
        warnings.warn(f"{model.name}: rows no longer come in layer by layer, {found}", stacklevel=4)
        model.layering_refused = found


def _wrong(model: Model, prompt: Prefix, strategy: Strategy) -> str:
    """How far one row is from naive, if that is more than rounding; empty if it is not."""
    key = (model.architecture, strategy, bool(prompt.prompt.inputs))
    if key not in _differences:
        _differences[key] = difference(model, prompt, strategy)
    if _differences[key] <= TOLERANCE.get(model.dtype, COARSE):
        return ""
    return f"one {strategy} row was off the naive one by {_differences[key]:.1e} of the largest logit"


@torch.no_grad()
def difference(model: Model, prompt: Prefix, strategy: Strategy) -> float:
    """Largest logit difference of one patched row to naive, as a share of the largest logit."""
    shape, random = model.shape, torch.Generator().manual_seed(0)
    heads = torch.rand(1, shape.n_layers, shape.n_heads, generator=random) < 0.5
    if strategy == "layered":
        heads[:, : shape.n_layers // 2] = False
    values = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    patch = Patch(heads, values, (-1,), "replace")
    last = len(prompt.tokens) - 1
    plan = make_plan(shape, last + 1, 1, [last], strategy, len(prompt.cache))
    want = naive.rows(model, patch, prompt)
    got = runner.run(model, patch, [prompt], [plan])[0]
    return ((got - want).abs().max() / want.abs().max()).item()
