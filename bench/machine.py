"""What the machine is, and how fast it multiplies and copies, measured: the limits are computed from this."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.limits import Rates
from models.linear import multiplies, onednn, reorder

LIBRARIES = ("torch", "transformers", "triton", "transformer-lens", "nnsight", "pyvene")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, device, threads, versions and the commit that is measured. Threads are the user's to set."""
    found: dict[str, Any] = {"cpu": _cpu(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    if device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    try:
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        commit = ""
    return {**found, "commit": commit or "unknown"}


def synchronise(device: str | torch.device) -> Callable[[], None]:
    """A function that waits for all that was asked of the device."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def free_bytes(device: str | torch.device) -> int:
    """Memory that can still be taken."""
    if torch.device(device).type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:  # not Linux: the machine's memory, whatever is in use
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@torch.no_grad()
def measure_rates(device: str | torch.device, dtype: torch.dtype, repeats: int = 5) -> Rates:
    """Matrix rate of a square product, the fastest of torch's and (float32, CPU) oneDNN's with weights as they are and
    reordered; bandwidth of a large copy.
    """
    cuda = torch.device(device).type == "cuda"
    n, copied = (8192, 2 * 2**30) if cuda else (2048, 256 * 2**20)
    x, weight = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    products: list[Callable[[], object]] = [lambda: x @ weight]
    if multiplies(x, weight):
        reordered = reorder(weight, n)
        products += [lambda: onednn(x, weight), lambda: onednn(x, reordered)]
    wait = synchronise(device)
    flops = 2 * n**3 / min(_fastest(product, wait, repeats) for product in products)
    source = torch.zeros(copied // dtype.itemsize, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    return Rates(flops, 2 * copied / _fastest(lambda: target.copy_(source), wait, repeats))


def _fastest(call: Callable[[], object], wait: Callable[[], None], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first is the slowest: it warms up
        wait()
        started = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def _cpu() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
