"""`load` a model by name, `wrap` one in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import zoo
from models.huggingface import HuggingFace
from models.interface import Model, UnsupportedModelError


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Model:
    """Open a model, ready to be patched.

    name:   "smollm2-135m" (installs as a package), a local folder, or a hub id.
    dtype:  of the weights; default float32.
    device: where they go; default "cpu".

    Raises FileNotFoundError if there is no such model, or it cannot be fetched; UnsupportedModelError if its layout
    is unknown.

    >>> models.load("smollm2-135m").shape.n_layers
    30
    """
    processor = None
    if str(name) == zoo.SMOLLM2:
        hf, tokenizer = zoo.smollm2(dtype)
    else:
        hf, tokenizer, processor = _from_folder_or_hub(name, dtype)
    return wrap(hf.to(device), tokenizer, processor=processor, name=str(name))


def wrap(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    processor: Any = None,
    name: str | None = None,
    projections: Sequence[str] | None = None,
) -> Model:
    """Take a `transformers` language or image-text model that is already in memory; nothing is copied or changed.

    tokenizer:   needed for string prompts and text answers; token ids work without.
    processor:   of an image-text model, for prompts with images; brings its tokenizer.
    name:        how saved vectors and messages call it.
    projections: for an architecture unknown here: dotted names of the attention output projections, a layer each,
                 as in ["model.layers.0.attention.wo", ...].

    Raises TypeError for anything but a transformers model, UnsupportedModelError for one of unknown layout.

    >>> models.wrap(model.hf, tokenizer=model.tokenizer).shape == model.shape
    True
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no vocabulary projection: expected a language model")
    return HuggingFace(model, tokenizer, processor, name, projections)


def _from_folder_or_hub(name: str | Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    try:
        if type(AutoConfig.from_pretrained(name)) in AutoModelForImageTextToText._model_mapping:
            hf = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
            return hf, None, AutoProcessor.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name), None
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"cannot open the model {str(name)!r}: expected {zoo.SMOLLM2!r}, a folder with a transformers model, "
            f"or the id of one on a hub that can be reached ({str(error).splitlines()[0]})"
        ) from error
