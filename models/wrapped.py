"""A model in memory, wrapped: its parts and its state as they are now, and what it reads."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.anatomy import Anatomy, dissect, parts, read_eos
from models.calls import foreign_hooks_of
from models.images import fit, image_marker, read_images
from models.interface import (
    IMAGE,
    Capabilities,
    Encoded,
    Prompt,
    PromptLike,
    Shape,
    Site,
    UnsupportedModelError,
)
from models.linear import onednn_layers
from models.packed import implementation
from models.reading import check_ids, read_ids
from models.rules import NOT_CAUSAL, rules
from models.shapes import Int
from models.sharding import execution_device, gather, head_mesh, own
from models.sites import SITES, Place


class Wrapped:
    """What `HuggingFace` knows of its model, before anything is run."""

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
        z = [(self._body.shape.n_heads, width) for width in self._head_dims(self._body)]
        self._places: dict[Site, Place | str] = {"z": Place(SITES["z"], self._body.projections, z)}

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
        again = ("_body", "_linears", "_compiled", "_mesh", "_accepts", "_ruled", "_places")
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

    def _head_dims(self, body: Anatomy) -> Sequence[int]:
        return body.shape.head_dims or [body.shape.head_dim] * body.shape.n_layers


def _embeddings(hf: nn.Module) -> Any:
    try:
        return hf.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
