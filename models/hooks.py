"""What a call puts on the modules of a model for its own length: edits of z, of the residual stream, less work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.calls import Hook
from models.interface import Edit, Steer, UnsupportedModelError
from models.layout import Rows

FEED_FORWARD = "mlp"


def edit_z(edit: Edit, layer: int, x: Tensor, head_dim: int, rows: Rows | None) -> Tensor:
    """What a projection is given [batch, tokens, H*D], edited: a new tensor; of packed rows x itself, written to."""
    if rows is None:
        # Others may hold on to x: hooks of the caller, attention until its backward pass.
        return edit(layer, x.clone().unflatten(-1, (-1, head_dim))).reshape(x.shape)
    # The sequence was made by the attention function for this layer alone. z is a view of it.
    z = rows.of(x).unflatten(-1, (-1, head_dim))
    edited = edit(layer, z)
    if edited is not z:
        z.copy_(edited)
    return x


@contextmanager
def hooked(handles: Callable[[], Iterator[Any]]) -> Iterator[None]:
    """Within: hooks whose handles the function gives, one after the other."""
    made: list[Any] = []
    try:
        for handle in handles():
            made.append(handle)
        yield
    finally:
        for handle in made:
            handle.remove()


def edits(
    edit: Edit | None, projections: Sequence[nn.Module], head_dims: Sequence[int], rows: Rows | None
) -> Iterator[Any]:
    """`edit` sees the input of every output projection."""

    def hook(turn: Iterator[int]) -> Hook:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            layer = _next(turn, "W_O")
            return (edit_z(edit, layer, args[0], head_dims[layer], rows), *args[1:])  # type: ignore[arg-type]

        return Hook(before)

    for module, turn in by_turn(projections) if edit is not None else ():
        yield module.register_forward_pre_hook(hook(turn))


def steers(steer: Steer | None, blocks: Sequence[nn.Module], rows: Rows | None) -> Iterator[Any]:
    """`steer` sees what the blocks give."""

    def hook(turn: Iterator[int]) -> Hook:
        def after(_: nn.Module, __: Any, out: Any) -> Any:
            change = steer.get(_next(turn, "a block"))  # type: ignore[union-attr]
            if change is None:
                return None
            h = out[0] if isinstance(out, tuple) else out  # [batch, tokens, d_model], or a packed sequence
            if rows is None:
                h = change(h)
            else:
                h = h.clone()
                rows.of(h).copy_(change(rows.of(h)))
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return Hook(after)

    for module, turn in by_turn(blocks) if steer else ():
        yield module.register_forward_hook(hook(turn))


def by_turn(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, Iterator[int]]]:
    """Each module once, with its layers in order: one that stands in several runs once for each."""
    layers: dict[nn.Module, list[int]] = {}
    for layer, module in enumerate(modules):
        layers.setdefault(module, []).append(layer)
    return [(module, iter(turns)) for module, turns in layers.items()]


def _next(turn: Iterator[int], what: str) -> int:
    layer = next(turn, None)
    if layer is None:
        raise UnsupportedModelError(f"{what} runs more often in a forward than it stands in the layers of the model")
    return layer


def last_layer_of_rows(projections: Sequence[nn.Module], blocks: Sequence[nn.Module], first: int) -> Iterator[Any]:
    """After the last attention nothing reads what becomes of a context: W_O and MLP skip tokens before `first`."""
    last = [projections[-1], getattr(blocks[-1], FEED_FORWARD, None)] if first and blocks else []
    if len(set(projections)) < len(projections):  # also another layer's
        last = []
    for module in last:
        if module is not None:
            yield from rows_only(module, first)


def rows_only(module: nn.Module, first: int) -> Iterator[Any]:
    """Make a module that treats every token alike skip those before `first`, and give zeros for them."""
    skipped = 0

    def skip(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal skipped
        skipped = min(first, args[0].shape[1] - 1) if args else 0  # one token at least: some modules take no fewer
        return (args[0][:, skipped:], *args[1:]) if args else args

    def fill(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, tuple):  # a router's scores beside it
            return (pad(out[0], (0, 0, skipped, 0)), *out[1:])
        return pad(out, (0, 0, skipped, 0))

    yield module.register_forward_pre_hook(Hook(skip))
    yield module.register_forward_hook(Hook(fill))


@contextmanager
def undisturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within: no dropout. After: every module trains or not as before."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def remembered(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within: rotary tables that grow with what a model has seen are those of a new model. After: all as before.

    The Qwen-VL family remembers the positions of the last image, `dynamic` tables the longest prompt.
    """
    images = [(module, module.rope_deltas) for module in modules if hasattr(module, "rope_deltas")]
    tables = [module for module in modules if "dynamic" in str(getattr(module, "rope_type", ""))]
    saved = [(module, dict(module.__dict__), dict(module._buffers)) for module in tables]
    try:
        for module in tables:
            for name in module._buffers:
                if name.endswith("inv_freq") and "original" not in name:
                    module._buffers[name] = getattr(module, f"{name.removesuffix('inv_freq')}original_inv_freq")
            for name in [name for name in module.__dict__ if name.endswith("max_seq_len_cached")]:
                setattr(module, name, module.original_max_seq_len)
        yield
    finally:
        for module, deltas in images:
            module.rope_deltas = deltas
        for module, fields, buffers in saved:
            module.__dict__.update(fields)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def records(*configs: Any) -> Iterator[None]:
    """Within: models return records, not tuples (`config.return_dict`)."""
    tuples = [config for config in configs if getattr(config, "return_dict", True) is False]
    try:
        for config in tuples:
            config.return_dict = True
        yield
    finally:
        for config in tuples:
            config.return_dict = False


@contextmanager
def eager(compiled: bool) -> Iterator[None]:
    """Within: compiled modules run as they are written: compiled code does not look for hooks put in later."""
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield
