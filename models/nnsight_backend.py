"""The nnsight backend: patches made inside traces of an nnsight model, with the packed rows of the plain backend."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.anatomy import Anatomy
from models.hooks import edited
from models.huggingface import HuggingFace
from models.interface import Capabilities, Edits, UnsupportedModelError
from models.layout import Layout

LEFT = ("forward", "__nnsight__")  # what nnsight leaves in the __dict__ of a module


def is_nnsight(model: object) -> bool:
    """Whether it is an nnsight model (`NNsight`, `TransformersModel`); nnsight is not imported to find out.

    >>> is_nnsight("smollm2-135m")
    False
    """
    nnsight = sys.modules.get("nnsight")
    return nnsight is not None and isinstance(model, nnsight.Envoy)


class NNsightBackend(HuggingFace):
    """A `transformers` model wrapped by nnsight, ready to be patched: every forward is a trace of the caller's model.

    model:       `nnsight.NNsight(hf)` or `nnsight.TransformersModel(...)`; loaded now if it was not yet.
    tokenizer, processor: default those of a `TransformersModel`; else as for `HuggingFace`.
    name, projections:    as for `HuggingFace`.

    What a model does in a trace beyond its own code, edits registered by `model.edit()`, happens here too. Such edits
    may depend on where a token stands, so no prefix is shared then: wrap again after registering or clearing them.

    nnsight keeps a `forward` and a `__nnsight__` in the `__dict__` of every module it has wrapped, idle outside traces;
    they stay as long as the caller's nnsight model is in use. `from_huggingface` can take its own off: `unwrap()`.

    Raises TypeError for anything but an nnsight model, UnsupportedModelError for one that is no language model or of
    unknown layout. Calls raise RuntimeError inside a trace of the same model.

    >>> model = NNsightBackend(nnsight.NNsight(hf), tokenizer)
    >>> engine.patch(model, "Q: hot\\nA:", heads=[(10, 3)], values=means).shape
    torch.Size([1, 49152])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        processor: Any = None,
        name: str | None = None,
        projections: Sequence[str] | None = None,
    ):
        if not is_nnsight(model):
            raise TypeError(f"expected an nnsight model, got {type(model).__name__}")
        if not getattr(model, "dispatched", True):
            model.dispatch()
        _refuse_others(model._module)
        processor = processor or getattr(model, "processor", None)
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        super().__init__(model._module, tokenizer, processor, name, projections)
        self.model = model
        self._envoys = {envoy._module: envoy for envoy in model.modules()}
        self._own_edits = list(model._edits)
        self._found: dict[nn.Module, dict[str, Any]] = {}

    def _rule(self, body: Anatomy) -> Capabilities:
        if self._own_edits:
            why = "it has edits registered with nnsight, of any token"
            return Capabilities(layered=why, packed=why, expanded=why)
        return replace(super()._rule(body), layered="nnsight runs the blocks inside a trace")

    def unwrap(self) -> nn.Module:
        """The transformers model, without what nnsight put on it if `from_huggingface` did; not to be used after."""
        _restore(self._found)
        self._found = {}
        return self.hf

    def _call(self, edits: Edits, layout: Layout | None, **given: Any) -> Tensor:
        if self.model.interleaver.interleaving:
            raise RuntimeError(f"{self.name} is in a trace already: patch it outside")
        if self.model._edits != self._own_edits:
            raise RuntimeError(f"edits of {self.name} were registered or cleared since it was wrapped: wrap it again")
        logits: list[Tensor] = []
        place, by_layer = self._place("z"), edits.get("z", {})
        rows = layout.rows() if layout else None
        if by_layer and not self._envoys.keys() >= set(place.modules):
            raise RuntimeError(f"modules of {self.name} were replaced since nnsight wrapped it: wrap it again")
        # The block runs in a greenlet, whose context variables are not the caller's: edits get the caller's.
        apply = copy_context().run
        change: Any = partial(edited, place=place, rows=rows, own=True)

        def run(_: Tensor) -> None:
            logits.append(self._logits(given))

        others: Edits = {site: found for site, found in edits.items() if site != "z"}
        # A float tensor goes to `run` as it is, whatever the class of nnsight's model; token ids would be prepared.
        with self.changed(others, layout), self.model.trace(torch.zeros(1, 1), fn=run):
            for layer, edit in sorted(by_layer.items()):
                envoy = self._envoys[place.modules[layer]]
                x = envoy.input
                after = apply(change, edit, x, layer=layer)
                if after is not x:
                    envoy.input = after
        return logits[0]


def from_huggingface(
    hf: nn.Module, tokenizer: Any = None, processor: Any = None, name: str | None = None
) -> NNsightBackend:
    """Wrap a transformers model in memory, `nnsight.NNsight(hf)`; nothing is copied.

    Raises ImportError without nnsight, UnsupportedModelError as `NNsightBackend`.

    >>> from_huggingface(hf, tokenizer).unwrap() is hf
    True
    """
    try:
        import nnsight
    except ImportError as error:
        raise ImportError("this needs nnsight: pip install 'headpatch[nnsight]'") from error
    _refuse_others(hf)
    found = {m: {key: m.__dict__[key] for key in LEFT if key in m.__dict__} for m in hf.modules()}
    try:
        backend = NNsightBackend(nnsight.NNsight(hf), tokenizer, processor, name)
    except BaseException:
        _restore(found)
        raise
    backend._found = found
    return backend


def _refuse_others(hf: nn.Module) -> None:
    if not getattr(hf, "can_generate", lambda: False)():
        raise UnsupportedModelError(
            f"{type(hf).__name__} is not a language model of transformers: nothing else can be patched through nnsight"
        )


def _restore(found: dict[nn.Module, dict[str, Any]]) -> None:
    for module, before in found.items():
        for key in LEFT:
            module.__dict__.pop(key, None)
        module.__dict__.update(before)
