"""What the machine cannot go below: multiplications over its matrix rate, or bytes over its bandwidth.

    prefill of n tokens          (1 - 1/L) (2 n P + 4 L H D n (n + 1) / 2)             multiplications and additions
    row step of R rows           d (2 R P + 4 L H D R T) + 2 R V;    bytes of P + V and of the prefix's keys and values

P: weights of the blocks' linear layers; V: of the vocabulary projection; d: share of the blocks that rows go through
from the first that patches them on. A row is one token (the last) that follows T - 1 shared ones, of which the last
block is not needed but for its keys and values. Those, activations, norms and writing are left out: the floor lies
below what can be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.shapes import decoder_linears


@dataclass(frozen=True)
class Rates:
    """Of one device in one dtype: multiplications and additions a second, bytes a second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """Of one pass."""

    flops: float
    bytes: float = 0

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bandwidth)

    def together(self, other: Work) -> Work:
        """One pass that does both reads the weights once: the larger traffic stands for both."""
        return Work(self.flops + other.flops, max(self.bytes, other.bytes))


@dataclass(frozen=True)
class Sizes:
    """Of a model, as far as its limits depend on them.

    blocks, vocabulary: weights of the blocks' linear layers, of the vocabulary projection.
    layers:             number of blocks.
    q_width, kv_width:  heads x head_dim, key/value heads x head_dim.
    mlp_width, itemsize: of the widest activation; bytes of a number.
    """

    blocks: int
    vocabulary: int
    layers: int
    heads: int
    q_width: int
    kv_width: int
    mlp_width: int
    vocab_size: int
    itemsize: int

    @classmethod
    def of(cls, hf: Any) -> Sizes:
        config = hf.config
        return cls(
            blocks=sum(layer.weight.numel() for layer in decoder_linears(hf)),
            vocabulary=hf.lm_head.weight.numel(),
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            q_width=config.num_attention_heads * config.head_dim,
            kv_width=config.num_key_value_heads * config.head_dim,
            mlp_width=config.intermediate_size,
            vocab_size=config.vocab_size,
            itemsize=hf.lm_head.weight.element_size(),
        )

    def prefill(self, tokens: int) -> Work:
        """Of `tokens` tokens, no logits."""
        seen = tokens * (tokens + 1) / 2
        flops = 2 * tokens * self.blocks + 4 * self.layers * self.q_width * seen
        return Work(flops * (self.layers - 1) / self.layers)

    def row_step(self, rows: int, tokens: int, depth: float = 1.0) -> Work:
        """Rows of one token each, the last of `tokens`; logits included. depth: share of the blocks they go through."""
        blocks = 2 * rows * self.blocks + 4 * self.layers * self.q_width * rows * tokens
        read = self.blocks + self.vocabulary + 2 * self.layers * self.kv_width * (tokens - 1)
        return Work(depth * blocks + 2 * rows * self.vocabulary, self.itemsize * read)

    def fresh(self, rows: int, tokens: int, depth: float = 1.0) -> Work:
        """Prefix and rows in one pass."""
        return self.prefill(tokens - 1).together(self.row_step(rows, tokens, depth))


def floor(passes: Sequence[Work], rates: Rates) -> float:
    """Seconds of passes that follow one another."""
    return sum(work.seconds(rates) for work in passes)
