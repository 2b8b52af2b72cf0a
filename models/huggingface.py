"""The plain Hugging Face backend: a transformers model in memory, untouched but for hooks that last one call."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.anatomy import find_blocks, find_projections, read_eos, read_shape, why_not_packed, why_not_shared
from models.images import PER_TOKEN, fit, image_marker, read_images
from models.interface import (
    IMAGE,
    Edit,
    Encoded,
    KeyValues,
    Packed,
    Prompt,
    PromptLike,
    Segment,
    Steer,
    UnsupportedModelError,
)
from models.linear import onednn_layers, onednn_linear
from models.packed import Layout, entering, packed_attention
from models.reading import check_ids, read_ids
from models.shapes import Float, Int
from models.sharding import execution_device, gather, head_mesh, own

FEED_FORWARD = "mlp"


class HuggingFace:
    """A `transformers` language model, or image-text model, ready to be patched.

    hf:          the model, in memory; its device and dtype are kept.
    tokenizer:   needed for string prompts only; token ids work without.
    processor:   needed for prompts with images; brings its tokenizer.
    name:        stands in saved vectors and messages; default the config's `_name_or_path` or the class name.
    projections: dotted names of the attention output projections, a layer each, where they are not found.

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
        self.hf = hf
        self.processor = processor
        self.tokenizer = processor.tokenizer if tokenizer is None and processor is not None else tokenizer
        self.config = hf.config.get_text_config()  # type: ignore[operator, union-attr]
        self.name: str = name or str(hf.config._name_or_path) or type(hf).__name__  # type: ignore[union-attr]
        self.decoder = hf.get_decoder() if hasattr(hf, "get_decoder") else hf  # type: ignore[operator]
        if projections is None:
            self.projections = find_projections(self.decoder, self.config.num_hidden_layers)
        else:
            self.projections = [hf.get_submodule(path) for path in projections]
        self.shape = read_shape(self.config, self.projections)
        self.sharing_refused = why_not_shared(self.decoder)
        self.packing_refused = self.sharing_refused or why_not_packed(hf, self.config)
        self.blocks = find_blocks(self.decoder, self.projections)
        self.layering_refused = "" if self.blocks else "its blocks are not a list that its projections lie in"
        self.eos = read_eos(hf)
        self._take_stock()

    def _take_stock(self) -> None:
        """What every call needs and no call changes."""
        self._modules = list(self.hf.modules())
        self._linears = onednn_layers(self._modules)
        self._mesh = head_mesh(self.hf, self.projections, self.shape)
        self._accepts = inspect.signature(self.hf.forward).parameters

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.shape}; {self.dtype} on {self.device})"

    @property
    def device(self) -> torch.device:
        return execution_device(self.hf.get_input_embeddings())  # type: ignore[operator]

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.get_input_embeddings().weight.dtype  # type: ignore[operator]

    @property
    def architecture(self) -> str:
        fields = {k: v for k, v in self.hf.config.to_dict().items() if k != "_name_or_path"}  # type: ignore[operator,union-attr]
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]
        over = "" if self._mesh is None else f" over {self._mesh.size()} processes"
        return f"{type(self).__name__} {type(self.hf).__name__} {digest} {self.dtype} {self.device.type}{over}"

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

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        edit: Edit | None = None,
        prefix: KeyValues | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        steer: Steer | None = None,
    ) -> Float[Tensor, "batch vocab"]:
        batch, n_tokens = tokens.shape
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": prefix is not None}
        if prefix is not None:
            given["past_key_values"] = _expanded_cache(prefix, batch)
            # Counted on from the prefix: what a model would guess depends on what it last saw.
            start: Any = len(prefix) + prefix.offset
            given["position_ids"] = torch.arange(start, start + n_tokens, device=self.device).expand(batch, -1)
        for key, value in fit(dict(inputs or {}), n_tokens).items():
            given[key] = value if batch == 1 else value.repeat(batch, *[1] * (value.ndim - 1))
        with self._running(), self._steered(steer, 0, batch, n_tokens):
            return self._call(edit, 0, batch, n_tokens, logits_to_keep=1, **given)[:, -1]

    def pack(
        self,
        segments: Sequence[Segment],
        edit: Edit | None = None,
        keep: bool = False,
        logits: bool = True,
        steer: Steer | None = None,
    ) -> Packed:
        if self.packing_refused:
            raise UnsupportedModelError(f"rows of {self.name} cannot be packed: {self.packing_refused}")
        if segments[0].entry and self.layering_refused:
            raise UnsupportedModelError(f"rows of {self.name} cannot come in layer by layer: {self.layering_refused}")
        layout = Layout(segments, keep, last_layer=self.shape.n_layers - 1)
        n_segments, step = len(segments), max(1, layout.n_tokens)
        # The last token of every row. No index tensor: the last layer may be on another device than the tokens.
        last = slice(layout.first_row + step - 1, None if logits else 0, step)
        n_rows = -1 if layout.entry else n_segments * layout.n_rows
        where = (layout.first_row, n_rows, layout.n_tokens)
        images: dict[str, Any] = dict(segments[0].inputs)
        with (
            self._running(),
            packed_attention(self.config, layout),
            entering(self.blocks, layout),
            self._steered(steer, *where),
        ):
            out = self._call(
                edit,
                *where,
                input_ids=layout.tokens(),
                position_ids=layout.positions(self.device),
                use_cache=False,
                logits_to_keep=last,
                **images,
            )
        rows = out[0].unflatten(0, (n_segments, layout.n_rows if logits else 0))
        return Packed(rows, layout.contexts, layout.rows) if keep else Packed(rows)

    def packs_images(self, prompt: Encoded) -> bool:
        """Where a token counts by its id and its place alone: no token types, one place a token."""
        remembered = any(hasattr(module, "rope_deltas") for module in self._modules)
        return not remembered and not any(name in PER_TOKEN for name in prompt.inputs)

    def project(self, layer: int, z: Float[Tensor, "... heads head_dim"]) -> Float[Tensor, "... heads d_model"]:
        projection, z = self.projections[layer], z.to(self.device, self.dtype)
        if self._mesh is not None or projection.weight.is_meta:
            raise UnsupportedModelError(
                f"W_O of {self.name} is not all in this process: single heads are not projected"
            )
        weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.mT  # [H*D, d_model]
        return torch.einsum("...hd,hdm->...hm", z, weight.unflatten(0, (self.shape.n_heads, -1)))  # type: ignore[operator]

    def prefill(self, prompts: Sequence[Encoded], lengths: Sequence[int]) -> list[KeyValues]:
        if self.packing_refused or any(prompt.inputs for prompt in prompts):
            return [self._prefill_one(prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]
        none = torch.empty(0, 0, dtype=torch.long, device=self.device)
        segments = [Segment(prompt.ids[:n], none) for prompt, n in zip(prompts, lengths, strict=True)]
        return self.pack(segments, keep=True).contexts

    def _prefill_one(self, prompt: Encoded, n_tokens: int) -> KeyValues:
        """By the model's own attention, with its pixels; the positions it gives are read off on the way."""
        from transformers import DynamicCache

        cache = DynamicCache()  # without a config every layer keeps all tokens, sliding windows included
        seen: list[Tensor | None] = []

        def positions(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs.get("position_ids"))

        handle = self.decoder.register_forward_pre_hook(positions, with_kwargs=True)
        try:
            with self._running():
                given = fit(prompt.inputs, n_tokens)
                ids = prompt.ids[None, :n_tokens]
                self._call(
                    None,
                    0,
                    1,
                    n_tokens,
                    input_ids=ids,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                    **given,
                )
        finally:
            handle.remove()
        given_positions = seen[0] if prompt.inputs and seen else None
        offset = 0 if given_positions is None else int(given_positions.max()) + 1 - n_tokens
        keys, values = [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]
        return KeyValues(keys, values, offset)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Within: no dropout, and fast linear layers. After: all as before, positions remembered of images too."""
        remembered = [(module, module.rope_deltas) for module in self._modules if hasattr(module, "rope_deltas")]
        try:
            with undisturbed(self._modules), onednn_linear(self._linears):
                yield
        finally:
            for module, deltas in remembered:
                module.rope_deltas = deltas

    def _call(self, edit: Edit | None, first: int, batch: int, n_tokens: int, **given: Any) -> Tensor:
        """The one place that runs the model: logits [batch, kept, vocab]. `edit` sees tokens from `first` on."""
        given = {key: value for key, value in given.items() if key in self._accepts}
        with self._edited(edit, first, batch, n_tokens):
            return self.hf(**given).logits

    @contextmanager
    def _edited(self, edit: Edit | None, first: int, batch: int, tokens: int) -> Iterator[None]:
        """Within: `edit` sees the input of every output projection, from token `first` of the sequence on."""
        handles = []

        def hook(layer: int, edit: Edit) -> Any:
            return lambda _, args: (self._edit(edit, layer, args[0], first, batch, tokens), *args[1:])

        try:
            if edit is not None:
                for layer, projection in enumerate(self.projections):
                    handles.append(projection.register_forward_pre_hook(hook(layer, edit)))
            if first and self.blocks:  # after the last attention, nothing reads what becomes of a context
                for module in (self.projections[-1], getattr(self.blocks[-1], FEED_FORWARD, None)):
                    handles += rows_only(module, first) if module is not None else []
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _steered(self, steer: Steer | None, first: int, batch: int, tokens: int) -> Iterator[None]:
        """Within: `steer` sees what a block gives, from token `first` of the sequence on."""
        if steer and not self.blocks:
            raise UnsupportedModelError(f"{self.name} cannot be steered: its blocks were not found")

        def hook(change: Any) -> Any:
            def after(_: nn.Module, __: Any, out: Any) -> Any:
                h = out[0] if isinstance(out, tuple) else out  # [batch, tokens, d_model], or a packed sequence
                if not first and len(h) == batch:
                    h = change(h)
                else:
                    rows = change(h[0, first:].unflatten(0, (batch, tokens)))
                    h = torch.cat([h[:, :first], rows.flatten(0, 1)[None]], dim=1)
                return (h, *out[1:]) if isinstance(out, tuple) else h

            return after

        handles = [self.blocks[layer].register_forward_hook(hook(change)) for layer, change in (steer or {}).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _edit(self, edit: Edit, layer: int, x: Tensor, first: int, batch: int, tokens: int) -> Tensor:
        """What a projection is given, edited from token `first` on: x itself, written to, if packed; else a new tensor.

        x: [batch, tokens, H*D], or a packed sequence [1, first + batch*tokens, H*D]; batch -1: as many as there are.
        """
        if not first and len(x) == batch:
            # Others may hold on to x: hooks of the caller, attention until its backward pass.
            z = x.clone().unflatten(-1, (-1, self.shape.head_dim))
            return edit(layer, z).reshape(x.shape)
        # The sequence was made by the attention function for this layer alone. z is a view of it.
        z = x[0, first:].unflatten(0, (batch, tokens)).unflatten(-1, (-1, self.shape.head_dim))
        edited = edit(layer, z)
        if edited is not z:
            z.copy_(edited)
        return x


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


def rows_only(module: nn.Module, first: int) -> list[Any]:
    """Make a module that treats every token alike skip those before `first`, and give zeros for them."""
    skipped = 0

    def skip(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal skipped
        skipped = min(first, args[0].shape[1] - 1) if args else 0  # one token at least: some modules take no fewer
        return (args[0][:, skipped:], *args[1:]) if args else args

    def pad(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, tuple):  # a router's scores beside it
            return (nn.functional.pad(out[0], (0, 0, skipped, 0)), *out[1:])
        return nn.functional.pad(out, (0, 0, skipped, 0))

    return [module.register_forward_pre_hook(skip), module.register_forward_hook(pad)]


def _expanded_cache(prefix: KeyValues, rows: int) -> Any:
    """Transformers' cache of `rows` copies of the prefix; the copies are made layer by layer as rows append."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(k.expand(rows, *k.shape), v.expand(rows, *v.shape), layer)
    return cache
