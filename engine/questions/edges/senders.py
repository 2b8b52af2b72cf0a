"""What every sender of the graph gives in a run, and whether the residual stream is the sum of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core.edits import keeping
from engine.core.prefix import Prefix
from engine.questions.edges.graph import Graph
from models import Model, Site, UnsupportedModelError
from models.shapes import Float

ROUNDING = 16  # of the dtype's steps, at the size of a token's largest number: what sums may be apart


@dataclass(frozen=True, eq=False)
class Run:
    """An unpatched run.

    outputs: of every sender; of heads less the bias of W_O.
    stream:  the residual stream before each layer, after its attention unless the MLP runs in parallel, and at the end.
    logits:  of the last token.
    """

    outputs: Float[Tensor, "senders tokens d_model"]
    stream: Float[Tensor, "places tokens d_model"]
    logits: Float[Tensor, " vocab"]


@torch.no_grad()
def record(model: Model, graph: Graph, prompt: Prefix) -> Run:
    """One forward; heads are projected one by one after it. At least in float32."""
    middle: list[Site] = [] if graph.parallel else ["resid_mid"]
    sites: list[Site] = ["resid_pre", *middle, "z", "mlp_out", "resid_post"]
    kept: dict[tuple[Site, int], Tensor] = {}

    def keep(site: Site, layer: int, x: Tensor) -> None:
        kept[site, layer] = x[0].clone()  # [T, U, W]

    edits = keeping({}, sites, graph.n_layers, keep)
    logits = model.forward(prompt.tokens[None], edits, inputs=prompt.prompt.inputs)[0]

    def vector(site: Site, layer: int) -> Tensor:
        return kept[site, layer].transpose(0, 1).to(model.device, wide(model))  # [1, T, d]

    outputs, stream = [vector("resid_pre", 0)], []
    for layer in range(graph.n_layers):
        heads = model.project(layer, kept["z", layer])  # [T, H, d]
        outputs += [heads.transpose(0, 1).to(model.device, wide(model)), vector("mlp_out", layer)]
        stream += [vector(site, layer) for site in ("resid_pre", *middle)]
    stream.append(vector("resid_post", graph.n_layers - 1))
    return Run(torch.cat(outputs), torch.cat(stream), logits)


@torch.no_grad()
def heads_of(model: Model, layer: int) -> Float[Tensor, "heads head_dim d_model"]:
    """W_O of each head: what it makes of z that is 1 in one place."""
    each = torch.eye(model.shape.head_dim)[:, None].expand(-1, model.shape.n_heads, -1)  # [D, H, D]
    return model.project(layer, each).transpose(0, 1).to(model.device, wide(model))


def wide(model: Model) -> torch.dtype:
    """In which scores are computed."""
    return torch.promote_types(model.dtype, torch.float32)


def check_sums(model: Model, graph: Graph, run: Run, source: Run) -> None:
    """Raises UnsupportedModelError where the stream of two runs does not differ by what senders give between.

    Biases and whatever else is the same in both cancel.
    """
    change, stream = source.outputs - run.outputs, source.stream - run.stream
    places = len(stream) // graph.n_layers  # in a layer
    for place in range(len(stream) - 1):
        layer, part = divmod(place, places)
        attention, mlp = change[graph.heads(layer)].sum(dim=0), change[graph.mlp(layer)]
        added, what = (mlp, "MLP") if part else (attention, "attention")
        if graph.parallel:
            added, what = attention + mlp, "attention and MLP"
        apart = (stream[place + 1] - stream[place] - added).abs().amax(dim=-1)  # [T]
        both = torch.stack([run.stream[place : place + 2], source.stream[place : place + 2]])
        size = both.abs().amax(dim=(0, 1, 3))
        if not (apart <= ROUNDING * torch.finfo(model.dtype).eps * size).all():
            raise UnsupportedModelError(
                f"{model.name} does not add the output of {what} in layer {layer} to the residual stream as it is (a "
                f"norm, a factor or another block lies between): it differs by {apart.max():.1e} more between two "
                "runs, and what is given to a head or an MLP is not the sum of what edges carry"
            )
