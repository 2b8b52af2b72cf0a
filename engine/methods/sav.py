"""Sparse Attention Vectors: a few heads of a frozen model as a classifier (arXiv 2412.00142).

    mean[c, l, h] = mean of z[l, h] at the last token, over the training prompts of class c
    vote[l, h](x) = the class c whose mean[c, l, h] is nearest to x's z[l, h], by cosine
    heads         = the k whose votes are right most often on the training prompts themselves
    answer        = the class that most of these heads vote for

Nothing is patched and nothing is trained: one forward a prompt.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from engine.artifacts import load_tensors, save_tensors
from engine.core.activations import capture
from engine.core.reading import check_model
from models import Model, PromptLike
from models.reading import as_int, read_tensor
from models.shapes import Float, Int, Integer

if TYPE_CHECKING:
    from numpy.typing import NDArray

AT_ONCE = 256  # prompts whose heads are held at once, when only a few of them are needed

# Prompts, or what `engine.capture` made of them.
Prompts: TypeAlias = "Sequence[PromptLike] | Float[Tensor, 'prompts layers heads head_dim']"


class SparseAttentionVectors:
    """A classifier with the methods of scikit-learn's; prompts are text, token ids or `models.Prompt` with images.

    heads: how many heads vote; the paper keeps 20, found on 20 examples a class.

    In place of prompts, all methods also take their z, Float[N, L, H, D] of `engine.capture`: to try several settings
    or splits, capture once. After `fit`:

    classes_:    the labels, sorted; strings or integers.
    heads_:      the (layer, head) that vote, best first; of equally good ones, those of the first layers.
    accuracies_: Float[L, H], share of the training prompts on which each head is right.
    means_:      Float[C, k, D], class means of the heads that vote.

    A head whose cosines tie votes for the first class. Classes with equally many votes: the one that the best head
    among their voters is for.

    >>> prompts = ["Q: hot\\nA: cold", "Q: big\\nA: small", "Q: hot\\nA: tree"]
    >>> classifier = engine.sav.SparseAttentionVectors(model, heads=5).fit(prompts, ["opposite", "opposite", "other"])
    >>> classifier.predict(["Q: hot\\nA: cold"])
    array(['opposite'], dtype='<U8')
    """

    classes_: NDArray[Any]
    heads_: list[tuple[int, int]]
    accuracies_: Float[Tensor, "layers heads"]
    means_: Float[Tensor, "classes kept head_dim"]

    def __init__(self, model: Model, heads: Integer = 20) -> None:
        self.model = model
        self.heads = heads

    def fit(self, X: Prompts, y: Sequence[Any] | NDArray[Any]) -> SparseAttentionVectors:
        """Class means and the heads that vote, of prompts and their labels. z of all prompts is held: 4 N L H D bytes.

        Raises ValueError, before anything is computed, for lengths that differ, fewer than two classes, or more heads
        than the model has; TypeError for labels that are not all strings or all integers; as `engine.capture` for
        prompts; ValueError for activations that are not finite, naming the prompts.
        """
        check_model(self.model)
        shape, kept = self.model.shape, as_int(self.heads)
        n_heads = shape.n_layers * shape.n_heads
        if kept is None or not 1 <= kept <= n_heads:
            raise ValueError(f"heads must be a number from 1 to {n_heads}, all heads of the model, got {self.heads!r}")
        X = _read_prompts(X)
        labels = _read_labels(y, len(X))
        classes, numbers = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"a classifier needs at least two classes, got only {classes.tolist()}")
        z, target = self._z(X).float(), torch.from_numpy(numbers)
        means = torch.stack([z[target == c].mean(dim=0) for c in range(len(classes))])  # [C, L, H, D]
        votes = _nearest(z.flatten(1, 2), means.flatten(1, 2))  # [N, L H]
        accuracies = (votes == target[:, None]).double().mean(dim=0)
        best = accuracies.sort(descending=True, stable=True).indices[:kept]
        self.classes_ = classes
        self.heads_ = [divmod(i, shape.n_heads) for i in best.tolist()]
        self.accuracies_ = accuracies.float().view(shape.n_layers, shape.n_heads)
        self.means_ = means.flatten(1, 2)[:, best]
        return self

    def predict(self, X: Prompts) -> NDArray[Any]:
        """The label of each prompt, by majority. Raises RuntimeError before `fit`; as `engine.capture` for prompts."""
        votes = self._votes(X)
        counts = self._counts(votes)
        leads = (counts == counts.amax(dim=1, keepdim=True)).gather(1, votes)  # [N, k]: whose class has the most votes
        best = leads.int().argmax(dim=1, keepdim=True)  # the first, so the best head of these
        return self.classes_[votes.gather(1, best)[:, 0].numpy()]

    def predict_proba(self, X: Prompts) -> NDArray[Any]:
        """Share of the heads that vote for each class, [N, C]: not a calibrated probability. Raises as `predict`."""
        votes = self._votes(X)
        return (self._counts(votes).double() / votes.shape[1]).numpy()

    def score(self, X: Prompts, y: Sequence[Any] | NDArray[Any]) -> float:
        """Share of prompts whose label is predicted. Raises as `predict`; ValueError for lengths that differ."""
        self._check_fitted()
        X = _read_prompts(X)
        labels = _read_labels(y, len(X))
        return float(np.mean(self.predict(X) == labels))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What the classifier was made with."""
        return {"model": self.model, "heads": self.heads}

    def set_params(self, **params: Any) -> SparseAttentionVectors:
        """Change what the classifier was made with. Raises ValueError for an unknown name."""
        for name, value in params.items():
            if name not in self.get_params():
                raise ValueError(f"parameters are {', '.join(self.get_params())}, got {name!r}")
            setattr(self, name, value)
        return self

    def __sklearn_clone__(self) -> SparseAttentionVectors:
        return SparseAttentionVectors(**self.get_params())  # the same model: scikit-learn would copy its weights

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn's cross-validation and grid search ask of an estimator; called by them alone."""
        sklearn = importlib.import_module("sklearn.utils")
        return sklearn.Tags(
            estimator_type="classifier",
            target_tags=sklearn.TargetTags(required=True),
            classifier_tags=sklearn.ClassifierTags(),
            input_tags=sklearn.InputTags(two_d_array=False, string=True),
        )

    def __repr__(self) -> str:
        return f"SparseAttentionVectors({self.model.name}, heads={self.heads})"

    def save(self, path: str | Path) -> None:
        """Write what `fit` found to one safetensors file, whole or not at all. Raises RuntimeError before `fit`."""
        self._check_fitted()
        described = {"model": self.model.name, "classes": self.classes_.tolist(), "heads": self.heads_}
        save_tensors(path, {"accuracies": self.accuracies_, "means": self.means_}, described)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> SparseAttentionVectors:
        """Read a fitted classifier. Raises FileNotFoundError; ValueError for another file or another model's."""
        tensors, described = load_tensors(path, ("accuracies", "means"))
        shape, made = model.shape, described["model"]
        fits = tensors["accuracies"].shape == (shape.n_layers, shape.n_heads)
        if made != model.name or not fits or tensors["means"].shape[-1] != shape.head_dim:
            raise ValueError(
                f"the classifier is of model {made!r}, heads {list(tensors['accuracies'].shape)}; "
                f"it does not fit {model.name!r}: {shape}"
            )
        classifier = cls(model, len(described["heads"]))
        classifier.classes_ = np.asarray(described["classes"])
        classifier.heads_ = [(layer, head) for layer, head in described["heads"]]
        classifier.accuracies_, classifier.means_ = tensors["accuracies"], tensors["means"]
        return classifier

    def _votes(self, X: Prompts) -> Int[Tensor, "prompts kept"]:
        """The class that each of the kept heads is for, by its number."""
        self._check_fitted()
        prompts = _read_prompts(X)
        layers, heads = torch.tensor(self.heads_).T
        chunks = [self._z(prompts[i : i + AT_ONCE], i)[:, layers, heads] for i in range(0, len(prompts), AT_ONCE)]
        return _nearest(torch.cat(chunks).float(), self.means_)

    def _counts(self, votes: Int[Tensor, "prompts kept"]) -> Int[Tensor, "prompts classes"]:
        return torch.nn.functional.one_hot(votes, len(self.classes_)).sum(dim=1)

    def _z(self, X: Prompts, first: int = 0) -> Float[Tensor, "prompts layers heads head_dim"]:
        shape = self.model.shape
        z = X if isinstance(X, Tensor) else capture(self.model, X)
        if z.ndim != 4 or z.shape[1:] != (shape.n_layers, shape.n_heads, shape.head_dim):
            wanted = f"[prompts, {shape.n_layers}, {shape.n_heads}, {shape.head_dim}]"
            raise ValueError(f"z must have shape {wanted}, got {list(z.shape)}")
        z = z.detach().cpu()
        broken = (~z.isfinite()).flatten(1).any(dim=1).nonzero().flatten()
        if len(broken):
            raise ValueError(f"activations of prompts {(broken + first).tolist()} are NaN or infinite")
        return z

    def _check_fitted(self) -> None:
        if not hasattr(self, "means_"):
            raise RuntimeError("this classifier is not fitted yet: call fit(prompts, labels) first")


def _nearest(
    z: Float[Tensor, "prompts heads head_dim"], means: Float[Tensor, "classes heads head_dim"]
) -> Int[Tensor, "prompts heads"]:
    """For each head, the class of the greatest cosine; the first of several."""
    cosines = torch.einsum("nhd,chd->nch", normalize(z, dim=-1), normalize(means, dim=-1))
    return cosines.argmax(dim=1)


def _read_prompts(X: Prompts) -> Any:
    if isinstance(X, str):
        raise TypeError("X must be a list of prompts, got one string")
    if isinstance(X, Tensor) or (isinstance(X, np.ndarray) and X.dtype.kind == "f"):
        X = read_tensor(X, "activations")
    prompts = X if isinstance(X, Tensor) else list(X)
    if not len(prompts):
        raise ValueError("no prompts were given")
    return prompts


def _read_labels(y: Any, n_prompts: int) -> NDArray[Any]:
    given = y.tolist() if isinstance(y, Tensor) else list(y)
    if len(given) != n_prompts:
        raise ValueError(f"X and y must be of one length, got {n_prompts} prompts and {len(given)} labels")
    integers = [as_int(label) for label in given]
    if None in integers and not all(isinstance(label, str) for label in given):
        kinds = sorted({type(label).__name__ for label in given})
        raise TypeError(f"labels must be all strings or all integers, got {', '.join(kinds)}")
    return np.asarray(given if None in integers else integers)
