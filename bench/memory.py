"""Peak memory beyond the weights: the 32-row step against one unpatched forward, each in a process of its own."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
from typing import Any

import torch

import engine
from models import Model

WAYS = ("one stock forward", "one forward", "fresh", "reused")


def measure(model_name: str, tokens: int, rows: int = 32, repeats: int = 5) -> dict[str, Any]:
    """Medians over `repeats` processes for each way: pages that the allocator happens to hold differ between runs."""
    samples = [{way: _in_child(model_name, way, tokens, rows) for way in WAYS} for _ in range(repeats)]
    peaks = {way: statistics.median(sample[way] for sample in samples) for way in WAYS}
    return {
        "tokens": tokens,
        "rows": rows,
        "peak MiB": peaks,
        "fresh / one forward": peaks["fresh"] / peaks["one forward"],
        "fresh / one stock forward": peaks["fresh"] / peaks["one stock forward"],
    }


def _in_child(model_name: str, way: str, tokens: int, rows: int) -> float:
    command = [sys.executable, "-m", "bench", "memory-child", model_name, way, str(tokens), str(rows)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@torch.no_grad()
def peak(model: Model, way: str, tokens: int, rows: int) -> float:
    """MiB that the process grows by at its peak (Linux), after a short run of the same code has warmed it up."""
    random = torch.Generator().manual_seed(0)
    shape = model.shape
    masks = torch.rand(rows, shape.n_layers, shape.n_heads, generator=random) < 0.27
    values = 0.3 * torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    hf: Any = model.hf  # type: ignore[attr-defined]

    def run(prompt: Any) -> object:
        if way == "one stock forward":
            return hf(input_ids=prompt[None], logits_to_keep=1).logits
        if way == "one forward":
            return model.forward(prompt[None])
        return engine.patch(model, prompt, heads=masks, values=values, strategy="packed")

    short, ids = (torch.randint(shape.vocab_size, (n,), generator=random) for n in (8, tokens))
    run(short)
    prompt: Any = engine.prefill(model, ids) if way == "reused" else ids
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = _status("VmRSS")
    run(prompt)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))
