"""What stays: task vectors as safetensors with metadata, every file written whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.core.reading import check_model
from models import Model
from models.reading import read_tensor
from models.shapes import Bool, Float

SCRATCH = ".scratch"
LONG = 200  # bytes of a file's name, of the 255 that most file systems allow


@dataclass(frozen=True)
class TaskVector:
    """Heads and the values they carry: what `engine.mtv.extract` finds.

    mask:          heads that are patched.
    values:        mean activations of all heads.
    probabilities: of each head to be patched, as the search left them.
    metadata:      model, task, seed, settings, versions, learning curve.

    >>> vector = engine.TaskVector.load("antonyms.safetensors")
    >>> answer = engine.generate(model, "Q: big\\nA:", heads=vector.heads, values=vector.values)
    """

    mask: Bool[Tensor, "layers heads"]
    values: Float[Tensor, "layers heads head_dim"]
    probabilities: Float[Tensor, "layers heads"]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The patched heads as (layer, head)."""
        return [(layer, head) for layer, head in self.mask.nonzero().tolist()]

    def with_values(self, values: Float[Tensor, "layers heads head_dim"] | np.ndarray) -> TaskVector:
        """The same heads, carrying other means: heads found on one task serve another, without a search on it.

        values: from `mean_activations` over prompts of the other task, by the same model.

        Raises ValueError for values of another shape, or such as are not finite.

        Source: Multimodal Task Vectors (arXiv 2406.15334), heads found on Flowers transferred to CUB.

        >>> engine.TaskVector.load("antonyms.safetensors").with_values(means).heads
        [(10, 3), (12, 0)]
        """
        given: Any = read_tensor(values, "values")
        got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        if got != list(self.values.shape) or not given.isfinite().all():
            got = got if got != list(self.values.shape) else "values that are not finite"
            raise ValueError(f"expected finite values of shape {list(self.values.shape)}, got {got}")
        return replace(self, values=given.detach().float().cpu(), metadata=self.metadata | {"transferred": True})

    def check(self, model: Model) -> None:
        """Raise ValueError unless the vector was made with this model."""
        check_model(model)
        made, shape = self.metadata.get("model"), tuple(self.values.shape)
        fits = shape == (model.shape.n_layers, model.shape.n_heads, model.shape.head_dim)
        if not fits or made != model.name:
            raise ValueError(
                f"the vector is of model {made!r}, values {list(shape)}; it does not fit {model.name!r}: {model.shape}"
            )

    def save(self, path: str | Path) -> None:
        """Write tensors and metadata to one file. Raises OSError if the folder cannot be written."""
        tensors = {"mask": self.mask, "values": self.values, "probabilities": self.probabilities}
        save_tensors(path, tensors, {**self.metadata, "heads": self.heads})

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> TaskVector:
        """Read a saved vector; with `model`, also check that it is of that model.

        Raises FileNotFoundError, or ValueError for a file that is broken or holds something else.
        """
        tensors, metadata = load_tensors(path, ("mask", "values", "probabilities"))
        metadata.pop("heads", None)
        vector = cls(tensors["mask"], tensors["values"], tensors["probabilities"], metadata)
        if model is not None:
            vector.check(model)
        return vector


def versions() -> dict[str, str]:
    """Of what made a result."""
    found = {"python": platform.python_version()}
    for package in ("headpatch", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    whole: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        whole[name] = plain.clone() if memory in stored else plain  # the format refuses tensors that share memory
        stored.add(memory)
    write_whole(path, save(whole, {"headpatch": json.dumps(metadata, default=_as_json)}))


def _as_json(value: Any) -> Any:
    """Numbers and lists of arrays among metadata."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    raise TypeError(f"metadata must be JSON (or arrays), got {type(value).__name__}: {value!r:.80}")


def load_tensors(path: str | Path, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["headpatch"])
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is truncated, or not a file with {', '.join(names)}: {error}") from error


def can_begin(path: str | Path) -> bool:
    """Whether no file is there yet; then one can be written, or OSError is raised."""
    path = _behind_links(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_up(path)
    if path.exists():
        return False
    with tempfile.TemporaryFile(dir=path.parent):
        return True


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file so that its name never holds half of it: a neighbour first, then a rename.

    The neighbour is locked while it is written: one that nobody locks was left by a process that died, and goes.
    """
    path = _behind_links(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_up(path)
    handle, scratch = _scratch(path)
    lock = None if fcntl is None else os.dup(handle)  # lasts until both are closed
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)  # a scratch file is private, a result is not
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _behind_links(path: str | Path) -> Path:
    """The file itself: a rename would put another in the place of a link to it."""
    return Path(os.path.realpath(path))


def _beginning(path: Path) -> str:
    """Of the names of a file's neighbours: its own name, or a digest of one that leaves no room for more."""
    name = os.fsencode(path.name)
    return f".{path.name if len(name) < LONG else hashlib.sha256(name).hexdigest()}."


def _scratch(path: Path) -> tuple[int, str]:
    """A new neighbour of a file, open and locked."""
    while True:
        handle, scratch = tempfile.mkstemp(prefix=_beginning(path), suffix=SCRATCH, dir=path.parent)
        _locked(handle)
        if os.fstat(handle).st_nlink:  # else another process took it for a dead one's before it was locked
            return handle, scratch
        os.close(handle)


def _sweep_up(path: Path) -> None:
    """Remove the neighbours of a file that processes left which were killed while they wrote it."""
    for scratch in path.parent.glob(f"{glob.escape(_beginning(path))}{'?' * 8}{SCRATCH}") if fcntl else ():
        with suppress(OSError), scratch.open("rb+") as file:  # another process may be faster
            if _locked(file.fileno(), fcntl.LOCK_NB):
                scratch.unlink()


def _locked(handle: int, how: int = 0) -> bool:
    """Whether the file could be locked, until it is closed or the process dies; never where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | how)
    except (AttributeError, OSError):
        return False
    return True
