"""The rows' attention: 32 queries of one token each against one shared context, in the ways there are to compute it.

Each way must first agree with float64. The engine's is `explicit` (models.packed): exact, differentiable, anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.timing import interleaved, summary
from models.attention import Rule, rows_attention


def measure(
    context: int = 1023,
    rows: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    rounds: int = 30,
) -> dict[str, Any]:
    """Seconds of one layer by each way, and the bytes of keys and values that all must read."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    q = draw(rows, heads, 1, head_dim)
    k, v = draw(kv_heads, context, head_dim), draw(kv_heads, context, head_dim)
    own_k, own_v = draw(rows, kv_heads, 1, head_dim), draw(rows, kv_heads, 1, head_dim)
    ways: dict[str, Callable[[], Tensor]] = {
        "explicit": lambda: explicit(q, k, v, own_k, own_v),
        "masked": lambda: masked(q, k, v, own_k, own_v),
        "expanded": lambda: expanded(q, k, v, own_k, own_v),
        "merged": lambda: merged(q, k, v, own_k, own_v),
    }
    if device == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention)
        ways["flex"] = lambda: merged(q, k, v, own_k, own_v, flex)

    truth = explicit(*(x.double() for x in (q, k, v, own_k, own_v)))
    apart = {name: (way().double() - truth).abs().max().item() for name, way in ways.items()}
    limit = 4 * max(apart["explicit"], torch.finfo(dtype).eps)
    if wrong := {name: difference for name, difference in apart.items() if not difference <= limit}:
        raise RuntimeError(f"not timed, since they are off float64 by {wrong}; explicit is by {apart['explicit']:.1e}")

    def timed(way: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            way()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    seconds = interleaved({name: timed(way) for name, way in ways.items()}, rounds, warm_up=5)
    return {
        "context": context,
        "rows": rows,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "context bytes": k.nbytes + v.nbytes,
        "apart": apart,
        "seconds": {name: summary(samples) for name, samples in seconds.items()},
    }


def explicit(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """The engine's: scores of all rows as one matrix, one softmax over context and own token."""
    return rows_attention(q, k, v, own_k, own_v, Rule(q.shape[-1] ** -0.5, None, None), None, {})


def masked(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """One sequence of keys [context | every row's own], a dense mask of rows x (context + rows)."""
    rows = len(q)
    keys, values = (torch.cat([x, own[:, :, 0].transpose(0, 1)], dim=1)[None] for x, own in ((k, own_k), (v, own_v)))
    mask = torch.cat([torch.ones(rows, k.shape[1]), torch.eye(rows)], dim=1).bool().to(q.device)
    z = scaled_dot_product_attention(q[:, :, 0].transpose(0, 1)[None], keys, values, mask, enable_gqa=True)
    return z[0].transpose(0, 1)[:, :, None]


def expanded(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """A batch of rows over a copy of the context for each: what a cache that concatenates does."""
    keys, values = (torch.cat([x.expand(len(q), *x.shape), own], dim=2) for x, own in ((k, own_k), (v, own_v)))
    return scaled_dot_product_attention(q, keys, values, enable_gqa=True)


def merged(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, flex: Any = None) -> Tensor:
    """Fused attention over the context with its log-sum-exp, then the own token: z + sigmoid(s - lse) (v_own - z)."""
    rows, head_dim = len(q), q.shape[-1]
    folded = q.view(rows, len(k), -1, head_dim).transpose(0, 1).flatten(1, 2)[None]  # [1, Hkv, R*G, D]
    if flex is not None:
        z, lse = flex(folded, k[None], v[None], return_lse=True)
    elif q.is_cuda and q.dtype is not torch.float32:
        z, lse = torch.ops.aten._scaled_dot_product_flash_attention(folded, k[None], v[None])[:2]
    elif q.is_cuda:
        z, lse = torch.ops.aten._scaled_dot_product_efficient_attention(folded, k[None], v[None], None, True)[:2]
        lse = lse[..., : folded.shape[2]]
    else:
        z, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(folded, k[None], v[None])[:2]
    group = (len(k), rows, -1)
    own_k, own_v = own_k.transpose(0, 1), own_v.transpose(0, 1)  # [Hkv, R, 1, D]
    score = (folded[0].unflatten(1, group[1:]) * own_k).float().sum(dim=-1) * head_dim**-0.5  # [Hkv, R, G]
    weight = torch.sigmoid(score - lse[0].unflatten(1, group[1:]))[..., None].to(q.dtype)
    z = z[0].unflatten(1, group[1:])
    return (z + weight * (own_v - z)).transpose(0, 1).reshape(q.shape)
