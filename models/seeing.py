"""A site found in a model: seen in a forward of a few tokens, in every layer, once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.anatomy import Anatomy, input_width
from models.calls import Call, Hook
from models.hooks import hooked
from models.interface import Edit, Site, UnsupportedModelError
from models.sites import SITES, Place, blocks, mlps

if TYPE_CHECKING:
    from models.huggingface import HuggingFace

TOKENS = 4
AROUND: tuple[Site, Site] = ("resid_pre", "resid_post")  # of a block
SAME = 1e-4  # of the largest number: what rounding may make of the same


@torch.no_grad()
def locate(model: HuggingFace, name: Site, body: Anatomy) -> Place | str:
    """Where the site is, and its sizes; or why the model does not have it."""
    entry, n_layers = SITES[name], body.shape.n_layers
    if model._mesh is not None and name not in ("resid_pre", "resid_post"):
        return "it is shared out over processes, each of which has a part"
    try:
        modules = entry.find(body)
        if entry.side == "shared":
            place = _shared(model, name, body)
        elif entry.side == "attention":
            place = Place(entry, ())
        elif entry.split == "numbers":
            # TransformerLens puts a module of its own around each.
            bare = [getattr(module, "original_component", module) for module in modules]
            place = Place(entry, modules, [(input_width(module), 1) for module in bare])
        else:
            place = Place(entry, modules, [(1, body.shape.d_model)] * n_layers)
        seen = _see(model, name, place)
    except UnsupportedModelError as error:
        return str(error).removeprefix(f"{model.name} ")
    if sorted(seen) != list(range(n_layers)):
        where = "does not go through an attention that can be seen" if entry.side == "attention" else "passes by it"
        return f"in {n_layers - len(seen)} of {n_layers} layers {type(model.hf).__name__} {where}"
    sizes = [(units, 0 if entry.split == "tokens" else width) for _, (units, width) in sorted(seen.items())]
    return replace(place, sizes=sizes)


def _see(model: HuggingFace, name: Site, place: Place) -> dict[int, tuple[int, int]]:
    """Units and width of every layer that a forward shows."""
    seen: dict[int, tuple[int, int]] = {}

    def see(layer: int, x: Tensor) -> Tensor:
        if x.shape[:1] != (1,) or layer in seen:
            raise UnsupportedModelError(f"layer {layer} hands over {list(x.shape)}, where one prompt was run")
        seen[layer] = (x.shape[2], x.shape[3])
        return x

    _run(model, {name: (place, {layer: partial(see, layer) for layer in range(model._body.shape.n_layers)})})
    return seen


def _run(model: HuggingFace, edits: Mapping[Site, tuple[Place, Mapping[int, Edit]]]) -> None:
    with model._running(model._body, Call()), model.edited(edits):
        model._logits(model.few_tokens(TOKENS))


def _shared(model: HuggingFace, name: Site, body: Anatomy) -> Place:
    """The residual stream after attention: what a part of the block is given that runs after attention, such that with
    it replaced, the block gives the same whatever came in.
    """
    if SITES[name].side != "shared" or not body.whole:
        raise UnsupportedModelError("its blocks are not a list, one for each layer")
    sizes = [(1, body.shape.d_model)] * body.shape.n_layers
    for part in _after_attention(model, body):
        try:
            modules = [block.get_submodule(part) for block in blocks(body)]
            if _decides(model, name, Place(SITES[name], modules, sizes), body):
                return Place(SITES[name], modules, sizes)
        except (UnsupportedModelError, AttributeError, RuntimeError):
            continue
    raise UnsupportedModelError(
        "no part of its block is given the sum of residual stream and attention (attention and MLP run in parallel)"
    )


def _after_attention(model: HuggingFace, body: Anatomy) -> list[str]:
    """Parts of the first block that run after attention, in order, up to the one that ends the MLP."""
    block, order = body.blocks[0], []
    names = {id(part): name for name, part in block.named_children()}

    def note(part: nn.Module, *_: object) -> None:
        order.append(names[id(part)])

    def hooks() -> Iterator[object]:
        for part in block.children():
            yield part.register_forward_pre_hook(Hook(note))

    def at(inner: nn.Module) -> int:
        around = {name for name, part in block.named_children() if any(x is inner for x in part.modules())}
        return max((i for i, part in enumerate(order) if part in around), default=len(order))

    with model._running(body, Call()), hooked(hooks):
        model._logits(model.few_tokens(TOKENS))
    return list(dict.fromkeys(order[at(body.attentions[0]) + 1 : at(mlps(body)[0]) + 1]))


def _decides(model: HuggingFace, name: Site, place: Place, body: Anatomy) -> bool:
    """Whether every block gives the same for another input, the site being the same."""
    layers = range(body.shape.n_layers)
    before, after = (replace(place, entry=SITES[site], modules=body.blocks) for site in AROUND)
    given: list[dict[int, Tensor]] = [{}, {}]
    for run, out in enumerate(given):
        random = torch.Generator().manual_seed(run)

        def noise(x: Tensor, random: torch.Generator = random) -> Tensor:
            return x + torch.randn(x.shape, generator=random).to(x) * (1 + x.abs().mean())

        def fixed(layer: int, x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=torch.Generator().manual_seed(layer)).to(x)

        def keep(layer: int, x: Tensor, out: dict[int, Tensor] = out) -> Tensor:
            out[layer] = x.clone()
            return x

        _run(
            model,
            {
                "resid_pre": (before, dict.fromkeys(layers, noise)),
                name: (place, {layer: partial(fixed, layer) for layer in layers}),
                "resid_post": (after, {layer: partial(keep, layer) for layer in layers}),
            },
        )
    one, other = given
    seen = set(layers) <= one.keys()  # cross-attention layers are passed by without an image
    return seen and all((one[i] - other[i]).abs().max() <= SAME * one[i].abs().max() for i in layers)
