"""Rows with edges removed, as edits of one forward: which satellite stands for which receiver, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from engine.questions.edges.graph import Graph
from engine.questions.edges.senders import Run
from models import Edit, Edits, Site
from models.shapes import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class Circuits:
    """senders: for each row those from which any edge is removed; -1: no more. removed: which of their edges.
    serves:    for each row and receiver its member: 0, the row itself, or one of its satellites.
    shown:     for each row, satellite and place in a forward, a receiver that is given what the satellite is; -1: none.
    """

    graph: Graph
    senders: Int[Tensor, "rows some"]
    removed: Bool[Tensor, "rows some receivers"]
    serves: Int[Tensor, "rows receivers"]
    shown: Int[Tensor, "rows satellites places"]

    @classmethod
    def of(cls, graph: Graph, keep: Bool[Tensor, "rows senders receivers"]) -> Circuits:
        removed = graph.exists & ~keep.cpu()
        touched = removed.any(dim=1)
        touched[:, -1] = False  # logits are the row's own to give
        serves = torch.zeros(touched.shape, dtype=torch.long)
        found: dict[tuple[int, int], dict[bytes, int]] = {}
        shown: list[tuple[int, int, int, int]] = []
        for row, receiver in touched.nonzero().tolist():
            place = _place(graph, receiver)
            alike = found.setdefault((row, place), {})
            column = removed[row, :, receiver].numpy().tobytes()
            if column not in alike:
                alike[column] = len(alike) + 1
                shown.append((row, alike[column] - 1, place, receiver))
            serves[row, receiver] = alike[column]
        satellites = max(map(len, found.values()), default=0)
        by_place = torch.full((len(keep), satellites, 2 * graph.n_layers), -1)
        for row, satellite, place, receiver in shown:
            by_place[row, satellite, place] = receiver
        senders = _each(removed.any(dim=2))
        own = senders.clamp(min=0)[..., None].expand(-1, -1, removed.shape[2])
        return cls(graph, senders, removed.gather(1, own) & (senders >= 0)[..., None], serves, by_place)

    @property
    def n_rows(self) -> int:
        return len(self.serves)

    @property
    def members(self) -> int:
        """A row and its satellites, which follow each other in a batch."""
        return 1 + self.shown.shape[1]

    @property
    def layers(self) -> list[int]:
        """Those with heads among the senders."""
        every = ((self.graph.heads(layer), layer) for layer in range(self.graph.n_layers))
        return [layer for at, layer in every if ((self.senders >= at.start) & (self.senders < at.stop)).any()]

    def running(self, source: Run, w_o: Mapping[int, Tensor]) -> Running:
        """Source: whose outputs edges are given. w_o: of `layers`, as `senders.heads_of` has it."""
        size = (*self.senders.shape, *source.outputs.shape[1:])
        return Running(self, w_o, source.outputs, source.outputs.new_zeros(size))


def _place(graph: Graph, receiver: int) -> int:
    """Twice the layer, and one more for what is given to an MLP after attention."""
    layer, within = divmod(receiver, graph.per_layer)
    return 2 * layer + (within == graph.per_layer - 1 and not graph.parallel)


def _each(mask: Bool[Tensor, "rows units"]) -> Int[Tensor, "rows most"]:
    """The units of each row, and -1 after them in rows that have fewer than the most."""
    counts = mask.sum(dim=1)
    first = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return first.masked_fill(torch.arange(first.shape[1]) >= counts[:, None], -1)


@dataclass(frozen=True, eq=False)
class Running:
    """A forward on its way.

    w_o:    of single heads, by layer.
    source: what all senders give in the source's run.
    change: how that differs, of those of each row, from what they give in it; filled in as the forward comes by them.
    """

    circuits: Circuits
    w_o: Mapping[int, Float[Tensor, "heads head_dim d_model"]]
    source: Float[Tensor, "senders tokens d_model"]
    change: Float[Tensor, "rows some tokens d_model"] = field(repr=False)

    def edits(self) -> Edits:
        """Where anything is to do, and only there."""
        circuits, graph, attending = self.circuits, self.circuits.graph, self.circuits.layers
        made: dict[Site, dict[int, Edit]] = {}

        def put(site: Site, layer: int, edit: Edit) -> None:
            made.setdefault(site, {})[layer] = edit

        for layer in range(graph.n_layers):
            if (circuits.shown[:, :, 2 * layer] >= 0).any():
                put("resid_pre", layer, partial(self._give, 2 * layer))
            if (circuits.shown[:, :, 2 * layer + 1] >= 0).any():
                put("resid_mid", layer, partial(self._give, 2 * layer + 1))
            if layer in attending:
                put("z", layer, partial(self._note_heads, layer))
            for site, receivers in graph.given(layer).items():
                takes = circuits.serves[:, receivers].any()
                sends = site == "mlp_out" and (circuits.senders == graph.mlp(layer)).any()
                if takes or sends:
                    put(site, layer, partial(self._take, site, layer))
        if (circuits.senders == 0).any():
            put("resid_pre", 0, self._note_input)
        if circuits.removed[:, :, -1].any():
            put("resid_post", graph.n_layers - 1, self._give_logits)
        return made

    def _members(self, x: Tensor) -> Float[Tensor, "rows members tokens units width"]:
        return x.unflatten(0, (self.circuits.n_rows, self.circuits.members))

    def _removed(self, receivers: Int[Tensor, "rows some"]) -> Float[Tensor, "rows some tokens d_model"]:
        """What is added to the stream for each of these receivers of each row; nothing for -1."""
        each = torch.arange(len(receivers))[:, None]
        removed = self.circuits.removed[each, :, receivers] & (receivers >= 0)[..., None]
        return (removed.to(self.change) @ self.change.flatten(2)).unflatten(2, self.change.shape[2:])

    def _note_input(self, x: Tensor) -> Tensor:
        self._note(0, lambda rows: self._members(x)[rows, 0, :, 0])
        return self._give(0, x) if (self.circuits.shown[:, :, 0] >= 0).any() else x

    def _give(self, place: int, x: Tensor) -> Tensor:
        """Satellites are given the row's stream less its removed edges."""
        members = self._members(x)
        members[:, 1:] = members[:, :1] + self._removed(self.circuits.shown[:, :, place])[:, :, :, None].to(x)
        return x

    def _give_logits(self, x: Tensor) -> Tensor:
        members = self._members(x)
        logits = torch.full((len(members), 1), len(self.circuits.graph.receivers) - 1)
        members[:, 0] += self._removed(logits)[:, 0, :, None].to(x)
        return x

    def _take(self, site: Site, layer: int, x: Tensor) -> Tensor:
        """The row takes each unit from the member that stands for it."""
        members = self._members(x)
        serves = self.circuits.serves[:, self.circuits.graph.given(layer)[site]].to(x.device)  # [rows, units]
        if serves.any():
            row, unit = torch.arange(len(serves))[:, None], torch.arange(serves.shape[1])
            members[:, 0] = members[row, serves, :, unit].transpose(1, 2)
        if site == "mlp_out":
            self._note(self.circuits.graph.mlp(layer), lambda rows: members[rows, 0, :, 0])
        return x

    def _note_heads(self, layer: int, z: Tensor) -> Tensor:
        heads, members = self.circuits.graph.heads(layer), self._members(z)
        for h, w_o in enumerate(self.w_o[layer][:, : z.shape[-1]]):
            self._note(heads.start + h, lambda rows, h=h, w_o=w_o: members[rows, 0, :, h].to(w_o) @ w_o)  # type: ignore[misc]
        return z

    def _note(self, sender: int, gives: Callable[[Tensor], Tensor]) -> None:
        """In the rows that need it: gives(rows) is what the sender gives in these, [some, tokens, d_model]."""
        rows, at = (self.circuits.senders == sender).nonzero(as_tuple=True)
        if len(rows):
            self.change[rows, at] = self.source[sender] - gives(rows).to(self.change)
