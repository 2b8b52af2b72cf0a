"""What a patched run is scored by: one number a row, from the logits of its last token, or of its answer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from models.reading import as_int
from models.shapes import Float

Metric: TypeAlias = Literal["probability", "log_probability", "logit_difference", "rank", "kl"]
# metric(logits [rows, vocab], target, other, clean [vocab]) -> [rows], of one prompt: target and other are token ids or
# None, clean are the logits of its unpatched run. Of an answer of several tokens: logits [rows, tokens, vocab], and
# target is all of them.
MetricFunction: TypeAlias = Callable[[Tensor, Any, Any, Tensor], Tensor]


def probability(
    logits: Float[Tensor, "rows *tokens vocab"], target: int | Sequence[int], other: Any, clean: Float[Tensor, " vocab"]
) -> Float[Tensor, " rows"]:
    """P(target), from 0 to 1; of several tokens, their product."""
    if isinstance(target, int):
        return _wide(logits).softmax(dim=-1)[:, target]
    return log_probability(logits, target, other, clean).exp()


def log_probability(
    logits: Float[Tensor, "rows *tokens vocab"], target: int | Sequence[int], other: Any, clean: Float[Tensor, " vocab"]
) -> Float[Tensor, " rows"]:
    """The logarithm of P(target), in nats; of several tokens, each after those before it, their sum."""
    log_p = _wide(logits).log_softmax(dim=-1)
    if isinstance(target, int):
        return log_p[:, target]
    return log_p[:, range(len(target)), list(target)].sum(dim=-1)


def logit_difference(
    logits: Float[Tensor, "rows vocab"], target: int, other: int, clean: Float[Tensor, " vocab"]
) -> Float[Tensor, " rows"]:
    """logit(target) - logit(other) = log P(target) / P(other), in nats."""
    logits = _wide(logits)
    return logits[:, target] - logits[:, other]


def rank(
    logits: Float[Tensor, "rows vocab"], target: int, other: int | None, clean: Float[Tensor, " vocab"]
) -> Float[Tensor, " rows"]:
    """How many tokens are likelier than the target: 0 is best. Without a gradient."""
    logits = _wide(logits).detach()
    above = (logits > logits[:, target, None]).sum(dim=-1).to(logits.dtype)
    return above.masked_fill(logits.isnan().any(dim=-1), torch.nan)  # nothing is greater than NaN


def kl(
    logits: Float[Tensor, "rows vocab"], target: int | None, other: int | None, clean: Float[Tensor, " vocab"]
) -> Float[Tensor, " rows"]:
    """KL(clean || patched) = sum_v p_clean(v) log p_clean(v) / p_patched(v), in nats: 0 where nothing changed."""
    before, after = _wide(clean).log_softmax(dim=-1), _wide(logits).log_softmax(dim=-1)
    terms = before.exp() * (before - after)
    return terms.masked_fill(before == -torch.inf, 0).sum(dim=-1)  # 0 log 0 = 0


METRICS: dict[str, MetricFunction] = {
    "probability": probability,
    "log_probability": log_probability,
    "logit_difference": logit_difference,
    "rank": rank,
    "kl": kl,
}


def read_metric(
    metric: Metric | Callable[[Tensor], Tensor],
    targets: Sequence[Any] | None = None,
    others: Sequence[Any] | None = None,
    *,
    prompts: int,
    vocab_size: int,
) -> MetricFunction:
    """The metric as a function of (logits, target, other, clean), checked against what each prompt comes with.

    metric:  a name, or a function of the logits Float[rows, vocab] of one prompt that returns Float[rows]; it is given
             float32 or float64.
    targets: a token, or a list of an answer's tokens, a prompt. "probability", "log_probability", "logit_difference"
             and "rank" (of one token) need them, "kl" does not.
    others:  a second one a prompt, which "logit_difference" subtracts.

    All compute in float32, or in float64 if the logits are. Raises ValueError for an unknown name, for targets that are
    missing, not one a prompt or outside the vocabulary, for a logit difference of an answer with itself, and for the
    rank of several tokens; TypeError for tokens that are not ints. A function of one's own is checked when it is
    called: TypeError or ValueError.

    >>> score = engine.metrics.read_metric("logit_difference", [5], [7], prompts=1, vocab_size=9)
    >>> score(torch.arange(18.0).view(2, 9), 5, 7, torch.zeros(9))
    tensor([-2., -2.])
    """
    if callable(metric):
        return _own(metric)
    if not isinstance(metric, str) or metric not in METRICS:
        raise ValueError(f"metric must be one of {get_args(Metric)} or a function of the logits, got {metric!r}")
    if metric == "kl":
        return kl
    _check_tokens(metric, "targets", targets, prompts, vocab_size)
    if metric == "logit_difference":
        _check_tokens(metric, "others", others, prompts, vocab_size)
        both = zip(targets or (), others or (), strict=True)
        same = [i for i, (one, other) in enumerate(both) if list(_tokens(one)) == list(_tokens(other))]
        if same:
            raise ValueError(f"target and other token are the same for prompts {_few(same)}: their difference is 0")
    if metric == "rank" and (longer := [i for i, one in enumerate(targets or ()) if len(_tokens(one)) > 1]):
        raise ValueError(
            f"'rank' is of one token, the targets of prompts {_few(longer)} have several: give scored='first_token' or "
            "another metric"
        )
    return METRICS[metric]


def check_scores(scores: Float[Tensor, "prompts ..."], what: str, prompts: Sequence[int] | None = None) -> None:
    """Raise ValueError naming the prompts whose scores are NaN or infinite.

    what:    is scored, for the message. prompts: the indices of the scores' prompts; default 0, 1, 2, ...

    >>> engine.metrics.check_scores(torch.tensor([0.5, 0.1]), "probability")
    """
    broken = (~scores.isfinite()).reshape(len(scores), -1).any(dim=1).nonzero().flatten().tolist()
    if broken:
        names = broken if prompts is None else [prompts[i] for i in broken]
        raise ValueError(f"{what} is NaN or infinite for prompts {_few(names)}")


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _own(metric: Callable[[Tensor], Tensor]) -> MetricFunction:
    def score(logits: Tensor, target: int | None, other: int | None, clean: Tensor) -> Tensor:
        scores = metric(_wide(logits))
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            kind = f"a tensor of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"a metric must return a floating-point tensor [rows], got {kind}")
        if scores.shape != logits.shape[:1]:
            raise ValueError(
                f"a metric of logits {list(logits.shape)} must return shape {[len(logits)]}, got {list(scores.shape)}"
            )
        return _wide(scores)

    return score


def _check_tokens(metric: str, name: str, tokens: Sequence[Any] | None, prompts: int, vocab_size: int) -> None:
    if tokens is None:
        raise ValueError(f"metric {metric!r} needs {name}, a token for each of the {prompts} prompts; none were given")
    if len(tokens) != prompts:
        raise ValueError(f"{name} must be one token a prompt: got {len(tokens)} for {prompts} prompts")
    for i, token in ((i, token) for i, some in enumerate(tokens) for token in _tokens(some)):
        if as_int(token) is None:
            raise TypeError(f"{name} must be token ids, got {token!r} for prompt {i}")
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {token} in {name}, of prompt {i}, lies outside the vocabulary of {vocab_size}")


def _tokens(given: Any) -> Sequence[Any]:
    return given if isinstance(given, (list, tuple)) else [given]


def _few(indices: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in indices[:10])
    return f"[{shown}]" if len(indices) <= 10 else f"[{shown}, ...] ({len(indices)} in all)"
