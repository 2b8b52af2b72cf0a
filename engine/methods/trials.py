"""What masks and gates are tried on, and by whom: examples of a task, and the ranks that share out a step's trials."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from engine.core.checking import able
from engine.core.prefix import Prefix, PrefixPool
from engine.core.rowstep import RowStep
from engine.distributed import World, weights_of
from engine.methods.estimators import gate_gradients
from engine.methods.options import Options
from engine.tasks.scoring import (
    Example,
    ExampleLike,
    answer_losses,
    cross_entropies,
    read_examples,
    scored_tokens,
    with_answer,
)
from models import Model
from models.shapes import Bool, Float

HELD_OUT = 50  # examples, at most, that choose among what a search finds


@dataclass(frozen=True, eq=False)
class Trials:
    """Examples that heads are tried on, carrying the means.

    pool: their prompts. targets: the tokens of their answers that count.
    """

    model: Model
    examples: list[Example]
    pool: PrefixPool
    targets: list[list[int]]
    means: Float[Tensor, "layers heads head_dim"]
    options: Options

    def losses(
        self,
        prompts: Sequence[Prefix],
        targets: Sequence[Sequence[int]],
        masks: Bool[Tensor, "rows layers heads"],
        values: Float[Tensor, "rows layers heads head_dim"] | None = None,
    ) -> Float[Tensor, "prompts rows"]:
        """Of some of them, in nats; with values a row in place of the means, where given."""
        carried = self.means if values is None else values
        return answer_losses(self.model, prompts, targets, heads=masks, values=carried, mean=self.mean)

    @property
    def mean(self) -> bool:
        """Whether a loss is the mean over an answer's tokens, and not their sum."""
        return self.options.loss == "token_mean"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued."""
        model, prompts = self.model, self.pool.prompts
        targets = [ids[0] for ids in self.targets] if self.options.loss == "first_token" else self.targets
        data = hashlib.sha256(self.means.detach().float().cpu().numpy().tobytes())
        data.update(json.dumps([[prompt.tokens.tolist() for prompt in prompts], targets]).encode())
        for prompt in prompts:
            for pixels in prompt.prompt.inputs.values():
                data.update(pixels.cpu().flatten().view(torch.uint8).numpy().tobytes())
        known = dict(model=model.name, shape=model.shape.as_dict(), weights=weights_of(model))
        return dict(self.options.settings, **known, data=data.hexdigest()[:16])

    def best(self, losses: Float[Tensor, "prompts candidates"]) -> tuple[int, float]:
        """The candidate of the lowest mean loss on all examples, and that loss. Raises ValueError as `check_finite`."""
        check_finite(losses, range(len(losses)), self.examples, "validation")
        means = losses.mean(dim=0)
        return int(means.argmin()), means.min().item()


def check_finite(
    losses: Float[Tensor, "prompts ..."], drawn: Sequence[int], examples: Sequence[Example], when: str
) -> None:
    """Raises ValueError for losses that are not finite: by NaN nothing can be chosen."""
    for index, finite in zip(drawn, losses.isfinite().reshape(len(losses), -1).all(dim=1).tolist(), strict=True):
        if not finite:
            raise ValueError(f"{when}: the loss of example {index} ({examples[index].prompt!r:.60}) is not finite")


def read_trials(model: Model, examples: list[Example], means: Tensor, options: Options) -> Trials:
    """Raises ValueError for examples that cannot be run; none is."""
    targets = [scored_tokens(model, example, options.loss) for example in examples]
    pool = PrefixPool(model, [example.prompt for example in examples])
    for prompt, target in zip(pool.prompts, targets, strict=True):
        with_answer(model, prompt, target)
    return Trials(model, examples, pool, targets, means, options)


def read_held_out(
    examples: Sequence[ExampleLike], validation: Sequence[ExampleLike] | None, seed: int, chooses: bool = True
) -> tuple[list[Example], list[Example]]:
    """Examples to search on, and to choose by: by default a third of them, 50 at most; of fewer than three all for
    both. Where there is nothing to choose, what is found is measured on the first.
    """
    given = read_examples(examples)
    if validation:
        return given, read_examples(validation, "validation examples")
    if not chooses:
        return given, given[:HELD_OUT]
    count = min(HELD_OUT, len(given) // 3)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = set(order[:count])
    return [example for n, example in enumerate(given) if n not in kept], [given[n] for n in order[:count]] or given


@dataclass(frozen=True, eq=False)
class Shares:
    """The trials of a step shared out: each rank runs its own, `at_once` together, and is told of the others'."""

    trials: Trials
    world: World
    at_once: int

    def by_rollouts(
        self,
        drawn: Sequence[int],
        masks: Bool[Tensor, "rollouts layers heads"],
        values: Float[Tensor, "rollouts layers heads head_dim"] | None = None,
    ) -> Float[Tensor, "prompts rollouts"]:
        """Losses of all rollouts, with values of their own if any, on the examples drawn; ranks share the rollouts."""
        prompts, targets = [self.trials.pool[i] for i in drawn], [self.trials.targets[i] for i in drawn]
        losses = torch.zeros(0, len(prompts))
        for some in self._mine(len(masks)):
            rows = masks[some]
            # A row by itself would be multiplied by other kernels, which round in another order: it is run twice.
            twice = len(rows) == 1
            beside = rows.expand(2, -1, -1) if twice else rows
            carried = None if values is None else values[some].expand(2, -1, -1, -1) if twice else values[some]
            if self.replay is not None and len(beside) == self.replay.rows:
                shown = self.trials.means if carried is None else carried
                found = torch.stack([
                    cross_entropies(self.replay(prompt, heads=beside, values=shown)[None], [target])[0]
                    for prompt, target in zip(prompts, targets, strict=True)
                ])  # fmt: skip
            else:
                found = self.trials.losses(prompts, targets, beside, carried)
            losses = torch.cat([losses, found[:, : len(rows)].T.cpu()])
        return self._told(losses, masks).T

    def by_gates(
        self, drawn: Sequence[int], gates: Float[Tensor, "prompts rollouts layers heads"]
    ) -> tuple[Float[Tensor, "prompts rollouts"], Float[Tensor, "layers heads"]]:
        """Losses, and the gradient of their mean with respect to the gates; ranks share the prompts."""
        trials, rollouts, shape = self.trials, gates.shape[1], gates.shape[2:]
        found = torch.zeros(0, rollouts + shape.numel())
        for some in self._mine(len(drawn)):
            prompts, targets = [trials.pool[i] for i in drawn[some]], [trials.targets[i] for i in drawn[some]]
            losses, slopes = gate_gradients(trials.model, prompts, targets, gates[some], trials.means, trials.mean)
            found = torch.cat([found, torch.cat([losses, slopes.mean(dim=1).flatten(1)], dim=1)])
        said = self._told(found, gates)
        return said[:, :rollouts], said[:, rollouts:].mean(dim=0).view(shape)

    @cached_property
    def replay(self) -> RowStep | None:
        """The step as a CUDA graph, where the model is on a GPU, its rows pack, and first tokens are scored."""
        model, prompts = self.trials.model, self.trials.pool.prompts
        if model.device.type != "cuda" or self.trials.options.loss != "first_token":
            return None
        lengths = [len(prompt.tokens) - 1 for prompt in prompts]
        if any(can.packed for can in able(model, prompts)) or not min(lengths):
            return None
        return RowStep(model, rows=max(2, self.at_once), context=max(lengths))

    def _mine(self, n: int) -> Iterator[slice]:
        """What this rank runs of `n`, at once each."""
        mine = self.world.share(n, self.at_once)
        for start in range(mine.start, mine.stop, self.at_once):
            yield slice(start, min(start + self.at_once, mine.stop))

    def _told(self, found: Float[Tensor, "share any"], drawn: Tensor) -> Float[Tensor, "n any"]:
        """What all ranks found, a row each of what was `drawn`; they must have drawn the same."""
        check = torch.full((len(found), 1), zlib.crc32(drawn.numpy().tobytes()), dtype=torch.float64)
        said = self.world.gather(torch.cat([found.double(), check], dim=1), len(drawn), self.at_once)
        if said[:, -1].unique().numel() > 1:
            raise RuntimeError("the ranks drew different rollouts: their processors compute a different theta")
        return said[:, :-1].float()
