"""How many rows may run at once within a budget of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.core.prefix import Prefix, shareable
from models import Model
from models.reading import as_int
from models.shapes import Integer


class Budget:
    """How many rows may run at once; fewer after memory ran out.

    A row takes its logits, twice in the metric's precision, and of its tokens the scores and widest activations: of one
    layer at a time, or of all if a graph is kept.
    """

    def __init__(self, model: Model, memory: Integer | None, graph: bool = False):
        if memory is not None and (as_int(memory) or 0) < 1:
            raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
        self.bytes = as_int(memory) or free_bytes(model.device) // 8
        shape, size = model.shape, model.dtype.itemsize
        layers = shape.n_layers if graph else 1
        self._row = shape.vocab_size * (size + 2 * max(4, size))
        self._token = layers * 16 * shape.d_model * size
        self._key = layers * 3 * shape.n_heads * max(4, size)
        self._kept = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * size
        self.most = 2**31

    def rows(self, prompt: Prefix, position: int, more: int = 0) -> int:
        """Of a prompt, patched from a position on. more: bytes that a row takes beside."""
        n_tokens = len(prompt.tokens)
        split = shareable(prompt, position % n_tokens)
        row = more + prompt.places * self._row + (n_tokens - split) * (self._token + n_tokens * self._key)
        return self.bytes // row

    def answers(self, n_tokens: int) -> int:
        """Rows that generate answers of so many tokens: their keys and values, old and new, and logits."""
        return self.bytes // (self._row + 2 * n_tokens * self._kept)

    def passes(self, n_rows: int, fit: Callable[[], int], run: Callable[[slice], None]) -> None:
        """`run(some)` for slices of the rows, as many at once as `fit()` says; half as many after memory ran out."""
        start = 0
        while start < n_rows:
            some = slice(start, min(n_rows, start + max(1, min(self.most, fit()))))
            try:
                run(some)
            except RuntimeError as error:
                if some.stop - some.start == 1 or not _out_of_memory(error):
                    raise
                self.most = (some.stop - some.start) // 2
                continue
            start = some.stop


def free_bytes(device: torch.device) -> int:
    """Memory that is free there; on the CPU, where the system does not say, 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:
        return 4 * 2**30


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
