"""The plain Hugging Face backend: a transformers model in memory, untouched but for hooks that last one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from models.anatomy import Anatomy
from models.calls import Call, Passing, calling, current
from models.hooks import eager, hooked, last_layer_of_rows, records, remembered, undisturbed
from models.hooks import edits as site_edits
from models.images import PER_TOKEN, fit
from models.interface import (
    NO_EDITS,
    Edit,
    Edits,
    Encoded,
    KeyValues,
    Packed,
    Segment,
    Site,
    SiteShape,
    UnsupportedModelError,
)
from models.layout import Layout, Rows, entering
from models.linear import onednn_linear
from models.packed import packed_attention
from models.seeing import locate
from models.shapes import Float, Int
from models.sites import Place
from models.wrapped import Wrapped


class HuggingFace(Wrapped):
    """A `transformers` language model, or image-text model, ready to be patched.

    hf:          the model, in memory; its device and dtype are kept.
    tokenizer:   needed for string prompts only; token ids work without.
    processor:   needed for prompts with images; brings its tokenizer.
    name:        stands in saved vectors and messages; default the config's `_name_or_path` or the class name.
    projections: dotted names of the attention output projections, a layer each, where they are not found.

    Modules may be replaced later (adapters, quantisation): the parts are looked up at every call.

    Raises UnsupportedModelError if no output projections are found.
    """

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        edits: Edits = NO_EDITS,
        prefix: KeyValues | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        logits: int = 1,
    ) -> Float[Tensor, "batch *places vocab"]:
        batch, n_tokens = tokens.shape
        body = self.body
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": prefix is not None}
        if prefix is not None:
            given["past_key_values"] = _expanded_cache(prefix, batch)
            # Counted on from the prefix: what a model would guess depends on what it last saw.
            start: Any = len(prefix) + prefix.offset
            given["position_ids"] = torch.arange(start, start + n_tokens, device=self.device).expand(batch, -1)
        for key, value in fit(dict(inputs or {}), n_tokens).items():
            given[key] = value if batch == 1 else value.repeat(batch, *[1] * (value.ndim - 1))
        with self._running(body, Call(batch=batch)):
            # A slice: an integer makes some models cut their last layers short (Gemma4).
            out = self._call(edits, None, logits_to_keep=slice(-logits, None), **given)[:, -logits:]
        return out[:, 0] if logits == 1 else out

    def pack(
        self,
        segments: Sequence[Segment],
        edits: Edits = NO_EDITS,
        keep: bool = False,
        logits: int = 1,
    ) -> Packed:
        layered = bool(segments[0].entry)
        body = (
            self._body if self._body.has_its_blocks() else self.body
        )  # `state`, asked for by every verb, saw it whole
        if refused := self._ruled_of(body).why_not("layered" if layered else "packed"):
            how = "come in layer by layer" if layered else "be packed"
            raise UnsupportedModelError(f"rows of {self.name} cannot {how}: {refused}")
        layout = Layout(segments, keep, body.shape.n_layers)
        last = layout.last_tokens(logits)
        ids, call = layout.tokens(), Call(layout)
        images: dict[str, Any] = dict(segments[0].inputs)
        with (
            self._running(body, call),
            packed_attention(self.config),
            entering(body.blocks, layout),
        ):
            out = self._call(
                edits,
                layout,
                input_ids=ids,
                position_ids=layout.positions(self.device),
                # All ones: without it transformers takes rows, whose positions do not follow on, for other texts.
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                logits_to_keep=last,
                **images,
            )
        if call.attended != body.shape.n_layers:
            raise UnsupportedModelError(
                f"rows of {self.name} cannot be packed: {call.attended} attentions of "
                f"{body.shape.n_layers} layers went through transformers' attention interface"
            )
        if "logits_to_keep" not in self._accepts:
            out = out[:, last]
        found = layout.by_row(out[0], logits)
        return Packed(found, layout.contexts, layout.own) if keep else Packed(found)

    def packs_images(self, prompt: Encoded) -> bool:
        """Where a token counts by its id and its place alone: no token types, one place a token."""
        place = not any(hasattr(module, "rope_deltas") for module in self._body.remembering)
        return place and not any(name in PER_TOKEN for name in prompt.inputs)

    def project(self, layer: int, z: Float[Tensor, "... heads head_dim"]) -> Float[Tensor, "... heads d_model"]:
        """By the module itself, which may be quantised or carry an adapter: a head's z beside zeros, less the bias."""
        projection, heads = self.projections[layer], self.shape.n_heads
        weight = getattr(projection, "weight", None)
        if self._mesh is not None or (isinstance(weight, Tensor) and weight.is_meta):
            raise UnsupportedModelError(
                f"W_O of {self.name} is not all in this process: single heads are not projected"
            )
        width = self._head_dims(self._body)[layer]
        z = z.to(self.device, self.dtype)[..., :width]
        alone = torch.zeros(*z.shape[:-2], heads, heads, width, dtype=z.dtype, device=z.device)
        each = torch.arange(heads, device=z.device)
        alone[..., each, each, :] = z  # [..., H, H, D]: head h alone in row h
        with self._running(self._body, Call()):
            return projection(alone.flatten(-2)) - projection(alone.new_zeros(1, heads * width))

    def prefill(self, prompts: Sequence[Encoded], lengths: Sequence[int], packed: bool = True) -> list[KeyValues]:
        if not packed or self.rules().packed or any(prompt.inputs for prompt in prompts):
            return [self._prefill_one(prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]
        none = torch.empty(0, 0, dtype=torch.long, device=self.device)
        segments = [Segment(prompt.ids[:n], none) for prompt, n in zip(prompts, lengths, strict=True)]
        return self.pack(segments, keep=True, logits=0).contexts

    def _prefill_one(self, prompt: Encoded, n_tokens: int) -> KeyValues:
        from transformers import DynamicCache

        cache = DynamicCache()  # without a config every layer keeps all tokens, sliding windows included
        offset = self.fill(cache, prompt, n_tokens)
        if any(layer.keys is None or layer.keys.shape[2] != n_tokens for layer in cache.layers):
            raise UnsupportedModelError(f"the cache of {self.name} does not keep every token of every layer")
        keys, values = [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]
        return KeyValues(keys, values, offset)

    def fill(self, cache: Any, prompt: Encoded, n_tokens: int) -> int:
        """The first tokens put into a cache of transformers, by the model's own attention, with the pixels; the
        positions it gives are read off on the way. Returns `KeyValues.offset`.
        """
        seen: list[Tensor | None] = []

        def positions(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs.get("position_ids"))

        with self._running(self.body, Call()):
            handle = self.decoder.register_forward_pre_hook(Passing(positions), with_kwargs=True)
            try:
                given = fit(prompt.inputs, n_tokens)
                ids = prompt.ids[None, :n_tokens]
                more: dict[str, Any] = dict(use_cache=True, logits_to_keep=slice(-1, None), **given)
                self._call(NO_EDITS, None, input_ids=ids, past_key_values=cache, **more)
            finally:
                handle.remove()
        given_positions = seen[0] if prompt.inputs and seen else None
        return 0 if given_positions is None else int(given_positions.max()) + 1 - n_tokens

    @contextmanager
    def _running(self, body: Anatomy, call: Call) -> Iterator[None]:
        """Within: no dropout, and fast linear layers. After: all as before, what is remembered of other calls too."""
        with (
            calling(self.hf, self.config, call),
            undisturbed(body.modules),
            records(self.hf.config, self.config),
            remembered(body.remembering),
            eager(self._compiled or any(module._compiled_call_impl is not None for module in body.modules)),
            onednn_linear(self._linears),
        ):
            yield

    def _call(self, edits: Edits, layout: Layout | None, **given: Any) -> Tensor:
        """The one place that runs the model: logits [batch, kept, vocab]. layout: where the rows are that edits see."""
        with self.changed(edits, layout):
            return self._logits(given)

    def site(self, name: Site) -> SiteShape:
        self.body  # noqa: B018  # looked at anew: parts may have been replaced
        place = self._place(name)
        sizes = tuple(place.sizes)
        units, width = (max(each) for each in zip(*sizes, strict=True))
        return SiteShape(len(sizes), units, width, sizes if len(set(sizes)) > 1 else ())

    def _place(self, name: Site) -> Place:
        """Where a site is, as long as the model consists of the same parts."""
        if name not in self._places:
            self._places[name] = locate(self, name, self.body)
        if isinstance(found := self._places[name], str):
            raise UnsupportedModelError(f"{self.name} has no {name}: {found}")
        return found

    def changed(self, edits: Edits, layout: Layout | None = None) -> Any:
        """Within: what belongs to the call that is on its way is edited, by hooks that are gone after."""
        return self.edited({site: (self._place(site), by_layer) for site, by_layer in edits.items()}, layout)

    @contextmanager
    def edited(
        self, edits: Mapping[Site, tuple[Place, Mapping[int, Edit]]], layout: Layout | None = None
    ) -> Iterator[None]:
        """As `changed`, of sites that are at these places."""
        body, rows = self._body, layout.rows() if layout else None
        within = {site: by_layer for site, (place, by_layer) in edits.items() if place.entry.side == "attention"}
        first = layout.first_row if layout else 0
        with (
            self._edited_attention(within, rows) if within else nullcontext(),
            self._edited_z(*edits["z"], rows) if "z" in edits else nullcontext(),
            hooked(
                lambda: chain(
                    *(
                        site_edits(by_layer, place, rows)
                        for site, (place, by_layer) in edits.items()
                        if site != "z" and site not in within
                    ),
                    last_layer_of_rows(body.projections, body.blocks, first),
                )
            ),
        ):
            yield

    @contextmanager
    def _edited_attention(self, within: Edits, rows: Rows | None) -> Iterator[None]:
        """Within: edits see what attention is handed, and makes, by transformers' attention interface."""
        if (call := current()) is not None:
            call.edits = within
        with packed_attention(self.config):
            yield

    def _edited_z(self, place: Place, by_layer: Mapping[int, Edit], rows: Rows | None) -> Any:
        return hooked(lambda: site_edits(by_layer, place, rows, own=True))

    def few_tokens(self, count: int) -> dict[str, Any]:
        """A prompt as the model takes it, to see what a forward goes through."""
        ids = torch.arange(count, device=self.device)[None] % self.shape.vocab_size
        return {"input_ids": ids, "use_cache": False}

    def _logits(self, given: dict[str, Any]) -> Tensor:
        given = {key: value for key, value in given.items() if key in self._accepts}
        return self.hf(**given).logits


def _expanded_cache(prefix: KeyValues, rows: int) -> Any:
    """Transformers' cache of `rows` copies of the prefix; the copies are made layer by layer as rows append."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(k.expand(rows, *k.shape), v.expand(rows, *v.shape), layer)
    return cache
