"""The plain Hugging Face backend: a transformers model in memory, untouched but for hooks that last one call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.interface import (
    Edit,
    KeyValues,
    Packed,
    Prompt,
    PromptLike,
    Segment,
    Shape,
    UnsupportedModelError,
)
from models.linear import onednn_layers, onednn_linear
from models.packed import Layout, packed_attention
from models.shapes import Float, Int

# A decoder block's attention, and in it the output projection W_O, whose input is z.
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense")


class HuggingFace:
    """A `transformers` causal language model and its tokenizer, ready to be patched.

    hf:        the model, in memory; its device and dtype are kept.
    tokenizer: needed for string prompts only; token ids work without.
    name:      stands in saved vectors and messages; default the config's `_name_or_path` or the class name.

    Raises UnsupportedModelError if no output projections are found.
    """

    def __init__(self, hf: nn.Module, tokenizer: Any = None, name: str | None = None):
        self.hf = hf
        self.tokenizer = tokenizer
        self.config = hf.config.get_text_config()  # type: ignore[operator, union-attr]
        self.name = name or self.config._name_or_path or type(hf).__name__
        self.projections = find_projections(hf, self.config.num_hidden_layers)
        self.shape = read_shape(self.config, self.projections[0])
        self.packing_refused = why_not_packed(hf, self.config)
        self.eos = read_eos(hf)
        self._modules = list(hf.modules())
        self._linears = onednn_layers(self._modules)
        self._keeps_logits = "logits_to_keep" in inspect.signature(hf.forward).parameters

    def __repr__(self) -> str:
        return f"HuggingFace({self.name!r}: {self.shape}; {self.dtype} on {self.device})"

    @property
    def device(self) -> torch.device:
        return self.hf.get_input_embeddings().weight.device  # type: ignore[operator]

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.get_input_embeddings().weight.dtype  # type: ignore[operator]

    def encode(self, prompt: PromptLike) -> Int[Tensor, " tokens"]:
        if isinstance(prompt, Prompt):
            if prompt.images:
                raise ValueError(f"the prompt has {len(prompt.images)} image(s), but {self.name} is a text model")
            prompt = prompt.text
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{self.name} was wrapped without a tokenizer: give token ids, or wrap(..., tokenizer=)"
                )
            ids = torch.tensor(self.tokenizer(prompt)["input_ids"], dtype=torch.long)
        else:
            try:
                ids = torch.as_tensor(prompt)
            except (RuntimeError, TypeError, ValueError) as error:
                raise TypeError(f"a prompt must be text, a Prompt or token ids, got {prompt!r:.80}") from error
            if ids.ndim != 1 or (
                ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
            ):
                raise ValueError(
                    f"token ids must be one-dimensional integers, got {ids.dtype} of shape {tuple(ids.shape)}"
                )
            ids = ids.long()
        if not ids.numel():
            raise ValueError(f"the prompt is empty: {prompt!r} has no tokens")
        if ids.numel() > self.shape.max_tokens:
            raise ValueError(f"the prompt has {ids.numel()} tokens, {self.name} takes at most {self.shape.max_tokens}")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.shape.vocab_size:
            raise ValueError(
                f"token ids must lie in [0, {self.shape.vocab_size}), got {int(ids.min())} to {int(ids.max())}"
            )
        return ids.to(self.device)

    def decode(self, tokens: Int[Tensor, " tokens"]) -> str:
        if self.tokenizer is None:
            raise ValueError(f"{self.name} was wrapped without a tokenizer: text needs wrap(..., tokenizer=)")
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def forward(
        self, tokens: Int[Tensor, "batch tokens"], edit: Edit | None = None, prefix: KeyValues | None = None
    ) -> Float[Tensor, "batch vocab"]:
        cache = None if prefix is None else _expanded_cache(prefix, len(tokens))
        with self._running(), self._edited(edit, 0, tokens.shape[0], tokens.shape[1]):
            keep = {"logits_to_keep": 1} if self._keeps_logits else {}
            out = self.hf(input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **keep)
        return out.logits[:, -1]

    def pack(
        self, segments: Sequence[Segment], edit: Edit | None = None, keep: bool = False, logits: bool = True
    ) -> Packed:
        if self.packing_refused:
            raise UnsupportedModelError(f"rows of {self.name} cannot be packed: {self.packing_refused}")
        layout = Layout(segments, keep)
        read = layout.last_tokens(self.device)[: None if logits else 0]
        batch = len(segments) * layout.n_rows
        with (
            self._running(),
            packed_attention(self.config, layout),
            self._edited(edit, layout.first_row, batch, layout.n_tokens),
        ):
            out = self.hf(
                input_ids=layout.tokens(),
                position_ids=layout.positions(self.device),
                use_cache=False,
                logits_to_keep=read,
            )
        rows = out.logits[0].unflatten(0, (len(segments), layout.n_rows if logits else 0))
        return Packed(rows, layout.contexts, layout.rows) if keep else Packed(rows)

    def prefill(self, prompts: Sequence[Int[Tensor, " _"]]) -> list[KeyValues]:
        if not self.packing_refused:
            none = torch.empty(0, 0, dtype=torch.long, device=self.device)
            return self.pack([Segment(ids, none) for ids in prompts], keep=True).contexts
        return [self._prefill_one(ids) for ids in prompts]

    def _prefill_one(self, ids: Int[Tensor, " tokens"]) -> KeyValues:
        from transformers import DynamicCache

        cache = DynamicCache()  # without a config every layer keeps all tokens, sliding windows included
        with self._running():
            keep = {"logits_to_keep": 1} if self._keeps_logits else {}
            self.hf(input_ids=ids[None], past_key_values=cache, use_cache=True, **keep)
        layers = cache.layers
        return KeyValues([layer.keys[0] for layer in layers], [layer.values[0] for layer in layers])

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Within: no dropout, and fast linear layers. After: all as before."""
        with undisturbed(self._modules), onednn_linear(self._linears):
            yield

    @contextmanager
    def _edited(self, edit: Edit | None, first: int, batch: int, tokens: int) -> Iterator[None]:
        """Within: `edit` sees the input of every output projection, from token `first` of the sequence on."""
        handles = []
        n_heads = self.shape.n_heads

        def hook(layer: int) -> Any:
            def pre(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
                rows = args[0][
                    :, first:
                ]  # [batch, tokens, H*D], or the rows of a packed sequence [1, batch*tokens, H*D]
                z = rows.unflatten(2, (n_heads, -1)).reshape(batch, tokens, n_heads, -1)
                edited = edit(layer, z)  # type: ignore[misc]
                if edited is z:
                    return args
                if not first:
                    return (edited.reshape(args[0].shape),)
                # The sequence was made by the attention function for this layer alone: writing saves a copy of it.
                rows.copy_(edited.reshape(rows.shape))
                return args

            return pre

        try:
            if edit is not None:
                for layer, projection in enumerate(self.projections):
                    handles.append(projection.register_forward_pre_hook(hook(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()


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


def find_projections(hf: nn.Module, n_layers: int) -> list[nn.Module]:
    """The attention output projection W_O of each decoder layer, in order."""
    decoder = hf.get_decoder() if hasattr(hf, "get_decoder") else hf  # type: ignore[operator]
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    for stack in stacks:
        found = []
        for block in stack:
            attention = next((getattr(block, name) for name in ATTENTIONS if hasattr(block, name)), None)
            found += [getattr(attention, name) for name in PROJECTIONS if hasattr(attention, name)][:1]
        if len(found) == n_layers:
            return found
    raise UnsupportedModelError(
        f"no attention output projections found in {type(hf).__name__}: looked in its decoder for a list of {n_layers} "
        f"blocks, each with one of {ATTENTIONS} that has one of {PROJECTIONS}"
    )


def read_shape(config: Any, projection: nn.Module) -> Shape:
    n_heads = config.num_attention_heads
    weight: Tensor = projection.weight  # type: ignore[assignment]
    # transformers' Conv1D stores [in, out], Linear [out, in]; the input is heads * head_dim wide.
    width = weight.shape[0] if type(projection).__name__ == "Conv1D" else weight.shape[1]
    return Shape(
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim=width // n_heads,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings,
    )


def read_eos(hf: nn.Module) -> frozenset[int]:
    """End-of-answer tokens, from the generation config: one id, several, or none."""
    config = getattr(hf, "generation_config", None) or hf.config
    eos = getattr(config, "eos_token_id", None)
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])


def why_not_packed(hf: nn.Module, config: Any) -> str:
    """Why packed rows would not be exact; empty if they are. Refuses what it does not know to be right."""
    if not getattr(hf, "_supports_attention_backend", False):
        return f"{type(hf).__name__} does not go through transformers' attention interface"
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}, which packed rows do not follow"
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return "its rotary positions have several axes"
    return ""


def _expanded_cache(prefix: KeyValues, rows: int) -> Any:
    """Transformers' cache of `rows` copies of the prefix; the copies are made layer by layer as rows append."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(k.expand(rows, *k.shape), v.expand(rows, *v.shape), layer)
    return cache
