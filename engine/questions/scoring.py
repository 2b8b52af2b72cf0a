"""What scores a run: a metric, of one token or of all tokens of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

import numpy as np
from torch import Tensor

from engine.core.prefix import Prefix
from engine.questions.metrics import Metric, MetricFunction, read_metric
from engine.tasks.scoring import Answer, Example, Scored, scored_tokens, with_answer
from models import Model, PromptLike
from models.reading import as_int, read_list, read_tensor

Answers: TypeAlias = Sequence[Answer] | Tensor | np.ndarray | None
BY_ANSWER = ("probability", "log_probability", "logit_difference")  # metrics of all tokens of an answer


@dataclass(frozen=True, eq=False)
class Scoring:
    """What scores the runs of every prompt.

    metric:  its name. function: the metric itself.
    targets: of each prompt, the tokens of its answer that count. others: those of a second answer.
    scored:  how several tokens count: all of them together, or as their mean.
    """

    metric: str
    function: MetricFunction
    targets: list[list[int]] | None
    others: list[list[int]] | None
    scored: Scored

    def answers(self, n: int) -> list[list[int]]:
        """The answers that prompt n is continued with, each a pass of its own: one, or none but its first token; two
        where the logits of one token do not tell the difference between them.
        """
        if self.targets is None or self.metric not in BY_ANSWER:
            return [[0]]
        both = [self.targets[n], *([self.others[n]] if self.others and self.metric == "logit_difference" else [])]
        return both if len(both) == 2 and max(map(len, both)) > 1 else both[:1]

    def check(self, prompts: Sequence[Prefix]) -> None:
        """Raises ValueError for an answer that does not fit behind its prompt."""
        counted = (self.targets, self.others) if self.metric in BY_ANSWER else ()
        for answers in filter(None, counted):
            for prompt, answer in zip(prompts, answers, strict=True):
                with_answer(prompt.model, prompt, answer)


def read_scoring(
    model: Model,
    prompts: Sequence[PromptLike],
    metric: Metric | Callable[[Tensor], Tensor],
    targets: Answers,
    others: Answers,
    scored: Scored,
) -> Scoring:
    """Raises ValueError or TypeError for a metric that is unknown, or answers that do not go with it.

    prompts: as they were given: an answer that is text is split off theirs.
    """
    if scored not in get_args(Scored):
        raise ValueError(f"scored must be one of {list(get_args(Scored))}, got {scored!r}")
    target_ids = _read_answers(model, prompts, targets, "targets", scored)
    other_ids = _read_answers(model, prompts, others, "others", scored)
    function = read_metric(metric, target_ids, other_ids, prompts=len(prompts), vocab_size=model.shape.vocab_size)
    return Scoring(metric if isinstance(metric, str) else "custom", function, target_ids, other_ids, scored)


def _read_answers(
    model: Model, prompts: Sequence[PromptLike], answers: Answers, what: str, scored: str
) -> list[list[int]] | None:
    """The tokens that count of each prompt's answer."""
    if answers is None:
        return None
    answers = read_tensor(answers, what)
    answers = answers.tolist() if isinstance(answers, Tensor) else answers
    if isinstance(answers, str) or not isinstance(answers, Sequence) or len(answers) != len(prompts):
        raise ValueError(f"{what} must be an answer for each of {len(prompts)} prompts, got {answers!r:.80}")
    for n, answer in enumerate(answers):
        if not isinstance(answer, str) and None in map(as_int, read_list(answer)):
            raise TypeError(f"{what} must be text or token ids, got {answer!r} for prompt {n}")
    return [scored_tokens(model, Example(*pair), scored) for pair in zip(prompts, answers, strict=True)]
