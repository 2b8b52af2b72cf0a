"""Linear task vectors: what demonstrations do to a state is a linear function of it, in closed form (arXiv 2605.20730).

    x_i = h_l at the last token without context, y_i = the same with it                     of N questions
    W   = argmin sum_i |y_i - ym - (x_i - xm) W|^2 + ridge |W|^2                            xm, ym: means
    h_l := ym + (h_l - xm) W at the last prompt token

and a distance that says of any vector what it is worth: how far what the model then says is from what it says after
demonstrations.

The source's own formulas are not followed to the letter: the state is the residual stream after one layer; the ridge is
that of the least leave-one-out error, the layer that of the least distance on questions held out, and the distance the
total variation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.artifacts import load_tensors, save_tensors, versions
from engine.core.patches import Edit, Heads, One, Patch, Values
from engine.core.patching import patch
from engine.core.prefix import Prefix
from engine.core.reading import check_model
from engine.methods.contexts import read_contexts, states
from engine.progress import track
from engine.tasks.scoring import AT_ONCE, ExampleLike
from models import Model, PromptLike
from models.reading import read_int, read_tensor
from models.shapes import Float, Integer

RIDGES = tuple(10.0**n for n in range(-4, 5))  # times the mean squared norm of what is regressed on
HELD_OUT = 50  # questions, at most, that choose the layer


@dataclass(frozen=True)
class LinearVector:
    """What context does to the residual stream after one layer, at the prompt's last token: a linear function of it.

    before, after: means of the states without and with context. down, up: the two factors of W.

    >>> x, y = torch.randn(2, 4, model.shape.d_model)
    >>> vector = engine.linear.LinearVector(9, *engine.linear.regress(x, y, ridge=1.0))
    >>> answer = engine.generate(model, "Q: hot\\nA:", vector.patch, max_new_tokens=2)
    """

    layer: int
    before: Float[Tensor, " d_model"]
    after: Float[Tensor, " d_model"]
    down: Float[Tensor, "d_model rank"]
    up: Float[Tensor, "rank d_model"]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __call__(self, state: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
        """What the state becomes."""
        wide = torch.promote_types(state.dtype, torch.float32)
        before, after, down, up = (
            part.to(state.device, wide) for part in (self.before, self.after, self.down, self.up)
        )
        return (after + (state.to(wide) - before) @ down @ up).to(state.dtype)

    @property
    def patch(self) -> Edit:
        """The patch that does this to a prompt."""
        return Edit("resid_post", [self.layer], lambda _, state: self(state))

    def check(self, model: Model) -> None:
        """Raise ValueError unless the vector was made with this model."""
        check_model(model)
        made = self.metadata.get("model")
        if made != model.name or len(self.before) != model.shape.d_model or self.layer >= model.shape.n_layers:
            raise ValueError(
                f"the vector is of model {made!r}, layer {self.layer}, width {len(self.before)}; it does not fit "
                f"{model.name!r}: {model.shape}"
            )

    def save(self, path: str | Path) -> None:
        """Write tensors and metadata to one file. Raises OSError if the folder cannot be written."""
        tensors = dict(before=self.before, after=self.after, down=self.down, up=self.up)
        save_tensors(path, tensors, {**self.metadata, "layer": self.layer})

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> LinearVector:
        """Read a saved vector; with `model`, also check that it is of that model.

        Raises FileNotFoundError, or ValueError for a file that is broken or holds something else.
        """
        names = ("before", "after", "down", "up")
        tensors, metadata = load_tensors(path, names)
        vector = cls(metadata.pop("layer"), **tensors, metadata=metadata)
        if model is not None:
            vector.check(model)
        return vector


def extract(
    model: Model,
    contexts: Sequence[PromptLike | ExampleLike],
    queries: Sequence[PromptLike | ExampleLike],
    *,
    layer: Integer | None = None,
    ridge: float | None = None,
    progress: bool = True,
) -> LinearVector:
    """The linear function that comes nearest to what context does to the last token's state.

    contexts, queries: the same questions with and without demonstrations; prompts, or (prompt, answer) pairs.
    layer: after which it is applied; default that of the least `distance` on the last third of the questions, 50 at
           most, which it is not fitted on then.
    ridge: penalty, times the mean squared norm of a centred state; default that of the least leave-one-out error among
           1e-4, 1e-3, ..., 1e4.

    Raises ValueError for contexts that are not one for each query, fewer than two (three to choose a layer), a layer
    that is not there, a ridge that is not positive; as `engine.capture` for prompts.

    Source: Distributional Alignment as a Criterion for Designing Task Vectors (arXiv 2605.20730).

    >>> shown = ["Q: up\\nA: down\\n\\nQ: hot\\nA:", "Q: up\\nA: down\\n\\nQ: big\\nA:"]
    >>> vector = engine.linear.extract(model, shown, ["Q: hot\\nA:", "Q: big\\nA:"], layer=9, progress=False)
    >>> engine.patch(model, "Q: old\\nA:", vector.patch).shape == (1, model.shape.vocab_size)
    True
    """
    check_model(model)
    asked = read_contexts(model, queries, None, "queries")
    shown = read_contexts(model, contexts, len(asked))
    n_layers = model.shape.n_layers
    if len(asked) < (least := 3 if layer is None else 2):
        raise ValueError(f"expected at least {least} questions, got {len(asked)}")
    if ridge is not None and (isinstance(ridge, bool) or not isinstance(ridge, Real) or not 0 < ridge < float("inf")):
        raise ValueError(f"ridge must be a positive number, got {ridge!r}")
    layers = list(range(n_layers)) if layer is None else [read_int(layer, "layer", None)]
    if not 0 <= layers[0] < n_layers:
        raise ValueError(f"layer must lie between 0 and {n_layers - 1}, the last of {model.name}, got {layer}")
    x, y = (states(model, some, "resid_post", progress)[:, :, 0] for some in (asked, shown))
    held_out = 0 if layer is not None else min(HELD_OUT, len(asked) // 3)
    fitted = len(asked) - held_out
    found = [LinearVector(at, *regress(x[:fitted, at], y[:fitted, at], ridge)) for at in layers]
    distances = []
    if held_out:
        distances = _by_layer(model, found, x[fitted:], asked[fitted:], shown[fitted:], progress).mean(dim=0).tolist()
    best = found[min(range(len(distances)), key=distances.__getitem__)] if distances else found[0]
    best.metadata.update(
        method="linear", model=model.name, shape=model.shape.as_dict(), questions=fitted, distances=distances,
        versions=versions(),
    )  # fmt: skip
    return best


def regress(
    x: Float[Tensor, "questions width"] | np.ndarray,
    y: Float[Tensor, "questions width"] | np.ndarray,
    ridge: float | None = None,
) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"], Float[Tensor, "width rank"], Float[Tensor, "rank width"]]:
    """Ridge regression of y on x: both means, and the two factors of W; in float64, returned in float32.

    W = V S / (S^2 + ridge) U' Y of the centred X = U S V'; of as low a rank as there are questions.
    ridge: as for `extract`, default by the leave-one-out errors, of which all are had from one decomposition:
    y_i - f_without_i(x_i) = (y_i - f(x_i)) / (1 - hat_ii), with the mean fitted, too.

    Raises ValueError for numbers that are not finite, or of different shapes.

    >>> x = torch.eye(3)
    >>> before, after, down, up = engine.linear.regress(x, 2 * x, ridge=1e-9)
    >>> ((x - before) @ down @ up + after).round(decimals=4)
    tensor([[2., 0., 0.],
            [0., 2., 0.],
            [0., 0., 2.]])
    """
    x, y = (torch.as_tensor(read_tensor(one, what)) for one, what in ((x, "x"), (y, "y")))
    if x.ndim != 2 or x.shape != y.shape or not x.numel() or not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"x and y must be finite numbers [questions, width], got {list(x.shape)} and {list(y.shape)}")
    x, y = x.double(), y.double()
    before, after = x.mean(dim=0), y.mean(dim=0)
    x, y = x - before, y - after
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    unit = s.square().sum().item() / len(x) or 1.0  # states that are all alike have no norm
    turned = u.T @ y

    def error(one: float) -> float:
        shrunk = s.square() / (s.square() + one * unit)
        hat = u.square() @ shrunk + 1 / len(x)
        left = y - u @ (shrunk[:, None] * turned)
        return (left / (1 - hat).clamp_min(1e-9)[:, None]).square().sum().item()

    chosen = min(RIDGES, key=error) if ridge is None else ridge
    up = (s / (s.square() + chosen * unit))[:, None] * turned
    return before.float(), after.float(), v.T.float().contiguous(), up.float()


@torch.no_grad()
def distance(
    model: Model,
    queries: Sequence[PromptLike | ExampleLike],
    contexts: Sequence[PromptLike | ExampleLike],
    patches: One | Sequence[One] | None = None,
    *,
    heads: Heads = None,
    values: Values = None,
) -> Float[Tensor, "questions rows"]:
    """How far what is said next under patches is from what is said after demonstrations: the total variation, 0 to 1.

    queries, contexts: the same questions without and with demonstrations; the queries are patched.
    patches, heads, values: as for `engine.patch`; without any, the distance of zero-shot from few-shot.

    Raises ValueError for contexts that are not one for each query; else as `engine.patch`.

    Source: Distributional Alignment as a Criterion for Designing Task Vectors (arXiv 2605.20730), its d_NTP.

    >>> engine.linear.distance(model, ["Q: hot\\nA:"], ["Q: up\\nA: down\\n\\nQ: hot\\nA:"]).shape
    torch.Size([1, 1])
    """
    check_model(model)
    asked = read_contexts(model, queries, None, "queries")
    shown = read_contexts(model, contexts, len(asked))
    return _distances(model, asked, shown, patches=patches, heads=heads, values=values)


def _by_layer(
    model: Model,
    vectors: Sequence[LinearVector],
    known: Float[Tensor, "questions layers d_model"],
    asked: Sequence[Prefix],
    shown: Sequence[Prefix],
    progress: bool,
) -> Float[Tensor, "questions layers"]:
    """Distances with each vector at its layer: what it makes of states that are known is put there, a row a layer."""
    each = torch.eye(model.shape.n_layers, dtype=torch.bool)
    becomes = torch.stack([vector(known[:, vector.layer]) for vector in vectors], dim=1)  # [N, L, d]
    found = [
        _distances(model, [one], [other], patches=Patch("resid_post", each, state[:, None]))
        for one, other, state in track(list(zip(asked, shown, becomes, strict=True)), "distances by layer", progress)
    ]
    return torch.cat(found)


@torch.no_grad()
def _distances(
    model: Model, asked: Sequence[Prefix], shown: Sequence[Prefix], **patched: Any
) -> Float[Tensor, "questions rows"]:
    found = []
    for start in range(0, len(asked), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        said = patch(model, list(asked[some]), **patched).float().softmax(dim=-1)
        wanted = patch(model, list(shown[some])).float().softmax(dim=-1)
        apart = (said - wanted).abs().sum(dim=-1).cpu() / 2
        for prompt, finite in zip(asked[some], apart.isfinite().all(dim=1).tolist(), strict=True):
            if not finite:
                said_of = model.decode(prompt.tokens)
                raise ValueError(f"{model.name} gives NaN logits on {said_of!r:.60}, or on it after demonstrations")
        found.append(apart)
    return torch.cat(found)
