"""Weights of each sample's own: 64 samples x 8 task vectors, against loops over samples and the plain forward.

The public loop is what repositories of learned task arithmetic do: for each sample every vector is scaled and added to
the base, one by one, and `functional_call` runs it. The good one merges with one tensordot a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.memory import peak
from bench.timing import interleaved, ratio, summary
from engine import weights

WIDTH, LAYERS, HEADS = 384, 6, 6


class Block(nn.Module):
    """Before attention and MLP a norm, as in ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(nn.functional.gelu(self.wide(self.between(x))))


class Encoder(nn.Module):
    """Of patches that are vectors already; the first token is classified."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, tokens, WIDTH))
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x + self.places))[:, 0])


def public_loop(model: nn.Module, x: Tensor, vectors: list[dict[str, Tensor]], c: Tensor) -> Tensor:
    """c: [batch, vectors, parameters]."""
    base, answers = dict(model.named_parameters()), []
    for b in range(len(x)):
        theta = {name: p.detach() for name, p in base.items()}
        for t, vector in enumerate(vectors):
            theta = {name: theta[name] + c[b, t, i] * vector[name] for i, name in enumerate(theta)}
        answers.append(functional_call(model, theta, (x[b : b + 1],)))
    return torch.cat(answers)


def good_loop(model: nn.Module, x: Tensor, vectors: weights.TaskVectors, c: Tensor) -> Tensor:
    base, answers = dict(model.named_parameters()), []
    for b in range(len(x)):
        theta = {
            name: p + torch.tensordot(c[b, :, i], vectors.tensors[name], dims=1)
            for i, (name, p) in enumerate(base.items())
        }
        answers.append(functional_call(model, theta, (x[b : b + 1],)))
    return torch.cat(answers)


@torch.no_grad()
def measure(tokens: int, samples: int = 64, count: int = 8, rank: int = 0, rounds: int = 5) -> dict[str, Any]:
    """rank: of the vectors; 0: whole. Seconds, what loops and the plain forward take over ours, exactness, peaks."""
    model, x, vectors, c = made(tokens, samples, count)
    vectors = vectors.low_rank(rank) if rank else vectors
    apart = [{name: vectors.whole(name)[t] for name in vectors.shapes} for t in range(count)]
    whole = weights.TaskVectors(
        vectors.base, vectors.names, vectors.shapes, {n: vectors.whole(n) for n in vectors.shapes}
    )
    ours = partial(weights.forward, model, x, vectors, c)
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "public loop": partial(public_loop, model, x, apart, c),
        "good loop": partial(good_loop, model, x, whole, c),
        "plain forward": partial(model, x),
    }
    want = weights.naive.forward(model, x, vectors, c)
    seconds = interleaved(ways, rounds, progress=False)
    result: dict[str, Any] = {
        "cell": f"{samples} samples x {count} vectors, {tokens} tokens, {torch.get_num_threads()} threads",
        "off the oracle, of the largest": ((ours() - want).abs().max() / want.abs().max()).item(),
        **{f"{name}, seconds": summary(taken)["median"] for name, taken in seconds.items()},
    }
    for name in ("public loop", "good loop"):
        result[f"{name} / ours"] = "{low:.2f} {median:.2f} {high:.2f}".format(**ratio(seconds[name], seconds["ours"]))
    over = ratio(seconds["ours"], seconds["plain forward"])
    result["ours / plain forward"] = "{low:.2f} {median:.2f} {high:.2f}".format(**over)
    result["peak beyond weights and vectors, MiB"] = peak(ours)
    result["peak of the plain forward, MiB"] = peak(partial(model, x))
    return result


def made(tokens: int, samples: int, count: int) -> tuple[nn.Module, Tensor, weights.TaskVectors, Tensor]:
    torch.manual_seed(0)
    model = Encoder(tokens).eval()
    tuned = [deepcopy(model) for _ in range(count)]
    for one in tuned:
        for p in one.parameters():
            p.data += 0.02 * torch.randn_like(p)
    vectors = weights.task_vectors(model, *tuned)
    return model, torch.randn(samples, tokens, WIDTH), vectors, torch.rand(samples, count, len(vectors.blocks()))
