"""What a backend is: it runs token ids and hands over sites of the model; it knows nothing of patches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from models.shapes import Bool, Float, Int, Integer

# A named place in every layer (`models.sites` says where).
Site: TypeAlias = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act", "z", "q", "k", "v", "scores", "pattern"
]
# edit(x) -> x, with x[rows, tokens, units, width] the numbers of all rows at a site of one layer. It may write to x and
# return it, or return a new tensor of its shape: a backend hands over one that may be written to.
Edit: TypeAlias = Callable[[Tensor], Tensor]
# By site and layer; layers that are not there are left alone. Called once a layer and forward.
Edits: TypeAlias = Mapping[Site, Mapping[int, Edit]]


NO_EDITS: Edits = MappingProxyType({})


class UnsupportedModelError(ValueError):
    """The model is not one that can be patched (exactly, by the strategy asked for); the message says why."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that a patch is checked against.

    n_layers counts the layers that have heads: of a hybrid (attention in some layers, a recurrence or convolution in
    the others) those with attention, in order. head_dim is that of the widest layer; where `head_dims` says that others
    are narrower, z of those ends with zeros, and as many numbers at the end of their values are not used.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    vocab_size: int
    max_tokens: int
    head_dims: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What stands in files."""
        return {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(self).items() if x != ()}

    def __str__(self) -> str:
        return (
            f"{self.n_layers} layers x {self.n_heads} heads ({self.n_kv_heads} key/value) x {self.head_dim}, "
            f"d_model {self.d_model}, vocabulary {self.vocab_size}, context {self.max_tokens}"
        )


@dataclass(frozen=True)
class SiteShape:
    """Units of a site in each layer, and numbers of each unit.

    sizes: by layer, where they differ: units that a layer has not cannot be patched, and x ends with zeros.
    width: 0 for "scores" and "pattern": a number for each token of the prompt.
    """

    n_layers: int
    units: int
    width: int
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """Which ways of running rows are exact on a model as it is now; where one is not, why.

    layered:  rows of one sequence that come in at their first patched layer.
    packed:   rows of one sequence.
    expanded: rows that go on from copies of the model's own cache.
    batch:    whole rows beside each other.
    longest:  tokens of the longest prompt of which anything can be shared; `longer` says why no more.
    apart:    sites that packed rows do not have; for each, why.

    >>> models.Capabilities(packed="its layers are convolutions").why_not("layered")
    'its layers are convolutions'
    """

    layered: str = ""
    packed: str = ""
    expanded: str = ""
    batch: str = ""
    longest: int = 2**62
    longer: str = ""
    apart: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, way: str, n_tokens: int = 0, sites: Collection[str] = ()) -> str:
        """Why rows of a prompt of so many tokens, patched at these sites, are not exact this way; empty if they are."""
        if way in ("layered", "packed") and (found := [site for site in sites if site in self.apart]):
            return self.apart[found[0]]
        if way in ("layered", "packed", "expanded") and n_tokens > self.longest:
            return self.longer
        return (self.packed if way == "layered" else "") or getattr(self, way, "")

    def shared(self, n_tokens: int = 0) -> str:
        """Why nothing of such a prompt can be computed once for all rows; empty if it can."""
        return self.why_not("packed", n_tokens) and self.why_not("expanded", n_tokens)

    def without(self, way: str, why: str) -> Capabilities:
        """The same, less one way."""
        return replace(self, **{way: why})  # type: ignore[arg-type]


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


PromptLike: TypeAlias = "str | Prompt | Sequence[Integer] | Tensor | np.ndarray"


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
    """What a packed forward returns: logits of every row's last token, or of its last ones in order (`places`); when
    kept, keys and values a segment.
    """

    logits: Float[Tensor, "segments rows *places vocab"]
    contexts: list[KeyValues] = field(default_factory=list)
    rows: list[KeyValues] = field(default_factory=list)


@runtime_checkable
class Model(Protocol):
    """The one interface behind which the backends stand."""

    name: str
    tokenizer: Any
    # Whether it continues text; encoders do not.
    generates: bool
    # Tokens that end an answer.
    eos: frozenset[int]

    @property
    def shape(self) -> Shape: ...

    def site(self, name: Site) -> SiteShape:
        """The sizes of a site, found by a forward of a few tokens when first asked for.

        Raises UnsupportedModelError, saying why, for a site that the model does not have.
        """
        ...

    def state(self) -> Hashable:
        """Equal as long as nothing changed that results depend on: modules, weights, hooks, attention, dtype."""
        ...

    def rules(self) -> Capabilities:
        """What is exact by all that is known of such a model, before anything is run."""
        ...

    def foreign_hooks(self) -> list[str]:
        """Names of modules with forward hooks that others have put there."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def own_heads(self, x: Tensor, dim: int) -> Tensor:
        """Of a tensor over all heads along `dim`, the part that this process computes and edits of z see.

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

    def then(self, prompt: Encoded, answer: Int[Tensor, " more"]) -> Encoded:
        """A prompt with tokens of its answer after it, which see what they would see as generated ones."""
        ...

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        edits: Edits = NO_EDITS,
        prefix: KeyValues | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        logits: int = 1,
    ) -> Float[Tensor, "batch *places vocab"]:
        """Plain forward of equally long rows, each continuing `prefix` if given: logits of the last token, or of so
        many last ones.

        The model's own attention and cache; edits see x [batch, tokens, units, width].
        inputs: of the whole prompt (pixels), the same for every row.
        """
        ...

    def pack(
        self,
        segments: Sequence[Segment],
        edits: Edits = NO_EDITS,
        keep: bool = False,
        logits: int = 1,
    ) -> Packed:
        """All rows of all segments in one sequence. Segments have equally many rows of equal length; edits see x
        [segments * rows, tokens, units, width], never the contexts'; those of "scores" and "pattern" take one segment.
        A segment with `entry` is alone; edits then see the rows that are in. One with `inputs` is alone, and for models
        that pack images.
        keep: return keys and values; logits: of so many last tokens of every row (0: of no row).
        """
        ...

    def packs_images(self, prompt: Encoded) -> bool:
        """Whether `pack` can compute this prompt's images in the pass of its rows, exactly."""
        ...

    def project(self, layer: int, z: Float[Tensor, "... heads head_dim"]) -> Float[Tensor, "... heads d_model"]:
        """What each head adds to the residual stream: W_O applied to its z alone, without the bias."""
        ...

    def prefill(self, prompts: Sequence[Encoded], lengths: Sequence[int], packed: bool = True) -> list[KeyValues]:
        """Keys and values of the first tokens of each prompt, unpatched; packed: together, if they have no images."""
        ...
