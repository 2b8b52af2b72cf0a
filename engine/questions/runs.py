"""Runs of one prompt, patched at one position and scored, in passes of as many rows as fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from engine.core.budget import Budget
from engine.core.patching import patch
from engine.core.prefix import Prefix
from engine.questions.metrics import log_probability
from engine.questions.scoring import Scoring
from engine.questions.where import Where
from engine.tasks.scoring import with_answer
from models.shapes import Float


@dataclass(frozen=True, eq=False)
class Runs:
    """position: that is patched; of an unpatched run, any. n: which prompt it is, whose targets count."""

    scoring: Scoring
    n: int
    prompt: Prefix
    position: int = -1

    def scores(
        self, clean: Float[Tensor, " vocab"] | None, **patched: Any
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
        """The metric of each row, and its logits at the prompt's last token; differentiable in the values patched in.

        clean: those logits of the unpatched run; None: the first row's. patched: heads and values, as `patch` has them.
        """
        scoring, model = self.scoring, self.prompt.model
        position, answers = self.position % len(self.prompt.tokens), scoring.answers(self.n)
        each = []
        for answer in answers:
            grown = with_answer(model, self.prompt, answer)
            logits = patch(model, grown, positions=position, **patched)
            first = logits if grown.places == 1 else logits[:, 0]
            clean = first[0].detach().clone() if clean is None else clean  # a view would keep those of all rows
            if len(answers) == 1 and len(answer) == 1:
                target, other = (None if ids is None else ids[self.n][0] for ids in (scoring.targets, scoring.others))
                return scoring.function(logits, target, other, clean), first
            log_p = log_probability(logits.view(len(logits), len(answer), -1), answer, None, clean)
            each.append(log_p / len(answer) if scoring.scored == "token_mean" else log_p)
        score = each[0] if len(each) == 1 else each[0] - each[1]
        return (score.exp() if scoring.metric == "probability" else score), first

    def in_passes(self, n_rows: int, budget: Budget, run: Callable[[Runs, slice], None]) -> None:
        """`run(self, some)` for slices of the rows, as many at once as fit. More than one share a prefix."""
        longest = with_answer(self.prompt.model, self.prompt, max(self.scoring.answers(self.n), key=len))
        fit = partial(budget.rows, longest, self.position % len(self.prompt.tokens))
        runs = self

        def part(some: slice) -> None:
            nonlocal runs
            if some != slice(0, n_rows):
                runs = replace(runs, prompt=Where((self.position,)).computed(runs.prompt))
            run(runs, some)

        budget.passes(n_rows, fit, part)
