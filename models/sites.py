"""Sites: named places in every layer whose numbers can be read and changed. A new one is an entry of `SITES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

from models.anatomy import Anatomy
from models.interface import Site, UnsupportedModelError

# An MLP within a block, and in it, or in the block itself, the projection from its neurons to the residual stream.
MLPS = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe")
DOWNS = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "wo", "Wo", "proj", "output.dense", "dense")
BRIDGED = "_original_component."  # where TransformerLens puts the parts of a module

# What a module is given; the same, where a skip connection holds it as well; what it gives; what attention is handed.
Side: TypeAlias = Literal["given", "shared", "gives", "attention"]
# A token's numbers as units: one vector; heads; single numbers; heads, with a number for each token seen.
Split: TypeAlias = Literal["vector", "heads", "numbers", "tokens"]


@dataclass(frozen=True)
class Entry:
    """find: the module of every layer; of a shared site the blocks, one of whose parts it is (`models.seeing`)."""

    side: Side
    split: Split
    find: Callable[[Anatomy], Sequence[nn.Module]] = lambda body: ()


@dataclass(frozen=True)
class Place:
    """Where a site is in a model: the module of each layer, none for attention; sizes: units and width of each."""

    entry: Entry
    modules: Sequence[nn.Module]
    sizes: Sequence[tuple[int, int]] = ()


def blocks(body: Anatomy) -> Sequence[nn.Module]:
    if not body.blocks:
        raise UnsupportedModelError("its blocks were not found")
    return body.blocks


def downs(body: Anatomy) -> Sequence[nn.Module]:
    """The projection that ends each MLP."""
    found: list[nn.Module] = []
    for layer, block in enumerate(blocks(body)):
        if (down := find_down(block)) is None:
            kind = "a mixture of experts" if find_mlp(block) is not None else "of a kind that is not known"
            raise UnsupportedModelError(f"the MLP of layer {layer} is {kind}: it has no one list of neurons")
        found.append(down)
    return found


def mlps(body: Anatomy) -> Sequence[nn.Module]:
    """What ends each MLP: its projection, or the whole of one that has several (a mixture of experts)."""
    found = [find_down(block) or find_mlp(block) for block in blocks(body)]
    if None in found:
        raise UnsupportedModelError(f"layer {found.index(None)} has no MLP by one of the names {MLPS}")
    return found  # type: ignore[return-value]


def find_mlp(block: nn.Module) -> nn.Module | None:
    return next((x for name in MLPS if isinstance(x := getattr(block, name, None), nn.Module)), None)


def find_down(block: nn.Module) -> nn.Module | None:
    inner: dict[str, nn.Module] = {}
    for name, module in (find_mlp(block) or block).named_modules():
        inner.setdefault(name.replace(BRIDGED, ""), module)
    return next((inner[name] for name in DOWNS if name in inner), None)


SITES: Mapping[Site, Entry] = {
    "resid_pre": Entry("given", "vector", blocks),
    "resid_mid": Entry("shared", "vector", blocks),
    "resid_post": Entry("gives", "vector", blocks),
    "attn_out": Entry("gives", "vector", lambda body: body.projections),
    "mlp_out": Entry("gives", "vector", mlps),
    "mlp_act": Entry("given", "numbers", downs),
    "z": Entry("given", "heads", lambda body: body.projections),
    "q": Entry("attention", "heads"),
    "k": Entry("attention", "heads"),
    "v": Entry("attention", "heads"),
    "scores": Entry("attention", "tokens"),
    "pattern": Entry("attention", "tokens"),
}
