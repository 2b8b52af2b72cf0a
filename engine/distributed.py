"""Data parallel: ranks that torchrun started, each with the whole model, share out prompts and rollouts.

    with engine.distributed.joined() as world:
        means = engine.mean_activations(model, prompts, world=world)
        vector = engine.mtv.extract(model, examples, means, world=world)

Every rank makes the same calls with the same arguments and gets the same results. Whatever is exchanged goes through
the methods of `World`, and only verbs that were given one call them. docs/devices.md says what a step sends.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, distributed

from models import Model
from models.shapes import Float

Result = TypeVar("Result")

CPU = torch.device("cpu")
SAMPLE = 16  # values of each parameter that a digest of the weights reads


class LostRankError(RuntimeError):
    """Another rank died, failed or gave no answer in time, or this one was told to stop; the message says which."""


@dataclass(frozen=True)
class World:
    """The ranks that work together. Every method but `share` must be called on all of them, or none goes on.

    rank, size: this is rank `rank` of `size`, counted from 0; rank 0 writes files and prints. Default: alone.
    device:     where this rank's model belongs.
    store:      torch's store of the group, in which the first to notice leaves a note on who was lost.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    store: Any = field(default=None, repr=False)

    def share(self, n: int, whole: int = 1) -> slice:
        """The part of this rank of `n` things in a row. Parts begin at multiples of `whole`; they may be empty.

        >>> [engine.distributed.World(rank, 3).share(10, whole=4) for rank in range(3)]
        [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
        """
        return self._share(self.rank, n, whole)

    def _share(self, rank: int, n: int, whole: int) -> slice:
        units = -(-n // whole)
        return slice(*(min(n, edge * units // self.size * whole) for edge in (rank, rank + 1)))

    def gather(self, mine: Float[Tensor, "share ..."], n: int, whole: int = 1) -> Float[Tensor, "n ..."]:
        """All `n` rows, in order, from the rows of `share(n, whole)` of each rank. Raises LostRankError.

        >>> engine.distributed.ALONE.gather(torch.tensor([1.0, 2.0]), 2)
        tensor([1., 2.])
        """
        if self.size == 1:
            return mine
        shares = [self._share(rank, n, whole) for rank in range(self.size)]
        padded = mine.new_zeros(max(s.stop - s.start for s in shares), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = self._exchange(padded)
        return torch.cat([part[: s.stop - s.start] for part, s in zip(parts, shares, strict=True)])

    def same(self, given: Mapping[str, Any]) -> None:
        """Raise ValueError, on every rank and naming what differs, unless all were given the same (as JSON).

        >>> engine.distributed.ALONE.same({"seed": 0})
        """
        if self.size == 1:
            return
        lines = [json.loads(line) for line in self._objects(json.dumps(given))]
        for rank, line in enumerate(lines):
            for key in sorted(lines[0].keys() | line.keys()):
                if lines[0].get(key) != line.get(key):
                    raise ValueError(
                        f"the ranks must be given the same: {key} is {lines[0].get(key)!r:.80} on rank 0 and "
                        f"{line.get(key)!r:.80} on rank {rank} of {self.size}"
                    )

    def from_first(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns on rank 0, on every rank; also what it raises.

        >>> engine.distributed.ALONE.from_first(lambda: 3)
        3
        """
        if self.size == 1:
            return compute()
        result, error = None, None
        if self.rank == 0:
            try:
                result = compute()
            except Exception as raised:
                error = raised
        told = self._objects((result, error))[0]
        if self.rank > 0:
            result, error = told
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def _objects(self, mine: Any) -> list[Any]:
        """Anything that can be pickled, from every rank."""
        packed = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        sizes = [int(size) for size in self._exchange(torch.tensor([len(packed)]))]
        padded = packed.new_zeros(max(sizes))
        padded[: len(packed)] = packed
        parts = self._exchange(padded)
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def _exchange(self, mine: Tensor) -> list[Tensor]:
        """Tensors of one shape, from every rank.

        On a GPU by NCCL. On the CPU each rank sends to each: it is a few bytes, and who does not answer is known.
        """
        if mine.is_cuda and self.device.type == "cuda":
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            try:
                distributed.all_gather(parts, mine.contiguous())
            except RuntimeError as error:
                self._lost(f"a rank of {self.size} is gone", error)
            return parts
        sent = mine.cpu().contiguous()
        parts = [sent if rank == self.rank else torch.empty_like(sent) for rank in range(self.size)]
        peer, works = self.rank, {}
        try:
            for peer in self._others():
                works[peer] = distributed.irecv(parts[peer], peer), distributed.isend(sent, peer)
            for peer in self._others():
                for work in works[peer]:
                    work.wait()  # type: ignore[union-attr]
        except RuntimeError as error:
            late = "imed out" in str(error)
            self._lost(f"rank {peer} of {self.size} " + ("gave no answer in time" if late else "is gone"), error)
        return [part.to(mine.device) for part in parts]

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _note(self, said: str) -> str:
        """The first note that any rank left: whoever was lost first, and not those that left because of it."""
        try:
            return self.store.compare_set("lost", "", said).decode()
        except (AttributeError, RuntimeError):  # no store, or it was lost as well
            return said

    def _lost(self, said: str, error: Exception | None = None) -> NoReturn:
        raise LostRankError(self._note(said)) from error

    def _told_to_stop(self, *_: Any) -> NoReturn:
        """SIGTERM: torchrun sends it when another rank has died. A message to the dead fails at once."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for peer in self._others():
            try:
                work = distributed.isend(torch.zeros(1), peer, tag=1)
                work.wait(timedelta(seconds=0.2))  # type: ignore[union-attr]
            except RuntimeError as error:
                if "imed out" not in str(error):
                    self._lost(f"rank {peer} of {self.size} is gone", error)
        self._lost(f"rank {self.rank} of {self.size} was told to stop (SIGTERM)")


ALONE = World()


@contextmanager
def joined(device: str = "cpu", timeout: float = 600) -> Iterator[World]:
    """The ranks that torchrun started together with this process; this process alone where there was no torchrun.

    device:  "cpu" (default), or "cuda": each rank of a machine takes one GPU of it, by torchrun's LOCAL_RANK. Load the
             model on `world.device`.
    timeout: seconds after which a rank that does not answer is given up; default ten minutes.

    Within, ranks exchange by gloo, tensors on GPUs by NCCL. Raises ValueError for a device this rank cannot have, and
    LostRankError, within, on every rank that is left when one dies, fails or is late. After an exception SIGTERM is
    ignored, so that the error is told before torchrun ends the process.

    >>> with engine.distributed.joined() as world:
    ...     vector = engine.mtv.extract(model, [Example("Q: hot\\nA:", " cold")], means, steps=1, world=world)
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    place = _place(device, int(os.environ["LOCAL_RANK"]) if several else None)
    if not several:
        yield World(device=place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    wait = timedelta(seconds=timeout)
    store, rank, size = next(distributed.rendezvous("env://", timeout=wait))
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    world = World(rank, size, place, store)
    listens = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, world._told_to_stop) if listens else None
    try:
        yield world
    except BaseException as error:
        if listens:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not isinstance(error, LostRankError):
            world._note(f"rank {rank} of {size} failed ({type(error).__name__}: {error})")
        raise
    else:
        if listens:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    finally:
        distributed.destroy_process_group()


def _place(device: str, local_rank: int | None) -> torch.device:
    """Where the model of this process goes; a rank of several has the GPU of its number on its machine."""
    if local_rank is not None and device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda' where several ranks run, got {device!r}")
    try:
        place = torch.device(device if local_rank is None or device == "cpu" else f"cuda:{local_rank}")
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or another that torch knows, got {device!r}") from error
    if place.type == "cuda" and torch.cuda.device_count() <= (place.index or 0):
        raise ValueError(f"there is no {place}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return place


def digest(*parts: Any) -> str:
    """Equal for equal tensors, bit by bit, and for equal values of what JSON can say.

    >>> engine.distributed.digest(torch.zeros(2), "a") == engine.distributed.digest(torch.zeros(2), "b")
    False
    """
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {list(part.shape)}".encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        else:
            part = json.dumps(part).encode()
        found.update(part)
    return found.hexdigest()[:16]


def identity(model: Model) -> dict[str, str]:
    """What ranks compare of their models: name, dtype, and a few values of every parameter.

    Raises ValueError for a model whose weights are themselves shared out over the ranks.

    >>> engine.distributed.identity(model)["model"]
    'smollm2-135m'
    """
    if any(hasattr(parameter, "full_tensor") for parameter in _parameters(model).values()):
        raise ValueError(
            f"the weights of {model.name} are shared out over the ranks (tensor parallel): "
            "they run one model together, and cannot share out its rollouts as well; leave out world="
        )
    return {"model": model.name, "dtype": str(model.dtype), "weights": weights_of(model)}


def weights_of(model: Model) -> str:
    """A digest of a few values of every parameter; of those on a disk, or shared out, of their shapes."""
    values: list[Any] = []
    for name, parameter in _parameters(model).items():
        values.append([name, list(parameter.shape)])
        if not parameter.is_meta and not hasattr(parameter, "full_tensor"):
            values.append(parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLE)])
    return digest(*values)


def _parameters(model: Model) -> dict[str, Tensor]:
    return dict(model.hf.named_parameters()) if hasattr(model, "hf") else {}
