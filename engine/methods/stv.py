"""STV: where activations feel the context, one of a bank of its values (Sensitivity-aware Task Vectors, 2511.08246).

    where    d_i[l, h] = z[l, h] with context - z[l, h] without                              z at the last token
             s[l, h]   = |mean of d_i| / mean of |d_i|                                       i: questions
             heads     = the k of the largest s
    what     bank[j] = centroids of k-means over z[heads[j]] with context                    j = 1..k
    which    theta [k, C];  p_j = softmax(theta_j)
             each step, on one example:
                 c_r ~ p                                                                     r = 1..32 rollouts
                 L_r = cross-entropy of the answer, z[heads[j]] := bank[j, c_r[j]] for all j
                 theta <- Adam(theta, grad of sum_r log p(c_r) A_r)

All heads are patched in every rollout, which is a row of one forward with values of its own. Where heads lie is known
after two forwards a question, so that the search is about values alone.

Of the source only what it does is followed, not its figures, which are chosen here: how many heads and centroids, the
advantage, Adam and its rate (MTV's), and that the end takes, of the likeliest centroids and nine draws, what has the
lowest loss on validation examples. It speaks of deltas that are consistent over questions, hence s, a share of what
context changes that is the same for all; by="distance" ranks by the mean of |d_i| itself, which on SmolLM2 finds heads
that carry the question's own word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Generator, Tensor

from engine.artifacts import TaskVector, versions
from engine.core.prefix import as_prefix
from engine.core.reading import check_model
from engine.distributed import ALONE
from engine.methods.clusters import kmeans
from engine.methods.contexts import digest_of, read_contexts, states
from engine.methods.estimators import standardised
from engine.methods.options import read_options
from engine.methods.search import Descent, resume, run
from engine.methods.trials import Shares, check_finite, read_held_out, read_trials
from engine.tasks.scoring import ExampleLike, Scored, read_examples
from models import Model, PromptLike
from models.reading import read_int
from models.shapes import Bool, Float, Int, Integer

CENTROIDS = 8
SHARE = 2  # of the model's heads, one of so many is patched by default
Ranking: TypeAlias = Literal["consistency", "distance"]


@dataclass(frozen=True)
class Step:
    """What a progress line shows of one step: its mean loss in nats; the entropy of a head's choice, in nats."""

    step: int
    steps: int
    loss: float
    entropy: float


@dataclass(frozen=True)
class Bank:
    """What heads may carry.

    heads:     those that are patched, as indices into all L H.
    centroids: of each of these. means: of all heads, with context.
    """

    heads: Int[Tensor, " patched"]
    centroids: Float[Tensor, "patched centroids head_dim"]
    means: Float[Tensor, "layers heads head_dim"]

    @property
    def mask(self) -> Bool[Tensor, "layers heads"]:
        mask = torch.zeros(self.means.shape[:2], dtype=torch.bool)
        mask.view(-1)[self.heads] = True
        return mask

    def masks(self, rows: int) -> Bool[Tensor, "rows layers heads"]:
        return self.mask.expand(rows, -1, -1)

    def values(self, chosen: Int[Tensor, "rows patched"]) -> Float[Tensor, "rows layers heads head_dim"]:
        """Each patched head with the centroid chosen for it."""
        values = self.means.flatten(0, 1).repeat(len(chosen), 1, 1)
        values[:, self.heads] = self.centroids[torch.arange(len(self.heads)), chosen]
        return values.unflatten(1, self.means.shape[:2])


class Choice(Descent):
    """Of centroids: softmax(theta[j]) is the probability of each to be what head j carries. It begins even."""

    def __init__(self, heads: int, centroids: int, lr: float, seed: int):
        super().__init__(torch.zeros(heads, centroids), lr, Generator().manual_seed(seed))

    def log_p(self) -> Float[Tensor, "heads centroids"]:
        return self.theta.log_softmax(dim=-1)

    def draw(self, rollouts: int) -> Int[Tensor, "rollouts heads"]:
        return torch.multinomial(self.log_p().detach().exp(), rollouts, replacement=True, generator=self.random).T

    def draw_candidates(self, count: int) -> Int[Tensor, "candidates heads"]:
        """The likeliest first, then draws."""
        return torch.cat([self.theta.detach().argmax(dim=-1)[None], self.draw(count)[1:]])

    def update(self, chosen: Int[Tensor, "rollouts heads"], losses: Float[Tensor, " rollouts"]) -> None:
        """Centroids of rollouts with a high loss become less likely."""
        log_p = self.log_p().gather(1, chosen.T).sum(dim=0)  # [rollouts]
        self.descend(standardised(log_p, losses), losses)


@torch.inference_mode(False)
@torch.enable_grad()
def extract(
    model: Model,
    examples: Sequence[ExampleLike],
    contexts: Sequence[PromptLike | ExampleLike],
    *,
    by: Ranking = "consistency",
    heads: Integer | None = None,
    centroids: Integer = CENTROIDS,
    steps: Integer = 100,
    rollouts: Integer = 32,
    prompts_per_step: Integer = 1,
    loss: Scored = "first_token",
    lr: float | np.floating[Any] = 0.1,
    seed: Integer = 0,
    validation: Sequence[ExampleLike] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: Integer = 10,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> TaskVector:
    """The heads that feel the context most, each with that of its values that does the task without context.

    examples:   (prompt, answer) pairs, formatted as the task will be asked: zero-shot, as a rule.
    contexts:   the same questions after demonstrations, one for each of `examples`: prompts, or (prompt, answer) pairs.
    by:         heads are ranked by the consistency of what context does to them (default), or by its mean distance.
    heads:      how many are patched; default half of the model's.
    centroids:  values that a head chooses among; default 8.
    steps, rollouts, prompts_per_step, loss, lr, seed, validation, checkpoint, checkpoint_every, on_step: as for
                `engine.mtv.extract`; steps default to 100. An interrupted search ends with the same theta, bit by bit.

    Returns a `TaskVector`: its values are the chosen centroids (of other heads the mean with context), its
    probabilities 1 for the patched heads; "choices" of its metadata has the number of each head's centroid.

    Raises ValueError for an unknown ranking, contexts that are not one for each example, more heads than there are,
    more centroids than contexts, a checkpoint of another search; else as `engine.mtv.extract`. Nothing is run then.

    Source: Sensitivity-aware Task Vectors (arXiv 2511.08246).

    >>> asked = [Example("Q: hot\\nA:", " cold"), Example("Q: big\\nA:", " small")]
    >>> shown = ["Q: up\\nA: down\\n\\nQ: hot\\nA:", "Q: in\\nA: out\\n\\nQ: big\\nA:"]
    >>> engine.stv.extract(model, asked, shown, heads=20, centroids=2, steps=2, progress=False).mask.sum()
    tensor(20)
    """
    check_model(model)
    options = read_options(
        steps=steps, rollouts=rollouts, prompts_per_step=prompts_per_step, loss=loss, lr=lr, seed=seed,
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be a function of a Step, got {on_step!r}")
    shape, given = model.shape, read_examples(examples)
    total = shape.n_layers * shape.n_heads
    k = max(1, total // SHARE) if heads is None else read_int(heads, "heads", None)
    n_centroids = read_int(centroids, "centroids", None)
    shown = read_contexts(model, contexts, len(given))
    _check_ranking(by)
    if not 1 <= k <= total:
        raise ValueError(f"heads must lie between 1 and the {total} of {model.name}, got {k}")
    if not 1 <= n_centroids <= len(shown):
        raise ValueError(f"centroids must lie between 1 and the {len(shown)} contexts, got {n_centroids}")
    pool, choosing = read_held_out(given, validation, options.seed)
    # What is not known yet, the means, is replaced below; the contexts stand for it in a checkpoint.
    unknown = torch.zeros(shape.n_layers, shape.n_heads, shape.head_dim)
    trials, unseen = (read_trials(model, some, unknown, options) for some in (pool, choosing))
    asked = [as_prefix(model, example.prompt) for example in given]
    alike = trials.identity | dict(
        method="stv", by=by, heads=k, centroids=n_centroids, contexts=digest_of([*shown, *asked])
    )
    search = Choice(k, n_centroids, options.lr, options.seed)
    resume(search, options.steps, checkpoint, alike)

    z = states(model, shown, "z", progress)
    felt = _sensitivity(z, states(model, asked, "z", progress), by)
    ranked = felt.flatten().sort(descending=True, stable=True).indices[:k]
    points = z.flatten(1, 2)[:, ranked].transpose(0, 1)
    bank = Bank(ranked, kmeans(points, n_centroids, Generator().manual_seed(options.seed)), z.mean(dim=0))
    shares = Shares(trials, ALONE, options.rollouts)

    def step() -> None:
        drawn = search.draw_examples(len(pool), options.prompts_per_step)
        chosen = search.draw(options.rollouts)
        losses = shares.by_rollouts(drawn, bank.masks(len(chosen)), bank.values(chosen))
        check_finite(losses, drawn, trials.examples, f"step {search.step}")
        search.update(chosen, losses.mean(dim=0))

    def tell(_: float) -> None:
        if on_step:
            log_p = search.log_p().detach()
            entropy = -(log_p.exp() * log_p).sum(dim=-1).mean().item()
            on_step(Step(search.step, options.steps, search.losses[-1], entropy))

    run(
        search, options.steps, step, label=f"STV ({options.rollouts} rollouts a step)",
        show=progress and not on_step, checkpoint=checkpoint, every=options.checkpoint_every, identity=alike,
        after=tell,
    )  # fmt: skip
    candidates = search.draw_candidates(options.constants.candidates)
    masks, values = bank.masks(len(candidates)), bank.values(candidates)
    best, validation_loss = unseen.best(unseen.losses(unseen.pool.prompts, unseen.targets, masks, values))
    chosen = candidates[best]
    metadata = dict(
        options.settings,
        method="stv",
        model=model.name,
        shape=shape.as_dict(),
        steps=options.steps,
        by=by,
        centroids=n_centroids,
        ranked=[divmod(i, shape.n_heads) for i in ranked.tolist()],
        choices=chosen.tolist(),
        validation_loss=validation_loss,
        losses=search.losses,
        versions=versions(),
    )
    return TaskVector(bank.mask, bank.values(chosen[None])[0], bank.mask.float(), metadata)


def sensitivity(
    model: Model,
    contexts: Sequence[PromptLike | ExampleLike],
    queries: Sequence[PromptLike | ExampleLike],
    *,
    by: Ranking = "consistency",
    progress: bool = True,
) -> Float[Tensor, "layers heads"]:
    """How each head's output at the last token feels context.

    contexts, queries: the same questions with and without demonstrations; prompts, or (prompt, answer) pairs.
    by: "consistency", from 0 to 1: the length of the mean difference as a share of the mean length of differences
        (default); "distance": that mean length.

    Raises ValueError for an unknown ranking, contexts that are not one for each query; as `engine.capture` for prompts.

    Source: Sensitivity-aware Task Vectors (arXiv 2511.08246).

    >>> felt = engine.stv.sensitivity(model, ["Q: up\\nA: down\\n\\nQ: hot\\nA:"], ["Q: hot\\nA:"], progress=False)
    >>> felt.shape == (model.shape.n_layers, model.shape.n_heads)
    True
    """
    check_model(model)
    _check_ranking(by)
    asked = read_contexts(model, queries, None, "queries")
    shown = read_contexts(model, contexts, len(asked))
    return _sensitivity(states(model, shown, "z", progress), states(model, asked, "z", progress), by)


def _check_ranking(by: str) -> None:
    if by not in get_args(Ranking):
        raise ValueError(f"by must be one of {list(get_args(Ranking))}, got {by!r}")


def _sensitivity(
    with_context: Float[Tensor, "prompts layers heads head_dim"],
    without: Float[Tensor, "prompts layers heads head_dim"],
    by: Ranking,
) -> Float[Tensor, "layers heads"]:
    deltas = with_context - without
    distance = deltas.norm(dim=-1).mean(dim=0)
    return distance if by == "distance" else deltas.mean(dim=0).norm(dim=-1) / distance.clamp_min(1e-30)
