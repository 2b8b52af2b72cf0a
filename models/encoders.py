"""Encoders: BERT and its kin, vision transformers, CLIP's two towers. Tokens see each other: rows are batched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.anatomy import Anatomy, dissect, read_eos
from models.huggingface import HuggingFace
from models.images import open_image
from models.interface import Capabilities, Encoded, Prompt, PromptLike, UnsupportedModelError

REFUSED = "it is an encoder, its tokens see each other"


class Encoder(HuggingFace):
    """A `transformers` encoder with a head, ready to be patched.

    What `patch` returns is the head's answer, [rows, classes]: masked language models at their mask token (without one,
    at the last token), classifiers their logits, CLIP's towers their embedding. Prompts are text or ids for text
    encoders, `Prompt("", (image,))` for vision ones, whose tokens are the class token and the patches.

    Raises UnsupportedModelError for a model that is none of these.
    """

    generates = False

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any = None,
        processor: Any = None,
        name: str | None = None,
        projections: Any = None,
    ):
        config: Any = hf.config
        self.config = config
        self.hf, self.processor, self.tokenizer = hf, processor, tokenizer
        self.name = name or str(config._name_or_path) or type(hf).__name__
        self._names = projections
        self.pixels = getattr(hf, "main_input_name", "input_ids") == "pixel_values"
        self.eos = read_eos(hf)
        self._take_stock()

    @property
    def decoder(self) -> nn.Module:
        return self.hf

    def _dissect(self) -> Anatomy:
        config = self.config
        body = dissect(self.hf, config, self._names, self.hf)
        patches = (config.image_size // config.patch_size) ** 2 if self.pixels else 0
        longest = patches + 1 if self.pixels else config.max_position_embeddings
        return replace(body, shape=replace(body.shape, vocab_size=_answers(self.hf, config), max_tokens=longest))

    def _rule(self, body: Anatomy) -> Capabilities:
        return Capabilities(layered=REFUSED, packed=REFUSED, expanded=REFUSED)

    @property
    def _first(self) -> Tensor:
        return next(iter(self.hf.parameters()))

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    def read(self, prompt: PromptLike) -> Encoded:
        images = prompt.images if isinstance(prompt, Prompt) else ()
        if self.pixels:
            if len(images) != 1 or self.processor is None:
                raise ValueError(
                    f"{self.name} takes one image, Prompt('', (image,)), and its image processor in wrap()"
                )
            pixels = self.processor(images=open_image(images[0], 0), return_tensors="pt")["pixel_values"]
            tokens = torch.arange(self.shape.max_tokens, device=self.device)
            return Encoded(tokens, {"pixel_values": pixels.to(self.device, self.dtype)})
        if images:
            raise ValueError(f"the prompt has {len(images)} image(s), but {self.name} is a text model")
        return self._read_text(prompt, self.config.vocab_size)

    def few_tokens(self, count: int) -> dict[str, Any]:
        if not self.pixels:
            return {"input_ids": torch.arange(count, device=self.device)[None] % self.config.vocab_size}
        size = (1, getattr(self.config, "num_channels", 3), self.config.image_size, self.config.image_size)
        return {"pixel_values": torch.zeros(size, device=self.device, dtype=self.dtype)}

    def _logits(self, given: dict[str, Any]) -> Tensor:
        given = {key: value for key, value in given.items() if key in self._accepts}
        out = self.hf(**given, return_dict=True)
        answer = next(out[key] for key in ("logits", "image_embeds", "text_embeds") if key in out)
        if answer.ndim == 2:
            return answer[:, None]
        mask = getattr(self.tokenizer, "mask_token_id", None)
        masked = [i for i, token in enumerate(given["input_ids"][0].tolist()) if token == mask]
        at = masked[0] if masked else -1
        return answer[:, at, None]


def _answers(hf: nn.Module, config: Any) -> int:
    """Width of the head's answer."""
    if not any(getattr(module, "is_causal", True) is False for module in hf.modules()):
        raise UnsupportedModelError(f"{type(hf).__name__} has no vocabulary projection: expected a language model")
    head = getattr(hf, "get_output_embeddings", lambda: None)()
    if head is not None:
        return head.weight.shape[0]
    kind = type(hf).__name__
    if kind.endswith("Classification"):
        return config.num_labels
    if kind.endswith("WithProjection"):
        return config.projection_dim
    raise UnsupportedModelError(f"{kind} has no head: expected ...ForMaskedLM, ...Classification or ...WithProjection")
