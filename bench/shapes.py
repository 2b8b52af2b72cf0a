"""Models of real shapes with random weights, made directly in the dtype and on the device: no weight changes speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Widths of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B; all three are Llamas.
SHAPES: dict[str, dict[str, Any]] = {
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, head_dim=64, vocab_size=49152, tie_word_embeddings=True),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False),
    "tiny": dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                 num_key_value_heads=2, head_dim=8, vocab_size=97, tie_word_embeddings=False),
}  # fmt: skip


class Numbers:
    """A tokenizer whose text is the ids themselves: answers of random weights are no language."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


def weights_bytes(name: str, dtype: torch.dtype) -> int:
    """Of all weights; nothing is allocated.

    >>> weights_bytes("135m", torch.float32)
    538060032
    """
    return sum(p.numel() for p in _empty(name).parameters()) * dtype.itemsize


def make(name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """A transformers Llama of that shape; the same weights at every call on one device. It never ends an answer.

    Raises ValueError for a name that is not in SHAPES.
    """
    hf = _empty(name).to(dtype).to_empty(device=device)
    hf.tie_weights()
    hf.model.rotary_emb = type(hf.model.rotary_emb)(hf.config).to(device)
    random = torch.Generator(device).manual_seed(0)
    for weight in hf.requires_grad_(False).parameters():
        if weight.ndim == 1:  # of a norm
            weight.fill_(1)
        else:  # drawn in float32, which is faster, and the same in every dtype up to rounding
            weight.copy_(torch.empty(weight.shape, device=device).normal_(0, 0.02, generator=random))
    return hf.eval()


def _empty(name: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if name not in SHAPES:
        raise ValueError(f"shape must be one of {list(SHAPES)}, got {name!r}")
    config = LlamaConfig(
        **SHAPES[name], max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def decoder_linears(hf: Any) -> list[nn.Linear]:
    """The linear layers of all blocks: every token goes through each of them."""
    return [module for module in hf.model.layers.modules() if type(module) is nn.Linear]
