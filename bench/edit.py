"""The edit by Triton against `torch.where`, in place and as a new tensor, on a GPU: as calls, and in a CUDA graph."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from bench.timing import ratio, summary
from engine.core.ops import edit_heads
from engine.core.patches import Mode

CALLS = 1000


def measure(
    rows: int = 32,
    heads: int = 32,
    head_dim: int = 128,
    tokens: int = 1,
    p: float = 0.27,
    dtype: torch.dtype = torch.bfloat16,
    mode: Mode = "replace",
    rounds: int = 9,
) -> dict[str, Any]:
    """Microseconds an edit of z [rows, tokens, heads, head_dim], each head of each row patched with probability p.

    calls: asked for from Python one after the other, as a forward does. At this size they cost what asking costs.
    graph: recorded as one CUDA graph and replayed, as a recorded pass does. They cost what the kernels cost.

    Raises RuntimeError without CUDA or Triton, or if a way computes anything else than `impl="reference"`.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark times CUDA kernels, and torch finds no GPU here")
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(rows, tokens, heads, head_dim, generator=draw).to("cuda", dtype)
    values = torch.randn(1, heads, head_dim, generator=draw).to("cuda", dtype)
    mask = (torch.rand(rows, heads, generator=draw) < p).cuda()

    def where() -> torch.Tensor:
        """Out of place."""
        new = values[:, None] if mode == "replace" else z + values[:, None]
        return torch.where(mask[:, None, :, None], new, z)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "triton": lambda: edit_heads(z, mask, values, mode, "triton"),
        "torch.where": where,
        "torch.where in place": lambda: edit_heads(z, mask, values, mode, "torch"),
    }
    before = z.clone()
    want = edit_heads(z.clone(), mask, values, mode, "reference")
    for name, way in ways.items():
        z.copy_(before)
        if not torch.equal(way(), want):
            raise RuntimeError(f"{name} computes something else than the reference: it is not timed")
    calls = {name: _microseconds(way, CALLS) for name, way in ways.items()}
    graphs = {name: _microseconds(_recorded(way).replay, 1, CALLS) for name, way in ways.items()}
    result: dict[str, Any] = {
        "shape": [rows, tokens, heads, head_dim],
        "dtype": str(dtype),
        "p": p,
        "mode": mode,
        "device": torch.cuda.get_device_name(),
    }
    for kind, timed in (("calls", calls), ("graph", graphs)):
        samples = _interleaved(timed, rounds)
        result[f"microseconds, {kind}"] = {name: summary(taken) for name, taken in samples.items()}
        for name in ways:
            if name != "triton":
                result[f"{name} / triton, {kind}"] = ratio(samples[name], samples["triton"])
    return result


def _recorded(way: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `CALLS` edits; they ran before, so that nothing is left to be compiled."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            way()
    return graph


def _microseconds(run: Callable[[], object], repeats: int, edits: int = 1) -> Callable[[], float]:
    """A function that times `repeats` runs of so many edits by the GPU's clock, and gives microseconds an edit."""

    def time() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end) / (repeats * edits)

    return time


def _interleaved(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way gives in each round, in changing order, after one that does not count."""
    order, samples = list(ways), {name: [0.0] * rounds for name in ways}
    shuffle = random.Random(0).shuffle
    for name in order:
        ways[name]()
    for index in range(rounds):
        shuffle(order)
        for name in order:
            samples[name][index] = ways[name]()
    return samples
