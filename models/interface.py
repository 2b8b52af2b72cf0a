"""What a backend is: it runs token ids and hands over z; it knows nothing of patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from models.shapes import Bool, Float, Int

# edit(layer, z) -> z, with z[batch, tokens, heads, head_dim] the heads' outputs before the output projection.
# It is called once a layer, in order, with the tokens of every row. It may write to z and return it, or return a new
# tensor of its shape: a backend hands over a z that may be written to, and uses what is returned.
Edit: TypeAlias = Callable[[int, Tensor], Tensor]
# By layer, what becomes of the residual stream [batch, tokens, d_model] after it.
Steer: TypeAlias = Mapping[int, Callable[[Tensor], Tensor]]


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


IMAGE = "<image>"


@dataclass(frozen=True)
class Prompt:
    """Text with images in it, for image-text models: each `<image>` (or the model's own marker) stands for one image.

    images: PIL images, or paths of image files, in the order of their markers.

    >>> Prompt("Q: <image> Which colour?\\nA: red\\n\\nQ: <image> Which colour?\\nA:", ("a.png", "b.png")).images
    ('a.png', 'b.png')
    """

    text: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """A prompt as a model takes it.

    ids:          its tokens.
    inputs:       what else the model's processor made of it (pixels, token types), by the names of the model's forward.
    image_tokens: which tokens stand for pixels; None without images.
    """

    ids: Int[Tensor, " tokens"]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    image_tokens: Bool[Tensor, " tokens"] | None = None

    def then(self, ids: Int[Tensor, " more"]) -> Encoded:
        """The prompt with text tokens after it."""
        images = self.image_tokens
        if images is not None:
            images = torch.cat([images, images.new_zeros(len(ids))])
        return Encoded(torch.cat([self.ids, ids]), self.inputs, images)

    @property
    def free_from(self) -> int:
        """The first token after the last image: rows that begin here see all pixels through keys and values."""
        if self.image_tokens is None:
            return 0
        return int(self.image_tokens.nonzero().max()) + 1


PromptLike: TypeAlias = "str | Prompt | Sequence[int] | Tensor"


@dataclass
class KeyValues:
    """Keys and values of some tokens, a tensor a layer: [kv_heads, tokens, head_dim] for a prompt,
    [rows, kv_heads, tokens, head_dim] for the rows' own tokens.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    # Position of the token that follows, less the number of tokens: images may take up fewer positions than tokens.
    offset: int | Int[Tensor, ""] = 0

    def __len__(self) -> int:
        return self.keys[0].shape[-2] if self.keys else 0

    def __getitem__(self, tokens: slice) -> KeyValues:
        """A view of some of the tokens; nothing is copied."""
        keys, values = [k[..., tokens, :] for k in self.keys], [v[..., tokens, :] for v in self.values]
        return KeyValues(keys, values, self.offset)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


@dataclass(frozen=True)
class Segment:
    """One prompt in a packed forward: `context` once, then rows that see the context and themselves.

    context: the tokens before the rows: ids to compute in this pass, or the keys and values of an earlier one.
    rows:    ids [rows, tokens], continuing the context. No row sees another.
    past:    the rows' own earlier tokens (while generating), after the context and before `rows`.
    length:  how many tokens of the context count, where it is a buffer filled in part; on the device, as it may change
             between replays of one CUDA graph.
    entry:   the layers at which the rows come in, ascending, the first at 0; () for all at 0. A later one comes in as a
             copy of the first as it stands before that layer: what nobody changes before need not be computed twice.
             All rows have the same ids.
    inputs:  what belongs to the images of a context computed in this pass, of `Encoded.inputs`.
    """

    context: Int[Tensor, " context"] | KeyValues
    rows: Int[Tensor, "rows tokens"]
    past: KeyValues | None = None
    length: Int[Tensor, ""] | None = None
    entry: tuple[int, ...] = ()
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

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

    @property
    def position(self) -> int | Int[Tensor, ""]:
        """Of the first token of every row."""
        offset = self.context.offset if isinstance(self.context, KeyValues) else 0
        return (self.n_context if self.length is None else self.length) + self.n_past + offset


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
    # Why packed rows cannot come in at later layers; empty if they can.
    layering_refused: str
    # Why no prefix can be shared at all; empty if it can.
    sharing_refused: str
    # Whether it continues text; encoders do not.
    generates: bool
    # Tokens that end an answer.
    eos: frozenset[int]

    @property
    def architecture(self) -> str:
        """Equal for models on which the same strategies are exact."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def own_heads(self, x: Tensor, dim: int) -> Tensor:
        """Of a tensor over all heads along `dim`, the part that this process computes and `edit` sees.

        All of it, unless heads are shared out over processes. Its gradient is of all heads, on every process.
        """
        ...

    def all_heads(self, x: Tensor, dim: int) -> Tensor:
        """The inverse: the parts of all processes, on each of them."""
        ...

    def read(self, prompt: PromptLike) -> Encoded:
        """A prompt encoded and checked: not empty, within the vocabulary and the context, an image for each marker."""
        ...

    def encode(self, prompt: PromptLike) -> Int[Tensor, " tokens"]:
        """The token ids of `read`."""
        ...

    def decode(self, tokens: Int[Tensor, " tokens"]) -> str: ...

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        edit: Edit | None = None,
        prefix: KeyValues | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        steer: Steer | None = None,
    ) -> Float[Tensor, "batch vocab"]:
        """Plain forward of equally long rows, each continuing `prefix` if given: logits of the last token.

        The model's own attention and cache; `edit` sees z [batch, tokens, heads, head_dim].
        inputs: of the whole prompt (pixels), the same for every row.
        """
        ...

    def pack(
        self,
        segments: Sequence[Segment],
        edit: Edit | None = None,
        keep: bool = False,
        logits: bool = True,
        steer: Steer | None = None,
    ) -> Packed:
        """All rows of all segments in one sequence. Segments have equally many rows of equal length;
        `edit` sees z [segments * rows, tokens, heads, head_dim], never the contexts'. A segment with `entry` is alone;
        `edit` then sees the rows that are in. One with `inputs` is alone, and for models that pack images.
        keep: return keys and values; logits: project to the vocabulary (else `logits` has no rows).
        """
        ...

    def packs_images(self, prompt: Encoded) -> bool:
        """Whether `pack` can compute this prompt's images in the pass of its rows, exactly."""
        ...

    def project(self, layer: int, z: Float[Tensor, "... heads head_dim"]) -> Float[Tensor, "... heads d_model"]:
        """What each head adds to the residual stream: W_O applied to its z alone, without the bias."""
        ...

    def prefill(self, prompts: Sequence[Encoded], lengths: Sequence[int]) -> list[KeyValues]:
        """Keys and values of the first tokens of each prompt, unpatched."""
        ...
