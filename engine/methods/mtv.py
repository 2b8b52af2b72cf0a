"""MTV-EXTRACT: which heads must carry the mean activations of a task (Multimodal Task Vectors, arXiv 2406.15334).

    theta [L, H];  p = sigmoid(theta)
    each step, on one example:
        lambda_k ~ Bernoulli(p)                          k = 1..32 rollouts
        L_k = cross-entropy of the answer, z[l, h] := mean[l, h] where lambda_k[l, h]    (its first token, or all of it)
        theta <- Adam(theta, grad of sum_k log p(lambda_k) A_k)
    heads = one draw from sigmoid(theta), or the best of several

The 32 rollouts of a step are rows of one forward; prompts come back, so their prefixes are kept. Ranks share out the
rows: each draws all masks, runs its own, is told the losses of the others, and makes the same update.

The last line of a step can be had by other estimates of the gradient (`engine.methods.estimators`), two of which run
gates in [0, 1] through the model and back instead of rollouts; then ranks share out the step's prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.artifacts import TaskVector, versions
from engine.core.patches import Values
from engine.core.reading import check_model, read_means
from engine.distributed import ALONE, LostRankError, World, digest, identity
from engine.methods.estimators import Estimator
from engine.methods.options import PRESETS, Candidates, Options, Preset, read_options
from engine.methods.search import Search, resume, run
from engine.methods.trials import Shares, Trials, check_finite, read_held_out, read_trials
from engine.tasks.scoring import AT_ONCE, ExampleLike, Scored
from models import Model
from models.shapes import Bool, Float, Integer

__all__ = ["PRESETS", "Options", "Preset", "Search", "Step", "extract", "read_options"]


@dataclass(frozen=True)
class Step:
    """What a progress line shows of one step: its mean loss in nats, the expected number of heads after it."""

    step: int
    steps: int
    loss: float
    heads: float
    rollouts_per_second: float
    probabilities: Float[Tensor, "layers heads"]


@torch.inference_mode(False)
@torch.enable_grad()
def extract(
    model: Model,
    examples: Sequence[ExampleLike],
    means: Values,
    *,
    preset: str = "reference",
    steps: Integer | None = None,
    estimator: Estimator = "reinforce",
    rollouts: Integer | None = None,
    prompts_per_step: Integer = 1,
    loss: Scored = "first_token",
    lr: float | np.floating[Any] = 0.1,
    seed: Integer = 0,
    threshold: float | np.floating[Any] = 0.0,
    candidates: Candidates = "draws",
    validation: Sequence[ExampleLike] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: Integer = 10,
    at_once: Integer | None = None,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
    world: World = ALONE,
) -> TaskVector:
    """Search for the heads that, replaced by their means, make the model do a task without examples.

    examples:   (prompt, answer) pairs, formatted as the task will be asked: zero-shot, as a rule.
    means:      from `mean_activations` over many-shot prompts of the task.
    preset:     "reference" (the authors' code, default) or "paper"; see `PRESETS` for what they change.
    steps:      default the preset's (600 or 100). lr: of Adam.
    estimator:  of the gradient. "reinforce" (the method's own, default) and "leave_one_out" (another baseline) need
                losses only. "straight_through" and "relaxed" take one backward pass through the patch: fewer tokens,
                best with prompts_per_step=4, candidates="thresholds", lr=0.2: a tenth of REINFORCE's. Relaxed misses
                heads that are no better by halves. The heads are drawn and chosen alike after all of them.
    rollouts:   head masks a step, each run on every prompt of it (default 32); straight_through: masks a prompt
                (default 1); relaxed draws none (1).
    prompts_per_step: examples whose mean loss a step lowers; default 1.
    loss:       of an answer's first token (default, the method's own), of all of it ("answer", the sum over its tokens;
                the reference code's other loss, with rollouts=8), or of a token of it ("token_mean"). Masks are at the
                prompt's last token. Answers given with their end, " red\\n", find heads that end them.
    threshold:  heads of a probability up to this are never drawn at the end; default 0. The reference code: 0.8 for
                one of its models.
    candidates: what the end chooses among: "draws" from theta (default, the method's own), or the heads above each of
                as many probabilities ("thresholds"), which finds good heads earlier in a search.
    validation: examples that choose among the candidates of the end; default a third of `examples`, 50 at most, drawn
                by the seed, which are not searched on then (the reference code takes some of its whole training file).
    checkpoint: a file. Written every `checkpoint_every` steps; if it is there, the search goes on from it and ends with
                the same theta, bit by bit, as one that was never interrupted (same machine and number of threads).
    at_once:    rollouts (by gates: prompts) that run together; default as in the checkpoint, or else all, shared
                evenly by the ranks. The last bits of theta may depend on it, but not on the number of ranks.
    on_step:    called after every step, in place of the progress bar; on every rank.
    world:      the ranks (`engine.distributed.joined`) that share out the rollouts (by gates: the prompts of a step);
                default this process alone. All are given the same and get the same vector. Rank 0 writes and reads the
                checkpoint.

    Raises ValueError for an unknown preset or estimator, wrong means, no examples, an answer that is not text, a
    checkpoint of another search, losses that are not finite, fewer rollouts (or prompts) than ranks, or ranks that were
    given different things. OSError if the checkpoint cannot be written. LostRankError if a rank is lost.
    UnsupportedModelError where gates are asked of a model that records no gradients.

    Source: Algorithm 1 of the paper, and its public code.

    >>> vector = engine.mtv.extract(model, [Example("Q: hot\\nA:", " cold")], means, steps=2, progress=False)
    >>> vector.mask.shape == (model.shape.n_layers, model.shape.n_heads)
    True
    """
    check_model(model)
    options = read_options(
        preset=preset, steps=steps, estimator=estimator, rollouts=rollouts, prompts_per_step=prompts_per_step,
        loss=loss, lr=lr, seed=seed, threshold=threshold, candidates=candidates, at_once=at_once,
        checkpoint_every=checkpoint_every, world=world,
    )  # fmt: skip
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be a function of a Step, got {on_step!r}")
    means = read_means(model, means).clone()  # one made in inference mode has no place in a graph
    pool, choosing = read_held_out(examples, validation, options.seed, options.constants.candidates > 1)
    trials = read_trials(model, pool, means, options)
    # What is wrong with the validation examples is said now, not after the search.
    unseen = read_trials(model, choosing, means, options)
    _compare(trials, unseen, checkpoint, world)

    search = Search(options.constants, (len(means), len(means[0])), options.lr, options.seed, estimator)
    alike = trials.identity | {"method": "mtv"}
    shares = Shares(trials, world, _resume(search, checkpoint, trials, alike, world))
    each = options.rollouts * options.prompts_per_step

    def tell(seconds: float) -> None:
        if on_step:
            p = search.probabilities()
            on_step(Step(search.step, options.steps, search.losses[-1], p.sum().item(), each / seconds, p))

    try:
        run(
            search, options.steps, lambda: _step(search, shares), label=f"MTV-EXTRACT ({each} rollouts a step)",
            show=progress and not on_step and world.rank == 0, checkpoint=checkpoint, every=options.checkpoint_every,
            identity=alike | {"at_once": shares.at_once}, world=world, after=tell,
        )  # fmt: skip
        mask, validation_loss = _choose(search.draw_candidates(options.threshold, options.candidates), unseen, world)
    except LostRankError as error:
        kept = f"{search.kept} are in {checkpoint}: the same call goes on from there"
        where = kept if search.kept else "none are in a checkpoint"
        raise LostRankError(f"{error}; of {search.step} steps made {where}") from error
    metadata = dict(
        options.settings,
        at_once=shares.at_once,
        method="mtv",
        model=model.name,
        shape=model.shape.as_dict(),
        steps=options.steps,
        threshold=options.threshold,
        candidates=options.candidates,
        validation_loss=validation_loss,
        losses=search.losses,
        versions=versions(),
    )
    return TaskVector(mask, means.detach().float().cpu(), search.probabilities(), metadata)


def _step(search: Search, shares: Shares) -> None:
    """Heads are drawn, run on an example or several, and theta follows."""
    trials, options = shares.trials, shares.trials.options
    drawn = search.draw_examples(len(trials.examples), options.prompts_per_step)
    if options.by_gates:
        gates = search.draw_gates(options.prompts_per_step, options.rollouts)
        losses, gradient = shares.by_gates(drawn, gates)
        check_finite(losses, drawn, trials.examples, f"step {search.step}")
        search.follow(gradient, losses)
    else:
        masks = search.draw(options.rollouts)
        losses = shares.by_rollouts(drawn, masks)
        check_finite(losses, drawn, trials.examples, f"step {search.step}")
        search.update(masks, losses.mean(dim=0))


def _choose(
    candidates: Bool[Tensor, "candidates layers heads"], unseen: Trials, world: World
) -> tuple[Bool[Tensor, "layers heads"], float]:
    """The candidate with the lowest mean loss on examples not searched on, and that loss."""
    if world.size > 1:
        world.same({"candidates": digest(candidates)})
    # Prompts that share forwards stay together: the bits do not depend on the number of ranks.
    share = world.share(len(unseen.examples), AT_ONCE)
    losses = torch.zeros(0, len(candidates))
    if unseen.examples[share]:
        losses = unseen.losses(unseen.pool.prompts[share], unseen.targets[share], candidates)
    best, loss = unseen.best(world.gather(losses, len(unseen.examples), AT_ONCE))
    return candidates[best], loss


def _compare(trials: Trials, unseen: Trials, checkpoint: str | Path | None, world: World) -> None:
    """Raises ValueError unless all ranks were given the same."""
    if world.size > 1:
        options = trials.options
        alike: dict[str, Any] = {name: getattr(options, name) for name in ("steps", "at_once", "checkpoint_every")}
        alike |= dict(checkpoint=checkpoint is not None, means=digest(trials.means))
        alike |= dict(threshold=options.threshold, candidates=options.candidates)
        world.same(trials.identity | alike | dict(validation=unseen.identity["data"]) | identity(trials.model))


def _resume(
    search: Search, checkpoint: str | Path | None, trials: Trials, identity: dict[str, Any], world: World
) -> int:
    """The search goes on from the checkpoint, if there is one; and how many rollouts, or prompts, run at once."""
    options = trials.options
    saved = resume(search, options.steps, checkpoint, identity, world)
    even = options.share(world)
    at_once = options.at_once or saved or even
    if at_once > even:
        raise ValueError(
            f"checkpoint {checkpoint} was made with {at_once} {options.shared[0]}s at once, which leaves nothing to "
            f"some of {world.size} ranks: give at_once={even}, for the same search up to rounding, or start fewer ranks"
        )
    return at_once
