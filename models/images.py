"""Prompts with images: markers counted, files opened, the model's own processor applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from models.interface import IMAGE, Encoded, Prompt
from models.reading import check_begin, check_text

# Of what a processor returns: not a forward's business, or all ones for a single prompt.
UNUSED = ("input_ids", "attention_mask", "labels")
# One entry a token (in dimension 1): cropped with the prompt, continued as its last token.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")


def read_images(prompt: Prompt, processor: Any, image_token: int, name: str) -> Encoded:
    """A prompt with its images through the processor of the model.

    Raises ValueError for more or fewer markers than images, or an image that cannot be read.
    """
    marker = image_marker(processor)
    text = prompt.text if marker in prompt.text else prompt.text.replace(IMAGE, marker)
    if text.count(marker) != len(prompt.images):
        raise ValueError(
            f"the prompt has {text.count(marker)} image marker(s) ({IMAGE} or {marker}) "
            f"and {len(prompt.images)} image(s): expected one image for each marker"
        )
    check_text(text)
    images = [open_image(image, index) for index, image in enumerate(prompt.images)]
    out = processor(text=text, images=[images] if _nested(processor) else images, return_tensors="pt")
    ids = torch.as_tensor(out["input_ids"])[0]
    check_begin(text, ids, processor.tokenizer)
    inputs = {key: value for key, value in out.items() if key not in UNUSED and isinstance(value, Tensor)}
    image_tokens = ids == image_token
    if not image_tokens.any():
        raise ValueError(f"the processor of {name} made no image tokens (id {image_token}) of {marker}")
    return Encoded(ids, inputs, image_tokens)


def image_marker(processor: Any) -> str:
    """What a prompt says in the place of an image, for the model of this processor."""
    marker = getattr(processor, "boi_token", None) or processor.image_token  # Gemma3 expands its begin-of-image token
    marker = getattr(marker, "content", marker)
    start, end = "<|vision_start|>", "<|vision_end|>"  # the Qwen family looks for images behind this token
    vocabulary = processor.tokenizer.get_added_vocab()
    return f"{start}{marker}{end}" if start in vocabulary and end in vocabulary else marker


def fit(inputs: dict[str, Tensor], n_tokens: int) -> dict[str, Tensor]:
    """Inputs of the first `n_tokens` tokens, or of a prompt that goes on as text after its end."""
    fitted = {}
    for name, value in inputs.items():
        if name in PER_TOKEN and value.shape[1] != n_tokens:
            more = value[:, -1:].expand(-1, max(0, n_tokens - value.shape[1]), *value.shape[2:])
            value = torch.cat([value, more], dim=1)[:, :n_tokens]
        fitted[name] = value
    return fitted


def _nested(processor: Any) -> bool:
    """Idefics and its kin, and Mllama, take a list of images a prompt."""
    return type(processor).__name__.startswith(("Idefics", "SmolVLM", "Mllama", "Gemma3"))


def open_image(image: Any, index: int) -> Image.Image:
    """An image, or the file of one, in RGB. Raises ValueError if it cannot be read."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(Path(image)) as opened:
            return opened.convert("RGB")
    except (OSError, TypeError, UnidentifiedImageError) as error:
        named = str(image) if isinstance(image, str | Path) else f"{image!r:.80}"
        raise ValueError(f"image {index} cannot be read: {named} ({error})") from error
