"""Prompts beside sources of the same length, and what scores their runs by one token: what is asked of edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.core.prefix import Prefix, as_prefix
from engine.distributed import digest
from engine.questions.asked import read_prompts
from engine.questions.effects import Effects
from engine.questions.metrics import Metric
from engine.questions.scoring import Answers, Scoring, read_scoring
from engine.tasks.scoring import ExampleLike, Scored
from models import Model, PromptLike
from models.shapes import Float


@dataclass(frozen=True, eq=False)
class Pairs:
    """prompts: whose edges are asked about. sources: for each, the prompt whose activations edges are given."""

    prompts: list[Prefix]
    sources: list[Prefix]
    scoring: Scoring

    def scores(
        self, n: int, logits: Float[Tensor, "rows vocab"], clean: Float[Tensor, " vocab"]
    ) -> Float[Tensor, " rows"]:
        """The metric of runs of prompt n; clean: logits of the unpatched one."""
        scoring = self.scoring
        target, other = (None if ids is None else ids[n][0] for ids in (scoring.targets, scoring.others))
        return scoring.function(logits, target, other, clean)

    def effects(
        self,
        edges: Sequence[str],
        patched: Float[Tensor, "prompts edges"],
        clean: Float[Tensor, " prompts"],
        reference: Float[Tensor, " prompts"],
        metadata: Mapping[str, Any],
    ) -> Effects:
        """The result of all prompts."""
        known = {**self.known, **metadata}
        return Effects(patched, clean, reference, groups=edges, metric=self.scoring.metric, metadata=known)

    @property
    def known(self) -> dict[str, Any]:
        """What tells it from others, as JSON."""
        every = [*self.prompts, *self.sources]
        pixels = [x for prompt in every for x in prompt.prompt.inputs.values()]
        tokens = [prompt.tokens.tolist() for prompt in every]
        return dict(
            model=self.prompts[0].model.name,
            metric=self.scoring.metric,
            values="source",
            data=digest(tokens, self.scoring.targets, self.scoring.others, *pixels),
            prompts=len(self.prompts),
        )


def read_pairs(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    source: Sequence[PromptLike] | None,
    metric: Metric | Callable[[Tensor], Tensor],
    targets: Answers,
    others: Answers,
    scored: Scored,
) -> Pairs:
    """Raises ValueError or TypeError for prompts, sources or answers that are none, or do not fit each other."""
    given, ready, targets = read_prompts(model, prompts, targets)
    if isinstance(source, str) or not isinstance(source, Sequence) or len(source) != len(ready):
        raise ValueError(f"source must be a prompt for each of {len(ready)} prompts, got {source!r:.80}")
    sources = [
        _read_source(one, other, f"prompt {n}") for n, (one, other) in enumerate(zip(ready, source, strict=True))
    ]
    scoring = read_scoring(model, given, metric, targets, others, scored)
    if several := [n for n in range(len(ready)) if max(map(len, scoring.answers(n))) > 1]:
        raise ValueError(
            f"edges are scored by one token, the answers of prompts {several[:10]} have more: give scored='first_token'"
        )
    return Pairs(ready, sources, scoring)


def read_pair(model: Model, prompt: PromptLike, source: PromptLike) -> tuple[Prefix, Prefix]:
    """One of each. Raises ValueError for prompts of different lengths."""
    one = as_prefix(model, prompt)
    return one, _read_source(one, source, "the prompt")


def _read_source(prompt: Prefix, source: PromptLike, name: str) -> Prefix:
    other = as_prefix(prompt.model, source)
    if len(prompt.tokens) != len(other.tokens):
        raise ValueError(
            f"{name} has {len(prompt.tokens)} tokens, its source {len(other.tokens)}: "
            "edges are patched at all tokens, so that both must have as many"
        )
    return other
