"""The plain Hugging Face backend: a transformers model in memory, untouched but for hooks that last one call."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from models.anatomy import Anatomy, dissect, parts, read_eos
from models.calls import Call, Passing, calling, foreign_hooks_of
from models.hooks import eager, edits, hooked, last_layer_of_rows, records, remembered, steers, undisturbed
from models.images import PER_TOKEN, fit, image_marker, read_images
from models.interface import (
    IMAGE,
    Capabilities,
    Edit,
    Encoded,
    KeyValues,
    Packed,
    Prompt,
    PromptLike,
    Segment,
    Shape,
    Steer,
    UnsupportedModelError,
)
from models.layout import Layout, Rows, entering
from models.linear import onednn_layers, onednn_linear
from models.packed import implementation, packed_attention
from models.reading import check_ids, read_ids
from models.rules import NOT_CAUSAL, rules
from models.shapes import Float, Int
from models.sharding import execution_device, gather, head_mesh, own


class HuggingFace:
    """A `transformers` language model, or image-text model, ready to be patched.

    hf:          the model, in memory; its device and dtype are kept.
    tokenizer:   needed for string prompts only; token ids work without.
    processor:   needed for prompts with images; brings its tokenizer.
    name:        stands in saved vectors and messages; default the config's `_name_or_path` or the class name.
    projections: dotted names of the attention output projections, a layer each, where they are not found.

    Modules may be replaced later (adapters, quantisation): the parts are looked up at every call.

    Raises UnsupportedModelError if no output projections are found.
    """

    generates = True

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any = None,
        processor: Any = None,
        name: str | None = None,
        projections: Sequence[str] | None = None,
    ):
        if getattr(hf.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(hf).__name__} is an encoder-decoder: expected a decoder alone (...ForCausalLM), or an encoder"
            )
        if not isinstance(getattr(_embeddings(hf), "weight", None), Tensor):
            raise UnsupportedModelError(
                f"{type(hf).__name__} has no table of token embeddings: expected a language model"
            )
        self.hf = hf
        self.processor = processor
        self.tokenizer = processor.tokenizer if tokenizer is None and processor is not None else tokenizer
        self.config = hf.config.get_text_config()  # type: ignore[operator, union-attr]
        self.name: str = name or str(hf.config._name_or_path) or type(hf).__name__  # type: ignore[union-attr]
        self.eos = read_eos(hf)
        self._names = projections
        self._take_stock()

    def _take_stock(self) -> None:
        """What every call needs, as long as the model consists of the same parts."""
        self._body = self._dissect()
        modules = self._body.modules
        self._linears = onednn_layers(modules)
        self._compiled = any("_orig_mod" in module._modules for module in modules)
        self._mesh = head_mesh(self.hf, self._body.projections, self._body.shape)
        self._accepts = frozenset(inspect.signature(self.hf.forward).parameters)
        self._ruled: tuple[Hashable, Capabilities] = None, Capabilities()

    def _dissect(self) -> Anatomy:
        return dissect(self.decoder, self.config, self._names, self.hf)

    @property
    def decoder(self) -> nn.Module:
        found = self.hf.get_decoder() if hasattr(self.hf, "get_decoder") else self.hf  # type: ignore[operator]
        return found if len(found._modules) else self.hf  # some name their vocabulary projection so

    @property
    def body(self) -> Anatomy:
        """The model's parts, as they are now."""
        if not self._body.consists_of(*parts(self.hf)):
            self._take_stock()
        return self._body

    @property
    def projections(self) -> list[nn.Module]:
        return self.body.projections

    @property
    def shape(self) -> Shape:
        return (self._body if self._body.has_its_blocks() else self.body).shape

    def state(self) -> Hashable:
        body = self.body
        foreign = tuple((at, key) for at, module in enumerate(body.modules) for key in foreign_hooks_of(module))
        versions = sum(0 if weight.is_inference() else weight._version for weight in body.weights)
        return id(body), foreign, versions, self._config_state(), self.dtype, self.device

    def _config_state(self) -> str:
        return repr({**vars(self.config), "_attn_implementation_internal": implementation(self.config)})

    def foreign_hooks(self) -> list[str]:
        return [name or type(module).__name__ for name, module in self.hf.named_modules() if foreign_hooks_of(module)]

    def rules(self) -> Capabilities:
        return self._ruled_of(self.body)

    def _ruled_of(self, body: Anatomy) -> Capabilities:
        state = self._config_state()
        if self._ruled[0] != state:
            self._ruled = state, self._rule(body)
        return self._ruled[1]

    def _rule(self, body: Anatomy) -> Capabilities:
        return rules(self.hf, self.config, self.decoder, body, self._accepts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.shape}; {self.dtype} on {self.device})"

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found again: copies have parts of their own."""
        again = ("_body", "_linears", "_compiled", "_mesh", "_accepts", "_ruled")
        return {key: value for key, value in vars(self).items() if key not in again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._take_stock()

    @property
    def device(self) -> torch.device:
        return execution_device(self.hf.get_input_embeddings())  # type: ignore[operator]

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.get_input_embeddings().weight.dtype  # type: ignore[operator]

    def own_heads(self, x: Tensor, dim: int) -> Tensor:
        return x if self._mesh is None else own(x, dim, self._mesh)

    def all_heads(self, x: Tensor, dim: int) -> Tensor:
        return x if self._mesh is None else gather(x, dim, self._mesh)

    def read(self, prompt: PromptLike) -> Encoded:
        if isinstance(prompt, Prompt) and prompt.images:
            if self.processor is None:
                raise ValueError(
                    f"the prompt has {len(prompt.images)} image(s), but {self.name} is a text model, "
                    "or was wrapped without its processor"
                )
            image_token = getattr(self.hf.config, "image_token_id", None) or self.hf.config.image_token_index  # type: ignore[union-attr]
            read = read_images(prompt, self.processor, image_token, self.name)  # type: ignore[arg-type]
            inputs = {
                key: value.to(self.device, self.dtype if value.is_floating_point() else None)
                for key, value in read.inputs.items()
            }
            n_embeddings = self.hf.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
            check_ids(read.ids, n_embeddings, self.shape.max_tokens, self.name)
            return Encoded(read.ids.to(self.device), inputs, read.image_tokens)
        marker = image_marker(self.processor) if self.processor is not None else None
        if marker and isinstance(prompt, Prompt) and (marker in prompt.text or IMAGE in prompt.text):
            raise ValueError(f"the prompt has image markers and no images: {prompt.text!r:.80}")
        return self._read_text(prompt, self.shape.vocab_size)

    def _read_text(self, prompt: PromptLike, vocab_size: int) -> Encoded:
        ids = read_ids(prompt, self.tokenizer, self.name)
        check_ids(ids, vocab_size, self.shape.max_tokens, self.name)
        return Encoded(ids.to(self.device))

    def encode(self, prompt: PromptLike) -> Int[Tensor, " tokens"]:
        return self.read(prompt).ids

    def decode(self, tokens: Int[Tensor, " tokens"]) -> str:
        if self.tokenizer is None:
            raise ValueError(f"{self.name} was wrapped without a tokenizer: text needs wrap(..., tokenizer=)")
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def then(self, prompt: Encoded, answer: Int[Tensor, " more"]) -> Encoded:
        grown = prompt.then(answer)
        if NOT_CAUSAL not in self.rules().shared() or "token_type_ids" not in self._accepts:
            return grown
        # The prompt's tokens see each other; of type 1 are those that follow, which see what is before them.
        types = fit(prompt.inputs, len(prompt.ids)).get("token_type_ids", torch.zeros_like(prompt.ids)[None])
        more = torch.ones_like(answer)[None].to(types)
        return replace(grown, inputs={**prompt.inputs, "token_type_ids": torch.cat([types, more], dim=1)})

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        edit: Edit | None = None,
        prefix: KeyValues | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        steer: Steer | None = None,
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
        with self._running(body, Call()):
            # A slice: an integer makes some models cut their last layers short (Gemma4).
            out = self._call(edit, steer, None, logits_to_keep=slice(-logits, None), **given)[:, -logits:]
        return out[:, 0] if logits == 1 else out

    def pack(
        self,
        segments: Sequence[Segment],
        edit: Edit | None = None,
        keep: bool = False,
        logits: int = 1,
        steer: Steer | None = None,
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
        rows = Rows(layout.first_row, layout.n_tokens)
        ids = layout.tokens()
        images: dict[str, Any] = dict(segments[0].inputs)
        with (
            self._running(body, Call(layout)),
            packed_attention(self.config),
            entering(body.blocks, layout),
        ):
            out = self._call(
                edit,
                steer,
                rows,
                input_ids=ids,
                position_ids=layout.positions(self.device),
                # All ones: without it transformers takes rows, whose positions do not follow on, for other texts.
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                logits_to_keep=last,
                **images,
            )
        if layout.attended != body.shape.n_layers:
            raise UnsupportedModelError(
                f"rows of {self.name} cannot be packed: {layout.attended} attentions of "
                f"{body.shape.n_layers} layers went through transformers' attention interface"
            )
        if "logits_to_keep" not in self._accepts:
            out = out[:, last]
        found = layout.by_row(out[0], logits)
        return Packed(found, layout.contexts, layout.rows) if keep else Packed(found)

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
                self._call(None, None, None, input_ids=ids, past_key_values=cache, **more)
            finally:
                handle.remove()
        given_positions = seen[0] if prompt.inputs and seen else None
        return 0 if given_positions is None else int(given_positions.max()) + 1 - n_tokens

    def _head_dims(self, body: Anatomy) -> Sequence[int]:
        return body.shape.head_dims or [body.shape.head_dim] * body.shape.n_layers

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

    def _call(self, edit: Edit | None, steer: Steer | None, rows: Rows | None, **given: Any) -> Tensor:
        """The one place that runs the model: logits [batch, kept, vocab]. rows: where those are that `edit` sees."""
        with self.changed(edit, steer, rows):
            return self._logits(given)

    @contextmanager
    def changed(self, edit: Edit | None, steer: Steer | None, rows: Rows | None = None) -> Iterator[None]:
        """Within: what belongs to the call that is on its way is edited and steered, by hooks that are gone after."""
        blocks = self._body.blocks
        if steer and not blocks:
            raise UnsupportedModelError(f"{self.name} cannot be steered: its blocks were not found")
        with self._edited(edit, rows), hooked(lambda: steers(steer, blocks, rows)):
            yield

    def _edited(self, edit: Edit | None, rows: Rows | None) -> Any:
        """Within: `edit` sees the input of every output projection, the last ones of rows only."""
        body = self._body
        return hooked(
            lambda: chain(
                edits(edit, body.projections, self._head_dims(body), rows),
                last_layer_of_rows(body.projections, body.blocks, rows.first if rows else 0),
            )
        )

    def _logits(self, given: dict[str, Any]) -> Tensor:
        given = {key: value for key, value in given.items() if key in self._accepts}
        return self.hf(**given).logits


def _embeddings(hf: nn.Module) -> Any:
    try:
        return hf.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _expanded_cache(prefix: KeyValues, rows: int) -> Any:
    """Transformers' cache of `rows` copies of the prefix; the copies are made layer by layer as rows append."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(k.expand(rows, *k.shape), v.expand(rows, *v.shape), layer)
    return cache
