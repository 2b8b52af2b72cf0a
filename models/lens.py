"""The TransformerLens backend: a `TransformerBridge`, patched through its own `hook_z`.

A bridge computes attention itself, so packed rows are kept apart by a dense mask (`models.dense`) and not by a function
registered with transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models import dense
from models.anatomy import Anatomy
from models.attention import edited_scores
from models.calls import Call, current
from models.hooks import edited
from models.huggingface import HuggingFace
from models.interface import (
    NO_EDITS,
    Capabilities,
    Edit,
    Edits,
    Encoded,
    KeyValues,
    Packed,
    Segment,
    Site,
    UnsupportedModelError,
)
from models.layout import Layout, Rows
from models.sites import Place

# Prompts computed in one sequence are scored against each other only to be masked: longer ones are computed alone.
PREFILL_TOKENS = 1024
# After rotary positions, where a model has such.
HOOKS: dict[Site, tuple[str, ...]] = {
    "q": ("hook_rot_q", "hook_q"),
    "k": ("hook_rot_k", "hook_k"),
    "v": ("hook_v",),
    "scores": ("hook_attn_scores",),
    "pattern": ("hook_pattern",),
}
DIFFERENT = 0.05  # of the largest number: more than half precision makes of the same
TOLERANCE = 1e-3  # of the largest logit, between a bridge and the model it was built from


class TransformerLens(HuggingFace):
    """A `TransformerBridge` of a language model, or image-text model, ready to be patched; hooks last one call.

    bridge:    as TransformerLens made it; its device, dtype and hooks are kept. Your own hooks fire in every pass,
               on packed rows too: [1, contexts and rows, ...] instead of [rows, tokens, ...].
    tokenizer: default the bridge's own.
    processor: needed for prompts with images; brings its tokenizer.
    name:      stands in saved vectors and messages; default the config's `_name_or_path` or the class name.

    Raises UnsupportedModelError if a layer has no `hook_z`.

    >>> model = TransformerLens(TransformerBridge.boot_transformers("gpt2"))
    >>> engine.patch(model, "Q: hot\\nA:", heads=[(10, 3)], values=means)
    """

    def __init__(self, bridge: Any, tokenizer: Any = None, processor: Any = None, name: str | None = None):
        hf: nn.Module = bridge.original_model
        outputs = [_output(bridge, layer) for layer in range(len(getattr(bridge, "blocks", ())))]
        if not outputs or None in outputs:
            raise UnsupportedModelError(f"{type(hf).__name__} is bridged without an attn.hook_z in every layer")
        paths = {id(module): path for path, module in hf.named_modules()}
        projections = [paths[id(output.original_component)] for output in outputs]
        if tokenizer is None and processor is None:
            tokenizer = bridge.tokenizer
        super().__init__(hf, tokenizer, processor, name, projections)
        self.bridge = bridge
        self.others: Mapping[Site, str] = {}  # sites that the bridge shows, but not as attention uses them
        # Each by its first name: by an alias, TransformerLens may call a hook once for either name.
        self._hooks: list[str] = [output.hook_in.name for output in outputs]

    def _place(self, name: Site) -> Place:
        if name in self.others:
            raise UnsupportedModelError(f"{self.name} has no {name}: {self.others[name]}")
        return super()._place(name)

    def _rule(self, body: Anatomy) -> Capabilities:
        found = super()._rule(body)
        packed = found.shared() or dense.why_not_dense(self.config)
        why = "its rows stand in one sequence, whose attention TransformerLens shows as a whole"
        apart = {"scores": why, "pattern": why}
        return replace(found, packed=packed, layered="TransformerLens runs its own blocks", apart=apart)

    def pack(
        self,
        segments: Sequence[Segment],
        edits: Edits = NO_EDITS,
        keep: bool = False,
        logits: int = 1,
    ) -> Packed:
        if refused := self.rules().packed:
            raise UnsupportedModelError(f"rows of {self.name} cannot be packed: {refused}")
        if any(segment.length is not None for segment in segments):
            raise UnsupportedModelError(f"{self.name} packs rows by a dense mask, which takes no buffer filled in part")
        layout = Layout(segments, keep, self.shape.n_layers)
        last = layout.last_tokens(logits)
        cache = dense.fill(layout)
        with self._running(self._body, Call()):
            out = self._call(
                edits,
                layout,
                input_ids=layout.tokens(),
                position_ids=layout.positions(self.device),
                attention_mask=dense.masks(layout, self.config, self.dtype, self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
        if "logits_to_keep" not in self._accepts:
            out = out[:, last]
        rows = layout.by_row(out[0], logits)
        if not keep:
            return Packed(rows)
        dense.keep(layout, cache)
        return Packed(rows, layout.contexts, layout.own)

    def packs_images(self, prompt: Encoded) -> bool:
        return False  # the dense mask stands in for the model's own, images are prefilled with that

    def prefill(self, prompts: Sequence[Encoded], lengths: Sequence[int], packed: bool = True) -> list[KeyValues]:
        return super().prefill(prompts, lengths, packed and (len(prompts) == 1 or sum(lengths) <= PREFILL_TOKENS))

    @contextmanager
    def _edited_attention(self, within: Edits, rows: Rows | None) -> Iterator[None]:
        """Within: edits see the bridge's own hooks."""
        call, hooks = current(), []

        def at(site: Site, layer: int, edit: Edit) -> Any:
            by_token = site in ("scores", "pattern")  # [batch, heads, tokens, keys]; the others [batch, tokens, ...]

            def hook(x: Tensor, hook: Any) -> Tensor | None:
                if current() is not call:
                    return None
                if rows is None:
                    x = x.transpose(1, 2) if by_token else x
                    after = edited_scores(edit, x, None) if site == "scores" else edit(x.clone())
                    return after.transpose(1, 2) if by_token else after
                whole = x.clone()
                here = rows.of(whole, layer)
                here.copy_(edit(here.clone()))
                return whole

            return hook

        known = self.bridge.hook_dict
        for site, by_layer in within.items():
            for layer, edit in by_layer.items():
                names = [f"blocks.{layer}.attn.{name}" for name in HOOKS[site]]
                found = next((known[name].name for name in names if name in known), None)
                if found is None:
                    raise UnsupportedModelError(f"its bridge has no {' or '.join(names)}")
                hooks.append((found, at(site, layer, edit)))
        with self.bridge.hooks(fwd_hooks=hooks):
            yield

    @contextmanager
    def _edited_z(self, place: Place, by_layer: Mapping[int, Edit], rows: Rows | None) -> Iterator[None]:
        """Within: edits see the layers' hook_z."""
        call = current()

        def at(layer: int, edit: Edit) -> Any:
            def hook(z: Tensor, hook: Any) -> Tensor | None:
                if current() is not call:
                    return None
                # A copy, as hooks of the caller may hold on to z: [batch, tokens, H, D], or a packed sequence.
                whole = z.clone(memory_format=torch.contiguous_format)
                return edited(edit, whole.flatten(2), place, layer, rows, own=True).view(z.shape)

            return hook

        hooks = [(self._hooks[layer], at(layer, edit)) for layer, edit in by_layer.items()]
        with self.bridge.hooks(fwd_hooks=hooks):
            yield


def from_huggingface(
    hf: nn.Module, tokenizer: Any = None, processor: Any = None, name: str | None = None
) -> TransformerLens:
    """The TransformerLens backend of a transformers model, without a download.

    TransformerLens rewires the modules of a model that it bridges, so it is given a copy: the weights are in memory
    twice, and `hf` stays as it is. The bridge itself is given no tokenizer (it would change it): text is read here.

    Raises ImportError without TransformerLens, UnsupportedModelError if it does not know the architecture, or computes
    other logits than transformers.

    >>> lens.from_huggingface(zoo.tiny("llama")).shape.n_layers
    3
    """
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError as error:
        raise ImportError("TransformerLens is missing: pip install 'headpatch[lens]'") from error
    kind, copy = type(hf).__name__, deepcopy(hf)
    try:
        bridge = build_bridge_from_module(copy, kind, hf_config=copy.config, tokenizer=None)
        model = TransformerLens(bridge, tokenizer, processor, name)
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(f"TransformerLens does not bridge {kind}: {error}") from error
    ids = torch.arange(min(16, model.shape.vocab_size), device=model.device)[None]
    with torch.no_grad():
        want = HuggingFace(hf).forward(ids)
        try:
            got = model.forward(ids)
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"the TransformerLens bridge of {kind} fails in {model.dtype}: {error}"
            ) from error
    if (got - want).abs().max() > TOLERANCE * want.abs().max() and model.dtype in (torch.float32, torch.float64):
        raise UnsupportedModelError(f"the TransformerLens bridge of {kind} computes other logits than transformers")
    model.others = _otherwise_defined(HuggingFace(hf), model, ids[:, :4])
    return model


@torch.no_grad()
def _otherwise_defined(plain: HuggingFace, model: TransformerLens, ids: Tensor) -> dict[Site, str]:
    """Queries, keys, values that the bridge shows before something is done to them: those of OPT before their scale."""
    found: dict[Site, str] = {}
    sites: tuple[Site, ...] = ("q", "k", "v")
    for site in sites:
        seen: list[Tensor] = []

        def see(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.clone())
            return x

        try:
            for one in (plain, model):
                one.forward(ids, {site: {0: see}})
        except UnsupportedModelError:
            continue
        want, got = seen
        if got.shape != want.shape or (got - want).abs().max() > DIFFERENT * want.abs().max():
            found[site] = f"what its bridge shows as {HOOKS[site][-1]} is not what attention uses"
    return found


def is_bridge(x: Any) -> bool:
    """Whether this is a `TransformerBridge`; TransformerLens is not imported to find out.

    >>> is_bridge("gpt2")
    False
    """
    lens = sys.modules.get("transformer_lens.model_bridge")
    bridge = getattr(lens, "TransformerBridge", None)
    return bridge is not None and isinstance(x, bridge)


def _output(bridge: Any, layer: int) -> Any:
    """A layer's output projection, whose input is hook_z; None without one."""
    output = getattr(getattr(bridge.blocks[layer], "attn", None), "o", None)
    return output if hasattr(output, "hook_in") and hasattr(output, "original_component") else None
