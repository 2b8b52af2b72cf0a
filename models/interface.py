"""What a backend is: it runs token ids and hands over z; it knows nothing of patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from models.shapes import Float, Int

# edit(layer, z) -> z, with z[batch, tokens, heads, head_dim] the heads' outputs before the output projection.
# It is called once a layer, in order, with the tokens of every row; it returns z, or a new tensor of its shape.
Edit: TypeAlias = Callable[[int, Tensor], Tensor]


class UnsupportedModelError(ValueError):
    """The model is not one that can be patched (exactly, by the strategy asked for); the message says why."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that a patch is checked against."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    vocab_size: int
    max_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.n_layers} layers x {self.n_heads} heads ({self.n_kv_heads} key/value) x {self.head_dim}, "
            f"d_model {self.d_model}, vocabulary {self.vocab_size}, context {self.max_tokens}"
        )


@dataclass(frozen=True)
class Prompt:
    """A prompt as an object. Images belong to image-text models and are refused by text models.

    >>> Prompt("Q: hot\\nA:").text
    'Q: hot\\nA:'
    """

    text: str
    images: tuple[Any, ...] = ()


PromptLike: TypeAlias = "str | Prompt | Sequence[int] | Tensor"


@dataclass
class KeyValues:
    """Keys and values of some tokens, a tensor a layer: [kv_heads, tokens, head_dim] for a prompt,
    [rows, kv_heads, tokens, head_dim] for the rows' own tokens.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return self.keys[0].shape[-2] if self.keys else 0

    def __getitem__(self, tokens: slice) -> KeyValues:
        """A view of some of the tokens; nothing is copied."""
        return KeyValues([k[..., tokens, :] for k in self.keys], [v[..., tokens, :] for v in self.values])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


@dataclass(frozen=True)
class Segment:
    """One prompt in a packed forward: `context` once, then rows that see the context and themselves.

    context: the tokens before the rows: ids to compute in this pass, or the keys and values of an earlier one.
    rows:    ids [rows, tokens], continuing the context. No row sees another.
    past:    the rows' own earlier tokens (while generating), after the context and before `rows`.
    """

    context: Int[Tensor, " context"] | KeyValues
    rows: Int[Tensor, "rows tokens"]
    past: KeyValues | None = None

    @property
    def n_context(self) -> int:
        return len(self.context)

    @property
    def n_computed(self) -> int:
        """Context tokens that this pass computes."""
        return 0 if isinstance(self.context, KeyValues) else len(self.context)

    @property
    def n_past(self) -> int:
        return 0 if self.past is None else len(self.past)


@dataclass
class Packed:
    """What a packed forward returns: last-token logits of every row and, when kept, keys and values a segment."""

    logits: Float[Tensor, "segments rows vocab"]
    contexts: list[KeyValues] = field(default_factory=list)
    rows: list[KeyValues] = field(default_factory=list)


@runtime_checkable
class Model(Protocol):
    """The one interface behind which the backends stand."""

    name: str
    shape: Shape
    tokenizer: Any
    # Why packed rows are not exact on this model; empty if they are.
    packing_refused: str
    # Tokens that end an answer.
    eos: frozenset[int]

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, prompt: PromptLike) -> Int[Tensor, " tokens"]:
        """Token ids of a prompt, checked: not empty, within the vocabulary and the context."""
        ...

    def decode(self, tokens: Int[Tensor, " tokens"]) -> str: ...

    def forward(
        self, tokens: Int[Tensor, "batch tokens"], edit: Edit | None = None, prefix: KeyValues | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """Plain forward of equally long rows, each continuing `prefix` if given: logits of the last token.
        The model's own attention and cache; `edit` sees z [batch, tokens, heads, head_dim].
        """
        ...

    def pack(
        self, segments: Sequence[Segment], edit: Edit | None = None, keep: bool = False, logits: bool = True
    ) -> Packed:
        """All rows of all segments in one sequence. Segments have equally many rows of equal length;
        `edit` sees z [segments * rows, tokens, heads, head_dim], never the contexts'.
        keep: return keys and values; logits: project to the vocabulary (else `logits` has no rows).
        """
        ...

    def prefill(self, prompts: Sequence[Int[Tensor, " _"]]) -> list[KeyValues]:
        """Keys and values of each prompt's tokens, unpatched."""
        ...
