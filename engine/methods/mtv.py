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

import hashlib
import json
import math
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from engine.artifacts import TaskVector
from engine.core.checking import able
from engine.core.patches import Values, check_model, read_values
from engine.core.prefix import Prefix, PrefixPool
from engine.core.rowstep import RowStep
from engine.distributed import ALONE, LostRankError, World, digest
from engine.distributed import identity as model_identity
from engine.methods.estimators import BY_GATES, ESTIMATORS, Estimator, gate_gradients
from engine.methods.search import PRESETS, Preset, Search, read_checkpoint
from engine.progress import track
from engine.tasks.scoring import (
    AT_ONCE,
    Example,
    ExampleLike,
    Scored,
    answer_losses,
    cross_entropies,
    read_examples,
    scored_tokens,
    with_answer,
)
from models import Model
from models.reading import read_int, read_seed
from models.shapes import Bool, Float, Integer

HELD_OUT = 50  # examples, at most, that choose among the candidates


@dataclass(frozen=True)
class Step:
    """What a progress line shows of one step: its mean loss in nats, the expected number of heads after it."""

    step: int
    steps: int
    loss: float
    heads: float
    rollouts_per_second: float
    probabilities: Float[Tensor, "layers heads"]


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
                best with several prompts a step; relaxed misses heads that are no better by halves. The heads are drawn
                and chosen alike after all of them.
    rollouts:   head masks a step, each run on every prompt of it (default 32); straight_through: masks a prompt
                (default 1); relaxed draws none (1).
    prompts_per_step: examples whose mean loss a step lowers; default 1.
    loss:       of an answer's first token (default, the method's own), of all of it ("answer", the sum over its tokens;
                the reference code's other loss, with rollouts=8), or of a token of it ("token_mean"). Masks are at the
                prompt's last token. Answers given with their end, " red\\n", find heads that end them.
    threshold:  heads of a probability up to this are never drawn at the end; default 0. The reference code: 0.8 for
                one of its models.
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
    prompts_per_step = read_int(prompts_per_step, "prompts_per_step", None)
    checkpoint_every, seed = read_int(checkpoint_every, "checkpoint_every", None), read_seed(seed)
    at_once = None if at_once is None else read_int(at_once, "at_once", None)
    chosen, steps, rollouts = read_options(
        preset, steps, rollouts, lr, at_once, world, estimator=estimator, prompts_per_step=prompts_per_step
    )
    by_gates = estimator in BY_GATES
    if checkpoint_every < 1:
        raise ValueError(f"expected checkpoint_every >= 1, got checkpoint_every={checkpoint_every}")
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be a function of a Step, got {on_step!r}")
    if loss not in get_args(Scored):
        raise ValueError(f"loss must be one of {list(get_args(Scored))}, got {loss!r}")
    if not isinstance(threshold, Real) or not 0 <= threshold < 1:
        raise ValueError(f"threshold must be a probability from 0 to below 1, got {threshold!r}")
    lr, threshold, examples = float(lr), float(threshold), read_examples(examples)
    choosing = read_examples(validation, "validation examples") if validation else []
    shape = (model.shape.n_layers, model.shape.n_heads)
    means = read_values(model, means, torch.ones(1, *shape, dtype=torch.bool))
    if means.ndim != 3:
        raise ValueError(f"means must have shape {[*shape, model.shape.head_dim]}, got {list(means.shape)}")
    if not choosing:
        examples, choosing = _held_out(examples, seed) if chosen.candidates > 1 else (examples, examples[:HELD_OUT])
    targets = [scored_tokens(model, example, loss) for example in examples]
    pool = PrefixPool(model, [example.prompt for example in examples])
    for prompt, target in zip(pool.prompts, targets, strict=True):
        with_answer(model, prompt, target)
    # What is wrong with the validation examples is said now, not after the search.
    wanted = [scored_tokens(model, one, loss) for one in choosing]
    unseen = [with_answer(model, one.prompt, ids).tokens.tolist() for one, ids in zip(choosing, wanted, strict=True)]

    settings: dict[str, Any] = dict(
        preset=preset, estimator=estimator, rollouts=rollouts, prompts_per_step=prompts_per_step, loss=loss, lr=lr,
        seed=seed,
    )  # fmt: skip
    search = Search(chosen, shape, lr, seed, estimator)
    identity = _identity(model, means, pool.prompts, targets, settings)
    if world.size > 1:
        rest = dict(checkpoint=checkpoint is not None, checkpoint_every=checkpoint_every, at_once=at_once, steps=steps)
        rest |= dict(means=digest(means), validation=digest(unseen, wanted), threshold=threshold)
        world.same(identity | rest | model_identity(model))
    saved: tuple[dict[str, Tensor], int] | None = None
    if checkpoint is not None and (saved := world.from_first(lambda: read_checkpoint(checkpoint, identity))):
        search.load(saved[0])
        if search.step > steps:
            raise ValueError(f"checkpoint {checkpoint} is of {search.step} steps, more than the {steps} asked for")
    what, shared = _shared(estimator, rollouts, prompts_per_step)
    even = -(-shared // world.size)
    at_once = at_once or (saved[1] if saved else even)
    if at_once > even:
        raise ValueError(
            f"checkpoint {checkpoint} was made with {at_once} {what}s at once, which leaves nothing to some of "
            f"{world.size} ranks: give at_once={even}, for the same search up to rounding, or start fewer ranks"
        )

    replay = None if by_gates or loss != "first_token" else _replay(model, pool, at_once)
    mean = loss == "token_mean"
    kept, each = search.step, rollouts * prompts_per_step
    try:
        shown = progress and not on_step and world.rank == 0
        for step in track(range(search.step, steps), f"MTV-EXTRACT ({each} rollouts a step)", shown):
            started = time.perf_counter()
            drawn = search.draw_examples(len(examples), prompts_per_step)
            asked = [targets[index] for index in drawn]
            if by_gates:
                gates = search.draw_gates(prompts_per_step, rollouts)
                losses, gradient = _run_gates(model, pool, drawn, asked, gates, means, mean, at_once, world)
            else:
                masks = search.draw(rollouts)
                prompts = [pool[index] for index in drawn]
                losses = _run(model, prompts, asked, masks, means, mean, at_once, world, replay)
            for index, finite in zip(drawn, losses.isfinite().all(dim=1).tolist(), strict=True):
                if not finite:
                    raise ValueError(
                        f"step {step}: the loss of example {index} ({examples[index].prompt!r:.60}) is not finite"
                    )
            if by_gates:
                search.follow(gradient, losses)
            else:
                search.update(masks, losses.mean(dim=0))
            if checkpoint is not None and (search.step % checkpoint_every == 0 or search.step == steps):
                world.from_first(lambda: search.save(checkpoint, identity | {"at_once": at_once}))
                kept = search.step
            if on_step:
                rate, p = each / (time.perf_counter() - started), search.probabilities()
                on_step(Step(search.step, steps, search.losses[-1], p.sum().item(), rate, p))
        candidates = search.draw_candidates(threshold)
        mask, validation_loss = _choose(model, candidates, means, choosing, wanted, mean, world)
    except LostRankError as error:
        where = f"{kept} are in {checkpoint}: the same call goes on from there" if kept else "none are in a checkpoint"
        raise LostRankError(f"{error}; of {search.step} steps made {where}") from error
    metadata = dict(
        settings,
        at_once=at_once,
        method="mtv",
        model=model.name,
        shape=model.shape.as_dict(),
        steps=steps,
        threshold=threshold,
        validation_loss=validation_loss,
        losses=search.losses,
        versions=versions(),
    )
    return TaskVector(mask, means.detach().float().cpu(), search.probabilities(), metadata)


def read_options(
    preset: str,
    steps: Integer | None,
    rollouts: Integer | None = None,
    lr: float | np.floating[Any] = 0.1,
    at_once: int | None = None,
    world: World = ALONE,
    *,
    estimator: str = "reinforce",
    prompts_per_step: int = 1,
) -> tuple[Preset, int, int]:
    """The preset of that name, the number of steps and of rollouts. Raises ValueError for what cannot be run."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {list(ESTIMATORS)}, got {estimator!r}")
    by_gates = estimator in BY_GATES
    chosen = PRESETS[preset]
    steps = chosen.steps if steps is None else read_int(steps, "steps", None)
    rollouts = (1 if by_gates else 32) if rollouts is None else read_int(rollouts, "rollouts", None)
    least = 1 if by_gates else 2
    if steps < 1 or rollouts < least or not isinstance(lr, Real) or not 0 < lr < math.inf:
        raise ValueError(
            f"expected steps >= 1, rollouts >= {least}, lr > 0, got steps={steps}, rollouts={rollouts}, lr={lr!r}"
        )
    if estimator == "relaxed" and rollouts > 1:
        raise ValueError(f"estimator 'relaxed' draws no masks, all rollouts would be one: got rollouts={rollouts}")
    if prompts_per_step < 1:
        raise ValueError(f"expected prompts_per_step >= 1, got prompts_per_step={prompts_per_step}")
    what, shared = _shared(estimator, rollouts, prompts_per_step)
    if shared < world.size:
        name = "prompts_per_step" if by_gates else "rollouts"
        raise ValueError(f"expected at least one {what} for each of {world.size} ranks, got {name}={shared}")
    if at_once is not None and not 1 <= at_once <= -(-shared // world.size):
        raise ValueError(
            f"expected at_once from 1 to {-(-shared // world.size)}, {shared} {what}s shared by {world.size} "
            f"rank(s), got at_once={at_once}"
        )
    return chosen, steps, rollouts


def _shared(estimator: str, rollouts: int, prompts_per_step: int) -> tuple[str, int]:
    """What ranks share out, and how many of it a step has."""
    return ("prompt", prompts_per_step) if estimator in BY_GATES else ("rollout", rollouts)


def _replay(model: Model, pool: PrefixPool, at_once: int) -> RowStep | None:
    """The step as a CUDA graph, where the model is on a GPU and its rows pack."""
    if model.device.type != "cuda" or any(can.packed for can in able(model, pool.prompts)):
        return None
    lengths = [len(prompt.tokens) - 1 for prompt in pool.prompts]
    return RowStep(model, rows=max(2, at_once), context=max(lengths)) if min(lengths) > 0 else None


def _run(
    model: Model,
    prompts: Sequence[Prefix],
    targets: Sequence[Sequence[int]],
    masks: Bool[Tensor, "rollouts layers heads"],
    means: Float[Tensor, "layers heads head_dim"],
    mean: bool,
    at_once: int,
    world: World,
    replay: RowStep | None,
) -> Float[Tensor, "prompts rollouts"]:
    """Losses of all rollouts: this rank's are run, those of the others received."""
    losses = torch.zeros(0, len(prompts))
    for rows in masks[world.share(len(masks), at_once)].split(at_once):
        # A row by itself would be multiplied by other kernels, which round in another order: it is run twice.
        beside = rows.expand(2, -1, -1) if len(rows) == 1 else rows
        if len(rows):
            if replay is not None and len(beside) == replay.rows:
                found = torch.stack([
                    cross_entropies(replay(prompt, heads=beside, values=means)[None], [target])[0]
                    for prompt, target in zip(prompts, targets, strict=True)
                ])  # fmt: skip
            else:
                found = answer_losses(model, prompts, targets, heads=beside, values=means, mean=mean)
            losses = torch.cat([losses, found[:, : len(rows)].T.cpu()])
    return _told(world, losses, masks, at_once).T


def _run_gates(
    model: Model,
    pool: PrefixPool,
    drawn: Sequence[int],
    targets: Sequence[Sequence[int]],
    gates: Float[Tensor, "prompts rollouts layers heads"],
    means: Float[Tensor, "layers heads head_dim"],
    mean: bool,
    at_once: int,
    world: World,
) -> tuple[Float[Tensor, "prompts rollouts"], Float[Tensor, "layers heads"]]:
    """Losses, and the gradient of their mean with respect to the gates: this rank's prompts are run."""
    rollouts, shape = gates.shape[1], gates.shape[2:]
    found = torch.zeros(0, rollouts + shape.numel())
    mine = world.share(len(drawn), at_once)
    for start in range(mine.start, mine.stop, at_once):
        some = slice(start, min(start + at_once, mine.stop))
        prompts = [pool[index] for index in drawn[some]]
        losses, gradients = gate_gradients(model, prompts, targets[some], gates[some], means, mean)
        found = torch.cat([found, torch.cat([losses, gradients.mean(dim=1).flatten(1)], dim=1)])
    said = _told(world, found, gates, at_once)
    return said[:, :rollouts], said[:, rollouts:].mean(dim=0).view(shape)


def _told(world: World, found: Float[Tensor, "share any"], drawn: Tensor, at_once: int) -> Float[Tensor, "n any"]:
    """What all ranks found, a row each of what was `drawn`; they must have drawn the same."""
    check = torch.full((len(found), 1), zlib.crc32(drawn.numpy().tobytes()), dtype=torch.float64)
    said = world.gather(torch.cat([found.double(), check], dim=1), len(drawn), at_once)
    if said[:, -1].unique().numel() > 1:
        raise RuntimeError("the ranks drew different rollouts: their processors compute a different theta")
    return said[:, :-1].float()


def _held_out(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to search on, and a third of them, 50 at most, to choose by; of fewer than three all for both."""
    count = min(HELD_OUT, len(examples) // 3)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = set(order[:count])
    searched = [example for n, example in enumerate(examples) if n not in kept]
    return searched, [examples[n] for n in order[:count]] or examples


def _choose(
    model: Model,
    candidates: Bool[Tensor, "candidates layers heads"],
    means: Tensor,
    examples: Sequence[Example],
    targets: Sequence[Sequence[int]],
    mean: bool,
    world: World,
) -> tuple[Bool[Tensor, "layers heads"], float]:
    """The candidate with the lowest mean loss on the examples, and that loss."""
    if world.size > 1:
        world.same({"candidates": digest(candidates)})
    # Prompts that share forwards stay together: the bits do not depend on the number of ranks.
    share = world.share(len(examples), AT_ONCE)
    losses = torch.zeros(0, len(candidates))
    if examples[share]:
        prompts = [example.prompt for example in examples[share]]
        losses = answer_losses(model, prompts, targets[share], heads=candidates, values=means, mean=mean)
    losses = world.gather(losses, len(examples), AT_ONCE).mean(dim=0)
    best = int(losses.argmin())
    return candidates[best], losses[best].item()


def _identity(
    model: Model, means: Tensor, prompts: Sequence[Prefix], targets: Sequence[Sequence[int]], settings: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued."""
    digest = hashlib.sha256(means.detach().float().cpu().numpy().tobytes())
    known = [ids[0] for ids in targets] if settings["loss"] == "first_token" else list(targets)
    digest.update(json.dumps([[p.tokens.tolist() for p in prompts], known]).encode())
    for prompt in prompts:
        for pixels in prompt.prompt.inputs.values():
            digest.update(pixels.cpu().numpy().tobytes())
    return dict(settings, model=model.name, shape=model.shape.as_dict(), data=digest.hexdigest()[:16])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("headpatch", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found
