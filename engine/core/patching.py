"""The verb everything else is built on: what does the model say when these activations are something else?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.core.capabilities import known
from engine.core.checking import able, of_kinds
from engine.core.patches import Heads, Mode, One, Patches, Positions, Values, no_patch
from engine.core.planning import Plan, Request, Strategy, make_plan
from engine.core.prefix import Prefix, Prompts, as_prefix, as_prefixes, patched_positions, why_not_split
from engine.core.reading import check_model, read_patches, read_positions
from engine.core.runner import run
from models import Model, PromptLike
from models.reading import read_int
from models.shapes import Float, Integer


def patch(
    model: Model,
    prompt: Prompts,
    patches: One | Sequence[One] | None = None,
    *,
    heads: Heads = None,
    values: Values = None,
    positions: Positions = -1,
    mode: Mode = "replace",
    strategy: Strategy = "auto",
) -> Float[Tensor, "*prompts rows vocab"]:
    """Logits of the last token, for every row patched: exactly those of one hooked forward a row.

    prompt:    a string, token ids, a `Prompt`, or a `Prefix` from `engine.prefill`; or a list of these, of any lengths.
    patches:   `engine.Patch`, `Knockout` or `Edit`, one or several, at any sites, with equally many rows R or one.
    heads, values, positions, mode: short for one more, Patch("z", heads, values, positions, mode):
    heads:     Bool[R, L, H], one row each; Bool[L, H] or a list of (layer, head): one row; None: one unpatched row.
    values:    Float[L, H, D] for all rows, or Float[R, L, H, D], one set a row: what the heads output before W_O; with
               an axis of P positions Float[R or 1, P, L, H, D].
    positions: token or tokens patched, negative ones counted from the end. Default: the last.
    mode:      "replace" the heads' output, "add" the values to it, or "scale" it by them.
    strategy:  "auto" picks the cheapest that is exact (`engine.plan` says which, and why); "layered", "packed",
               "expanded", "batch" and "naive" are used as named, or refused.

    Returns Float[R, vocab] in the model's dtype, or Float[N, R, vocab] for a list of N prompts. Differentiable with
    respect to the `values` of patches that require a gradient. Integers and arrays may be numpy's. Raises TypeError,
    ValueError, IndexError or UnsupportedModelError before anything is computed.

    Source: z of the last token replaced head by head as in Multimodal Task Vectors (arXiv 2406.15334), section 3.

    >>> logits = engine.patch(model, "Q: hot\\nA:", heads=[(10, 3), (12, 0)], values=means)
    >>> logits.shape == (1, model.shape.vocab_size)
    True
    """
    checked = read_patches(model, patches, heads, values, positions, mode)
    several, prompts = as_prefixes(model, prompt)
    at, entry = [patched_positions(checked, p) for p in prompts], checked.first_layers()
    asked = [request(p, checked, positions, entry) for p, positions in zip(prompts, at, strict=True)]
    logits = run(model, checked, prompts, decide(model, prompts, asked, strategy))
    return logits if several else logits[0]


def plan(
    model: Model,
    prompt: PromptLike | Prefix,
    patches: One | Sequence[One] | None = None,
    *,
    rows: Integer = 1,
    positions: Positions = -1,
    strategy: Strategy = "auto",
) -> Plan:
    """What `patch` would do with these patches, or `rows` rows of z, of this prompt, and why; nothing is computed.

    >>> print(engine.plan(model, "Q: hot\\nA:", rows=32))
    packed: 32 rows of 6 tokens, 5 of them shared; 37 tokens computed in 1 pass (naive: 192); rows differ only from ...
    """
    check_model(model)
    ready, n_rows = as_prefix(model, prompt), read_int(rows, "rows")
    checked = no_patch(model.shape.n_layers, n_rows, read_positions(positions))
    checked = checked if patches is None else read_patches(model, patches)
    entry = () if patches is None else checked.first_layers()
    asked = request(ready, checked, patched_positions(checked, ready), entry)
    return make_plan(model.shape, known(model, bool(ready.prompt.inputs)).can, asked, strategy)


def request(prompt: Prefix, patch: Patches, positions: Sequence[int], entry: Sequence[int] = ()) -> Request:
    """What is asked of a prompt patched at these positions of it, its rows from these layers on."""
    unsplit = why_not_split(prompt.prompt, min(positions))
    return Request(len(prompt.tokens), patch.n_rows, positions, len(prompt.cache), entry, unsplit, patch.sites)


def decide(model: Model, prompts: Sequence[Prefix], asked: Sequence[Request], strategy: Strategy) -> list[Plan]:
    """A plan for each prompt. The rules refuse what they must before anything runs; what they allow is compared."""
    before = of_kinds(model, prompts)
    first = [
        make_plan(model.shape, before[bool(prompt.prompt.inputs)].can, one, strategy)
        for prompt, one in zip(prompts, asked, strict=True)
    ]
    late = any(plan.strategy == "layered" for plan in first)
    sites = frozenset(site for one in asked for site in one.sites)
    found = able(model, prompts, strategy, late, before, sites)
    return [make_plan(model.shape, can, one, strategy) for can, one in zip(found, asked, strict=True)]
