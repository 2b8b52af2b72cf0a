"""Learned task vectors: what is added to a site is found by gradient, the model frozen (arXiv 2509.24169).

    v [positions, units, width] = 0
    each step, on some examples:
        L = mean cross-entropy of their answers, x[l, u] := x[l, u] + v[u] at each position
        v <- AdamW(v, grad L)
    v of the lowest loss on validation examples; it ends when that has not become lower for a while

x is any site: the residual stream after a layer as in the paper, or several layers, heads, an MLP's output, anywhere in
a prompt. What lies before the first of the positions is computed once, without a graph.

The paper's figures are not followed but chosen here: rate, decay, steps, how many examples a step and when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from engine.artifacts import load_tensors, save_tensors, versions
from engine.core.activations import read_sites
from engine.core.patches import Patch, Positions, Units
from engine.core.prefix import PrefixPool
from engine.core.reading import check_model, read_positions, read_units
from engine.distributed import digest, weights_of
from engine.methods.contexts import digest_of
from engine.methods.options import read_options
from engine.methods.search import Descent, resume, run
from engine.methods.trials import check_finite, read_held_out
from engine.tasks.scoring import Example, ExampleLike, Scored, losses_under, scored_tokens, with_answer
from models import Model, Site, UnsupportedModelError
from models.reading import read_int
from models.shapes import Bool, Float, Integer


@dataclass(frozen=True)
class LearnedVector:
    """Vectors to be added to units of a site, at some tokens of a prompt.

    units:     those that have a vector. positions: tokens, negative ones counted from the end of the prompt.
    vectors:   in the order of `units.nonzero()`.

    >>> units = torch.zeros(model.shape.n_layers, 1, dtype=torch.bool)
    >>> units[9] = True
    >>> vector = engine.learned.LearnedVector("resid_post", units, torch.zeros(1, 1, model.shape.d_model))
    >>> answer = engine.generate(model, "Q: hot\\nA:", vector.patch, max_new_tokens=2)
    """

    site: Site
    units: Bool[Tensor, "layers units"]
    vectors: Float[Tensor, "positions patched width"]
    positions: tuple[int, ...] = (-1,)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def patch(self) -> Patch:
        """What adds it to a prompt."""
        return addition(self.site, self.units, self.vectors, self.positions)

    def check(self, model: Model) -> None:
        """Raise ValueError unless the vector was made with this model."""
        check_model(model)
        made, size = self.metadata.get("model"), model.site(self.site)
        if made != model.name or (*self.units.shape, self.vectors.shape[-1]) != (
            size.n_layers,
            size.units,
            size.width,
        ):
            raise ValueError(
                f"the vector is of model {made!r}, {self.site} {[*self.units.shape, self.vectors.shape[-1]]}; it does "
                f"not fit {model.name!r}: {[size.n_layers, size.units, size.width]}"
            )

    def save(self, path: str | Path) -> None:
        """Write vectors and metadata to one file. Raises OSError if the folder cannot be written."""
        where = dict(site=self.site, positions=list(self.positions))
        save_tensors(path, {"units": self.units, "vectors": self.vectors}, {**self.metadata, **where})

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> LearnedVector:
        """Read a saved vector; with `model`, also check that it is of that model.

        Raises FileNotFoundError, or ValueError for a file that is broken or holds something else.
        """
        tensors, metadata = load_tensors(path, ("units", "vectors"))
        site, positions = metadata.pop("site"), tuple(metadata.pop("positions"))
        vector = cls(site, tensors["units"], tensors["vectors"], positions, metadata)
        if model is not None:
            vector.check(model)
        return vector


def addition(
    site: Site,
    units: Bool[Tensor, "layers units"],
    vectors: Float[Tensor, "positions patched width"],
    positions: Sequence[int],
    answer: int = 0,
) -> Patch:
    """The patch, of prompts with so many more tokens behind them; differentiable in the vectors."""
    layers, numbers = units.nonzero(as_tuple=True)
    values = vectors.new_zeros(len(vectors), *units.shape, vectors.shape[-1])
    values[:, layers, numbers] = vectors
    at = [position - answer if position < 0 else position for position in positions]
    return Patch(site, units, values, at, mode="add")


@dataclass(frozen=True)
class Step:
    """What a progress line shows of one step: its mean loss in nats; the last one on validation examples."""

    step: int
    steps: int
    loss: float
    validation_loss: float


@dataclass(frozen=True, eq=False)
class Lesson:
    """Examples that vectors are added to.

    targets: the tokens of their answers that count. mean: whether a loss is the mean over them, not their sum.
    """

    model: Model
    pool: PrefixPool
    targets: list[list[int]]
    mean: bool
    site: Site
    units: Bool[Tensor, "layers units"]
    positions: tuple[int, ...]

    def losses(
        self, which: Sequence[int], vectors: Float[Tensor, "positions patched width"]
    ) -> Float[Tensor, " examples"]:
        """Of some of the examples, in nats; differentiable in the vectors."""
        prompts, targets = [self.pool[i] for i in which], [self.targets[i] for i in which]

        def patched(places: int) -> dict[str, Any]:
            return {"patches": addition(self.site, self.units, vectors, self.positions, places - 1)}

        return losses_under(self.model, prompts, targets, patched, self.mean)[:, 0]


class Learning(Descent):
    """Of vectors: those of the lowest validation loss are kept, and it is done when that stands still.

    patience: so many looks at the validation examples, without a lower loss, end it.
    """

    names = (*Descent.names, "best", "validation_losses", "looked")

    def __init__(
        self, vectors: Float[Tensor, "positions patched width"], lr: float, seed: int, decay: float, patience: int
    ):
        super().__init__(vectors, lr, Generator().manual_seed(seed), decay)
        self.patience = patience
        self.best = self.theta.detach().clone()
        self.validation_losses: list[float] = []
        self.looked = 0  # the step of the last look

    @property
    def done(self) -> bool:
        found = self.validation_losses
        return len(found) > self.patience and min(found[-self.patience :]) >= min(found[: -self.patience])

    def look(self, loss: float, step: int) -> None:
        """What the vectors are worth after a step."""
        if loss < min(self.validation_losses, default=float("inf")):
            self.best = self.theta.detach().clone()
        self.validation_losses.append(loss)
        self.looked = step

    def tensors(self) -> dict[str, Tensor]:
        seen = torch.tensor(self.validation_losses, dtype=torch.float64)
        return super().tensors() | {"best": self.best, "validation_losses": seen, "looked": torch.tensor(self.looked)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self.best, self.validation_losses = tensors["best"], tensors["validation_losses"].tolist()
        self.looked = int(tensors["looked"])


@torch.inference_mode(False)
@torch.enable_grad()
def extract(
    model: Model,
    examples: Sequence[ExampleLike],
    units: Units,
    *,
    site: Site = "resid_post",
    positions: Positions = -1,
    steps: Integer = 300,
    prompts_per_step: Integer = 8,
    loss: Scored = "answer",
    lr: float | np.floating[Any] = 0.1,
    weight_decay: float | np.floating[Any] = 0.01,
    look_every: Integer = 10,
    patience: Integer = 5,
    seed: Integer = 0,
    validation: Sequence[ExampleLike] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: Integer = 10,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> LearnedVector:
    """Vectors that, added to a site, make the model do a task without examples.

    examples:   (prompt, answer) pairs, formatted as the task will be asked: zero-shot, as a rule.
    units:      where vectors are added, one each: layers, of a site of one unit, or (layer, unit) pairs, or a mask.
    site:       as of `engine.Patch`; default the residual stream after a layer. positions: as there, a vector each;
                default the last token.
    steps:      at most; default 300. prompts_per_step: examples whose mean loss a step lowers; default 8.
    loss:       of the whole answer (default), a token of it ("token_mean"), or its first token.
    lr, weight_decay: of AdamW; default 0.1 and 0.01. Vectors begin at 0; a larger stream may want a higher rate.
    look_every: steps between two looks at the validation examples; default 10. patience: it ends after so many looks
                without a lower loss; default 5.
    validation: examples that say which vectors are best; default a third of `examples`, 50 at most, drawn by the seed.
    seed, checkpoint, checkpoint_every, on_step: as for `engine.mtv.extract`.

    Raises ValueError for what cannot be learned so, a checkpoint of another search, a loss that is not finite;
    IndexError for positions outside a prompt; UnsupportedModelError for a model that records no gradients, or has no
    such site; else as `engine.Patch`.

    Source: Task Vectors, Learned Not Extracted (arXiv 2509.24169).

    >>> asked = [Example("Q: hot\\nA:", " cold"), Example("Q: big\\nA:", " small")]
    >>> vector = engine.learned.extract(model, asked, [9], steps=2, progress=False)
    >>> vector.vectors.shape == (1, 1, model.shape.d_model)
    True
    """
    check_model(model)
    options = read_options(
        steps=steps, prompts_per_step=prompts_per_step, loss=loss, lr=lr, seed=seed, checkpoint_every=checkpoint_every
    )
    every, patience = read_int(look_every, "look_every", 1), read_int(patience, "patience", 1)
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, Real) or not 0 <= weight_decay < float("inf"):
        raise ValueError(f"expected weight_decay >= 0, got {weight_decay!r}")
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be a function of a Step, got {on_step!r}")
    at = read_positions(positions)
    if site in ("scores", "pattern"):
        raise ValueError(f"{site} has a number for each token of a prompt: there is no one vector for all prompts")
    read_sites(model, [site])
    mask = read_units(site, size := model.site(site), units)
    if len(mask) != 1 or not mask.any():
        raise ValueError(f"units must be of one row, and at least one, got {len(mask)} rows, {int(mask.sum())} units")
    given, held_out = read_held_out(examples, validation, options.seed)
    taught, unseen = (_read_lesson(model, some, options.loss, site, mask[0], at) for some in (given, held_out))
    start = torch.zeros(len(at), int(mask.sum()), size.width, dtype=torch.promote_types(model.dtype, torch.float32))
    search = Learning(start, options.lr, options.seed, float(weight_decay), patience)
    settings = {name: getattr(options, name) for name in ("prompts_per_step", "loss", "lr", "seed")}
    settings |= dict(weight_decay=float(weight_decay), look_every=every, patience=patience, method="learned")
    where = dict(site=site, positions=list(at), units=mask[0].nonzero().tolist())
    data = digest(*((lesson.targets, digest_of(lesson.pool.prompts)) for lesson in (taught, unseen)))
    alike = settings | where | dict(model=model.name, shape=model.shape.as_dict(), weights=weights_of(model), data=data)
    resume(search, options.steps, checkpoint, alike)

    def step() -> None:
        drawn = search.draw_examples(len(given), options.prompts_per_step)
        losses = taught.losses(drawn, search.theta)
        if not losses.requires_grad:
            raise UnsupportedModelError(f"{model.name} records no gradients: no vector can be learned on it")
        check_finite(losses, drawn, given, f"step {search.step}")
        search.descend(losses.mean(), losses.detach())
        if search.step % every == 0 or search.step == options.steps:
            look()

    @torch.no_grad()
    def look() -> None:
        losses = unseen.losses(range(len(held_out)), search.theta.detach())
        check_finite(losses, range(len(held_out)), held_out, "validation")
        search.look(losses.double().mean().item(), search.step)

    def tell(_: float) -> None:
        if on_step:
            seen = search.validation_losses[-1] if search.validation_losses else float("nan")
            on_step(Step(search.step, options.steps, search.losses[-1], seen))

    run(
        search, options.steps, step, label="learned task vector", show=progress and not on_step, checkpoint=checkpoint,
        every=options.checkpoint_every, identity=alike, after=tell,
    )  # fmt: skip
    if search.looked < search.step:  # it went on from a checkpoint of the last step asked for
        look()
    metadata = settings | dict(
        model=model.name,
        shape=model.shape.as_dict(),
        steps=search.step,
        losses=search.losses,
        validation_losses=search.validation_losses,
        validation_loss=min(search.validation_losses),
        versions=versions(),
    )
    return LearnedVector(site, mask[0], search.best.float().cpu(), at, metadata)


def _read_lesson(
    model: Model,
    examples: list[Example],
    loss: str,
    site: Site,
    units: Bool[Tensor, "layers units"],
    at: tuple[int, ...],
) -> Lesson:
    """Raises ValueError for examples that cannot be run, IndexError for positions outside one; none is run."""
    targets = [scored_tokens(model, example, loss) for example in examples]
    pool = PrefixPool(model, [example.prompt for example in examples])
    for prompt, target in zip(pool.prompts, targets, strict=True):
        with_answer(model, prompt, target)
        if outside := [p for p in at if not -len(prompt.tokens) <= p < len(prompt.tokens)]:
            raise IndexError(f"position {outside[0]} lies outside a prompt, which has {len(prompt.tokens)} tokens")
        if len({p % len(prompt.tokens) for p in at}) < len(at):
            raise ValueError(
                f"positions {list(at)} are the same token twice in a prompt of {len(prompt.tokens)} tokens"
            )
    return Lesson(model, pool, targets, loss == "token_mean", site, units, at)
