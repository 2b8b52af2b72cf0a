"""Runs of one prompt, patched and scored, in passes of as many rows as fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from engine.core.budget import Budget
from engine.core.patches import One
from engine.core.patching import patch
from engine.core.prefix import Prefix
from engine.questions.metrics import log_probability
from engine.questions.scoring import Scoring
from engine.questions.where import computed
from engine.tasks.scoring import with_answer
from models.shapes import Float


@dataclass(frozen=True, eq=False)
class Runs:
    """n: which prompt it is, whose targets count. first: the first token that is patched; of an unpatched run, any."""

    scoring: Scoring
    n: int
    prompt: Prefix
    first: int = -1

    def scores(
        self, clean: Float[Tensor, " vocab"] | None, patches: Sequence[One] = ()
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
        """The metric of each row, and its logits at the prompt's last token; differentiable in the values patched in.

        clean: those logits of the unpatched run; None: the first row's. patches: their positions counted from the
        start of the prompt, behind which an answer may stand.
        """
        scoring, model = self.scoring, self.prompt.model
        answers = scoring.answers(self.n)
        each = []
        for answer in answers:
            grown = with_answer(model, self.prompt, answer)
            # Unpatched rows, too, begin within the prompt: logits are read from its last token on.
            begin = self.first % len(self.prompt.tokens)
            logits = patch(model, grown, patches) if patches else patch(model, grown, positions=begin)
            first = logits if grown.places == 1 else logits[:, 0]
            clean = first[0].detach().clone() if clean is None else clean  # a view would keep those of all rows
            if len(answers) == 1 and len(answer) == 1:
                target, other = (None if ids is None else ids[self.n][0] for ids in (scoring.targets, scoring.others))
                return scoring.function(logits, target, other, clean), first
            log_p = log_probability(logits.view(len(logits), len(answer), -1), answer, None, clean)
            each.append(log_p / len(answer) if scoring.scored == "token_mean" else log_p)
        score = each[0] if len(each) == 1 else each[0] - each[1]
        return (score.exp() if scoring.metric == "probability" else score), first

    def in_passes(self, n_rows: int, budget: Budget, run: Callable[[Runs, slice], None], row_bytes: int = 0) -> None:
        """`run(self, some)` for slices of the rows, as many at once as fit. More than one share a prefix.

        row_bytes: that the patches of a row take.
        """
        longest = with_answer(self.prompt.model, self.prompt, max(self.scoring.answers(self.n), key=len))
        fit = partial(budget.rows, longest, self.first % len(self.prompt.tokens), row_bytes)
        runs = self

        def part(some: slice) -> None:
            nonlocal runs
            if some != slice(0, n_rows):
                runs = replace(runs, prompt=computed(runs.prompt, self.first % len(self.prompt.tokens)))
            run(runs, some)

        budget.passes(n_rows, fit, part)
