"""A row step of fixed sizes, run thousands of times: every buffer stays in its place, and on CUDA the pass is a graph.

At 32 query tokens a GPU is done with a layer sooner than Python can ask for the next. Recorded once and replayed, the
pass costs what its kernels cost: about reading the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from engine.core.edits import Ready, at_tokens, in_order, patch_units, spans
from engine.core.patches import Heads, Mode, Patch, Patches, Positions, Values, no_patch
from engine.core.patching import decide, request
from engine.core.prefix import Prefix, as_prefix, compute
from engine.core.reading import check_model, read_patches, read_positions
from models import Edit, Edits, KeyValues, Model, PromptLike, Segment, Site, UnsupportedModelError
from models.reading import read_int
from models.shapes import Float, Integer

SAME = 1e-6  # of the largest logit: a replay runs the very kernels of the plain pass
Impl: TypeAlias = Literal["auto", "graph", "eager"]


class RowStep:
    """`engine.patch` for rows of one prompt after another, all of the same number of rows, at the same positions.

    rows:      of every call.
    context:   tokens of the longest prefix it will be given; buffers of that many keys and values are held.
    positions: patched tokens, counted from the end of the prompt. Default: the last.
    mode:      "replace", "add" or "scale": of heads and values; patches have their own.
    impl:      "graph" records the pass as a CUDA graph at the first call, holds it to the plain pass, and replays it;
               "eager" runs the same pass over the same buffers; "auto" (default) is "graph" on CUDA, else "eager".
               A graph that cannot be recorded, or disagrees, raises under "graph"; "auto" warns and runs eager.

    A graph does what the model did when it was recorded: hooks, adapters or weights put in later do not take part. Make
    a new one after changing the model.

    Raises UnsupportedModelError if the model's rows cannot be packed, ValueError for sizes that make no sense.

    >>> step = engine.RowStep(model, rows=2, context=16)
    >>> step("Q: hot\\nA:", heads=masks[:2], values=means).shape == (2, model.shape.vocab_size)
    True
    """

    def __init__(
        self,
        model: Model,
        rows: Integer = 32,
        context: Integer = 1024,
        *,
        positions: Positions = -1,
        mode: Mode = "replace",
        impl: Impl = "auto",
    ):
        check_model(model)
        if impl not in get_args(Impl):
            raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
        rows, context = read_int(rows, "rows"), read_int(context, "context")
        if refused := model.rules().packed:
            raise UnsupportedModelError(f"rows of {model.name} cannot be packed: {refused}")
        at = read_positions(positions)
        if max(at) >= 0:
            raise ValueError(f"positions must count from the end of the prompt (-1 is the last), got {positions!r}")
        weights = {weight.device for weight in getattr(model, "hf", torch.nn.Module()).parameters()} or {model.device}
        # A graph replays addresses: weights that are loaded layer by layer (accelerate) have none to keep.
        on_cuda = len(weights) == 1 and weights.pop().type == "cuda"
        if impl == "graph" and not on_cuda:
            raise ValueError(f"impl='graph' needs all weights on one CUDA device, {model.name} is on {model.device}")
        self.model, self.rows, self.context, self.mode = model, rows, context, mode
        self.positions = at
        self.impl = impl
        self.tail = -min(at)  # tokens of a row
        self._records = on_cuda and impl != "eager"
        self._graph: torch.cuda.CUDAGraph | None = None
        device = model.device
        self._ids = torch.zeros(rows, self.tail, dtype=torch.long, device=device)
        self._length, self._offset = torch.zeros(2, dtype=torch.long, device=device)
        self._kind: Hashable = None  # of the patches that the buffers are for
        self._ready: list[Ready] = []
        self._edits: Edits = {}
        self._cache = KeyValues(offset=self._offset)
        self._held: Prefix | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self,
        prompt: PromptLike | Prefix,
        patches: Patch | Sequence[Patch] | None = None,
        *,
        heads: Heads = None,
        values: Values = None,
    ) -> Float[Tensor, "rows vocab"]:
        """Last-token logits of every row; a prompt that is not a computed `Prefix` is computed first.

        Patches of other sites, units, modes or kinds of values than before ask for another graph.

        Raises ValueError for another number of rows than the step was made for, a prefix longer than its buffers, or
        one that holds nothing, patches at other positions than the step's; UnsupportedModelError for attention over
        tokens, and functions; else as `engine.patch`.
        """
        if patches is None:
            patch = read_patches(self.model, None, heads, values, self.positions, self.mode)
        else:
            patch = read_patches(self.model, patches, heads, values)
        if patch.n_rows != self.rows:
            raise ValueError(f"the step was made for {self.rows} rows, got {patch.n_rows}")
        if odd := [c.given for c in patch.each if not isinstance(c.given, Patch) or c.site in ("scores", "pattern")]:
            what = f"an engine.{type(odd[0]).__name__} of attention over tokens, or by a function"
            raise UnsupportedModelError(
                f"a step has buffers of fixed sizes, which does not take {what}: engine.patch does"
            )
        if not {p for change in patch.each for p in change.positions} <= set(self.positions):
            raise ValueError(f"the step was made for positions {list(self.positions)}, got patches at others")
        prefix = as_prefix(self.model, prompt)
        n_tokens = len(prefix.tokens)
        split = n_tokens - self.tail
        if not 1 <= split <= self.context:
            shortest, longest = self.tail + 1, self.tail + self.context
            raise ValueError(f"the step takes prompts of {shortest} to {longest} tokens, got {n_tokens}")
        self._load(prefix, split)
        self._set(patch)
        if not self._records:
            return self._run()
        if self._graph is None:
            return self._record()
        self._graph.replay()
        return self._logits.clone()  # type: ignore[union-attr]

    def _load(self, prefix: Prefix, split: int) -> None:
        """The prefix into the buffers, unless it is there."""
        if prefix is self._held:
            return
        asked = request(prefix, no_patch(self.model.shape.n_layers, self.rows), [split])
        decide(self.model, [prefix], [asked], "packed")
        cache = compute([prefix], [split])[0].cache
        if not self._cache.keys:
            for buffers, given in ((self._cache.keys, cache.keys), (self._cache.values, cache.values)):
                buffers += [t.new_zeros(t.shape[0], self.context, t.shape[2]) for t in given]
        buffers = [*self._cache.keys, *self._cache.values]
        torch._foreach_copy_([t[:, :split] for t in buffers], [t[:, :split] for t in (*cache.keys, *cache.values)])
        # Weights of zero do not silence what is not finite: nothing of a longer prefix may stay behind.
        torch._foreach_zero_([t[:, split:] for t in buffers])
        self._ids.copy_(prefix.tokens[split:].expand_as(self._ids))
        self._length.fill_(split)
        self._offset.fill_(cache.offset)
        self._held = prefix

    def _set(self, patch: Patches) -> None:
        """Masks and values into their buffers; patches of another kind ask for others, and another graph."""
        acts = [change.units.any(dim=2).any(dim=0).tolist() for change in patch.each]
        values = [change.values for change in patch.each if change.values is not None]  # all have some
        kind: Hashable = tuple(
            (change.site, change.mode, change.positions, x.shape, tuple(at) if change.site != "z" else None)
            for change, x, at in zip(patch.each, values, acts, strict=True)
        )
        new = [Ready(self.model, change) for change in patch.each]
        if kind == self._kind:
            for held, ready in zip(self._ready, new, strict=True):
                held.mask.copy_(ready.mask)
                held.values.copy_(ready.values)
            return
        self._kind, self._graph, self._ready = kind, None, new
        edits: dict[Site, dict[int, list[Edit]]] = {}
        for change, ready, layers in zip(patch.each, new, acts, strict=True):
            ready.own()
            where = spans(at_tokens(change, self.tail), change)
            for layer, on in enumerate(layers):
                if on or change.site == "z":
                    act = partial(patch_units, ready, where, change.mode, layer)
                    edits.setdefault(change.site, {}).setdefault(layer, []).append(act)
        self._edits = {site: {at: in_order(each) for at, each in by.items()} for site, by in edits.items()}

    def _run(self) -> Float[Tensor, "rows vocab"]:
        segment = Segment(self._cache, self._ids, length=self._length)
        return self.model.pack([segment], self._edits).logits[0]

    def _record(self) -> Float[Tensor, "rows vocab"]:
        """Record the pass, and see that a replay gives what the plain pass gives."""
        want = self._run()  # also compiles and loads whatever is done lazily, as recording demands
        try:
            stream = torch.cuda.Stream(self.model.device)
            stream.wait_stream(torch.cuda.current_stream(self.model.device))
            with torch.cuda.stream(stream):
                self._run()
            torch.cuda.current_stream(self.model.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._run()
            graph.replay()
            apart = ((self._logits - want).abs().max() / want.abs().max()).item()
            wrong = f"its replay is off by {apart:.1e} of the largest logit"
            if apart <= SAME:
                self._graph = graph
                return want
        except RuntimeError as error:  # torch's errors of capture: something in the model waits for the CPU
            wrong = f"it could not be recorded ({str(error).splitlines()[0]})"
        if self.impl == "graph":
            raise UnsupportedModelError(f"no CUDA graph of {self.model.name}: {wrong}")
        warnings.warn(f"no CUDA graph of {self.model.name}: {wrong}; the step runs without one", stacklevel=4)
        self._records = False
        return want
