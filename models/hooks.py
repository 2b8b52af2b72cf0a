"""What a call puts on the modules of a model for its own length: edits of sites, less work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.calls import Hook, current
from models.interface import Edit, UnsupportedModelError
from models.layout import Rows
from models.sites import Place

FEED_FORWARD = "mlp"


def edited(edit: Edit, x: Tensor, place: Place, layer: int, rows: Rows | None, own: bool = False) -> Tensor:
    """What a module is given, or gives, [batch, tokens, units * width], edited: a new tensor, unless a skip connection
    must see it, or it is our own and packed, made for this layer alone (z).
    """
    units, width = place.sizes[layer]
    whole = x if x.ndim == 3 else x.view(-1, x.shape[0] // current().batch, x.shape[-1])  # type: ignore[union-attr]
    if place.entry.split == "heads":  # which may be shared out over processes
        units = whole.shape[-1] // width
    if whole.ndim != 3 or whole.shape[-1] != units * width:
        raise UnsupportedModelError(f"layer {layer} hands over {list(x.shape)}, not {units} * {width} numbers a token")
    here = whole if rows is None else rows.of(whole, layer)
    own = own and rows is not None and not torch.is_grad_enabled()  # a backward pass may read what stood there
    # Others may hold on to x: hooks of the caller, attention until its backward pass.
    before = (here if own else here.clone()).unflatten(-1, (units, width))
    after = edit(before)
    if own or place.entry.side == "shared":
        if after is not before or not own:
            here.copy_(after.flatten(-2))
        return x
    if rows is None:
        return after.reshape(x.shape)
    whole = whole.clone()
    rows.of(whole, layer).copy_(after.flatten(-2))
    return whole.view(x.shape)


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


def edits(by_layer: Mapping[int, Edit], place: Place, rows: Rows | None, own: bool = False) -> Iterator[Any]:
    """The edits of one site, put on the modules that it is in."""

    def before(turn: Iterator[int]) -> Hook:
        def change(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            if (edit := by_layer.get(layer := _next(turn))) is None:
                return None
            if args:
                return (edited(edit, args[0], place, layer, rows, own), *args[1:]), given
            name = next(iter(given)) if "hidden_states" not in given else "hidden_states"
            return args, given | {name: edited(edit, given[name], place, layer, rows, own)}

        return Hook(change)

    def after(turn: Iterator[int]) -> Hook:
        def change(_: nn.Module, __: Any, out: Any) -> Any:
            if (edit := by_layer.get(layer := _next(turn))) is None:
                return None
            if isinstance(out, tuple):
                return (edited(edit, out[0], place, layer, rows), *out[1:])
            return edited(edit, out, place, layer, rows)

        return Hook(change)

    for module, turn in by_turn(place.modules):
        if place.entry.side == "gives":
            yield module.register_forward_hook(after(turn))
        else:
            yield module.register_forward_pre_hook(before(turn), with_kwargs=True)


def by_turn(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, Iterator[int]]]:
    """Each module once, with its layers in order: one that stands in several runs once for each."""
    layers: dict[nn.Module, list[int]] = {}
    for layer, module in enumerate(modules):
        layers.setdefault(module, []).append(layer)
    return [(module, iter(turns)) for module, turns in layers.items()]


def _next(turn: Iterator[int]) -> int:
    layer = next(turn, None)
    if layer is None:
        raise UnsupportedModelError("a module runs more often in a forward than it stands in the layers of the model")
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
