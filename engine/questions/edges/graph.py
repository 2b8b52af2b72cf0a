"""The computational graph of a decoder: what gives to the residual stream, and what is given a sum of that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

import torch
from torch import Tensor

from engine.core.reading import check_model
from models import Edits, Model, Site, UnsupportedModelError
from models.shapes import Bool

Times: TypeAlias = list[int]
TOKENS = 4


@dataclass(frozen=True)
class Graph:
    """Senders, receivers, and the edges between them, in a fixed order.

    Senders: "input" (the embedding), each head "a3.h1" and each MLP "m3". Receivers: what a head's query is computed
    from, "a5.h2<q>", keys and values likewise (of each key/value head: "a5.h0<k>"), the input of an MLP, "m3", and
    that of the last norm, "logits". A receiver is given the sum of what all senders before it give. An edge is called
    "a3.h1->a5.h2<q>".

    n_kv_heads: heads that have keys and values of their own. parallel: a block's MLP does not see its attention.

    Source: How does GPT-2 compute greater-than (arXiv 2305.00586), section 3.1; names of Have Faith in Faithfulness
    (arXiv 2403.17806), whose keys and values are counted by query heads.

    >>> graph = engine.Graph.of(model)
    >>> len(graph.senders), len(graph.receivers), graph.edges[0]
    (301, 481, 'input->a0.h0<q>')
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False

    @classmethod
    def of(cls, model: Model) -> Graph:
        """The graph of a model, whose sites are looked for if they have not been.

        Raises UnsupportedModelError for a model that lacks one of them: no edges end there.
        """
        check_model(model)
        shape, heads = model.shape, {site: model.site(site) for site in ("z", "q", "k", "v")}
        for site in ("resid_pre", "resid_post", "mlp_out"):
            model.site(site)
        uneven = [site for site, size in heads.items() if len({units for units, _ in size.sizes}) > 1]
        if uneven or heads["k"].units != heads["v"].units:
            raise UnsupportedModelError(f"{model.name} has layers with different numbers of heads: no graph is made")
        return cls(shape.n_layers, shape.n_heads, heads["k"].units, _parallel(model))

    @property
    def per_layer(self) -> int:
        """Receivers of a layer: queries, keys, values, and the MLP."""
        return self.n_heads + 2 * self.n_kv_heads + 1

    def heads(self, layer: int) -> slice:
        """A layer's heads among the senders."""
        start = 1 + layer * (self.n_heads + 1)
        return slice(start, start + self.n_heads)

    def mlp(self, layer: int) -> int:
        """A layer's MLP among the senders."""
        return self.heads(layer).stop

    def given(self, layer: int) -> dict[Site, slice]:
        """A layer's receivers by the site at which what they make of it is seen."""
        q = layer * self.per_layer
        k = q + self.n_heads
        v = k + self.n_kv_heads
        return {"q": slice(q, k), "k": slice(k, v), "v": slice(v, m := v + self.n_kv_heads), "mlp_out": slice(m, m + 1)}

    def attention(self, layer: int) -> slice:
        """A layer's queries, keys and values among the receivers."""
        start = layer * self.per_layer
        return slice(start, start + self.per_layer - 1)

    @cached_property
    def senders(self) -> list[str]:
        found = ["input"]
        for layer in range(self.n_layers):
            found += [f"a{layer}.h{h}" for h in range(self.n_heads)] + [f"m{layer}"]
        return found

    @cached_property
    def receivers(self) -> list[str]:
        found = []
        for layer in range(self.n_layers):
            for site, count in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                found += [f"a{layer}.h{h}<{site}>" for h in range(count)]
            found.append(f"m{layer}")
        return [*found, "logits"]

    @cached_property
    def exists(self) -> Bool[Tensor, "senders receivers"]:
        """Whether the sender comes before the receiver."""
        sent, given = self._times
        return torch.tensor(sent)[:, None] < torch.tensor(given)

    @cached_property
    def edges(self) -> list[str]:
        """Their names, by sender and then receiver: those of `scores[graph.exists]`."""
        return [f"{self.senders[u]}->{self.receivers[v]}" for u, v in self.exists.nonzero().tolist()]

    def edge(self, name: str) -> tuple[int, int]:
        """Sender and receiver of an edge. Raises ValueError for a name that is none's.

        >>> engine.Graph(2, 2, 1).edge("a0.h1->logits")
        (2, 10)
        """
        sender, arrow, receiver = name.partition("->") if isinstance(name, str) else ("", "", "")
        u, v = self._numbers[0].get(sender), self._numbers[1].get(receiver)
        if not arrow or u is None or v is None:
            raise ValueError(
                f"{name!r} is no edge: expected a name like {self.edges[0]!r}, from {self.senders[0]!r} to "
                f"{self.senders[-1]!r}, and to {self.receivers[0]!r} to {self.receivers[-1]!r}"
            )
        if not self.exists[u, v]:
            raise ValueError(f"{name!r} is no edge: {sender} does not come before {receiver}")
        return u, v

    @cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        return {x: i for i, x in enumerate(self.senders)}, {x: i for i, x in enumerate(self.receivers)}

    @property
    def _times(self) -> tuple[Times, Times]:
        """When senders have given, and when receivers are given."""
        step = 1 if self.parallel else 2
        sent, given = [0], []
        for layer in range(self.n_layers):
            attention = 1 + step * layer
            mlp = attention + step - 1
            sent += [attention] * self.n_heads + [mlp]
            given += [attention] * (self.per_layer - 1) + [mlp]
        return sent, [*given, 1 + step * self.n_layers]


def _parallel(model: Model) -> bool:
    """Whether attention and MLP of a block are both given what the block is. Raises UnsupportedModelError for an MLP
    that sees attention of which the model does not say where.
    """
    try:
        model.site("resid_mid")
    except UnsupportedModelError as error:
        if _sees_attention(model):
            raise error
        return True
    return False


@torch.no_grad()
def _sees_attention(model: Model) -> bool:
    """Whether any MLP gives something else when attention of its own block does, the block being given the same."""
    found: list[dict[int, Tensor]] = [{}, {}]
    layers = range(model.shape.n_layers)

    def noise(seed: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)

    def keep(out: dict[int, Tensor], layer: int, x: Tensor) -> Tensor:
        out[layer] = x.clone()
        return x

    for run, out in enumerate(found):
        edits: Edits = {
            "resid_pre": {layer: partial(noise, layer) for layer in layers},
            "attn_out": {layer: partial(noise, -1 - run) for layer in layers},
            "mlp_out": {layer: partial(keep, out, layer) for layer in layers},
        }
        model.forward(torch.arange(TOKENS, device=model.device)[None] % model.shape.vocab_size, edits)
    one, other = found
    return any((one[i] - other[i]).abs().max() > 1e-4 * one[i].abs().max() for i in layers)
