"""Contrasts: prompts, each with a corrupted partner of as many tokens, and two answers between which it decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from string import Formatter
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from engine.core.patching import patch
from engine.core.reading import check_model
from engine.tasks.scoring import AT_ONCE, Example, first_token
from engine.tasks.wording import DRAWN, Drawn
from models import Model
from models.reading import as_int, read_int, read_list, read_seed
from models.shapes import Float, Integer

ContrastName: TypeAlias = Literal["ioi", "ioi_flipped", "greater_than", "agreement", "facts"]
CONTRASTS: tuple[str, ...] = get_args(ContrastName)


@dataclass(frozen=True)
class Contrast:
    """N prompts and their corrupted partners, aligned token by token for one model's tokenizer: `contrast` makes them.

    name:      of the task.
    prompts:   N texts, the clean runs: the target is right and the other is wrong.
    source:    N texts, the corrupted runs: as many tokens as the prompt, the same but in the words that are replaced.
    targets:   N answers as text that follows the prompt (" Mary"), one token each.
    others:    N second answers, likewise. Logit difference: of the target, less that of the other.
    positions: N tokens by name, counted from the beginning, the same in prompt and source; of words of several tokens
               the last. "end" is the prompt's last token.

    Noising: the prompts are patched with activations of the sources; denoising is the other way round.

    >>> pairs = engine.tasks.contrast("agreement", model, count=1)
    >>> given = dict(metric="logit_difference", targets=pairs.targets, others=pairs.others)
    >>> more = dict(site="resid_pre", positions=pairs.positions, progress=False)
    >>> effects = engine.sweep(model, pairs.prompts, source=pairs.source, **given, **more)
    >>> effects.positions
    ['subject', 'attractor', 'end']
    """

    name: str
    prompts: list[str]
    source: list[str]
    targets: list[str]
    others: list[str]
    positions: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, which: Sequence[Integer] | np.ndarray | Tensor) -> Contrast:
        """The pairs at these indices, or where a mask is true. Raises IndexError for an index that there is not;
        ValueError for a mask of another length, or what is neither.

        >>> engine.tasks.contrast("ioi", model, count=8).take([0, 3]).positions["end"].__len__()
        2
        """
        given = read_list(which)
        if mask := bool(given) and all(isinstance(one, bool) for one in given):
            at = [n for n, kept in enumerate(given) if kept]
        else:
            at = [n for one in given if (n := as_int(one)) is not None]
        if len(given) != (len(self) if mask else len(at)):
            raise ValueError(f"expected indices, or a mask of all {len(self)} pairs, got {which!r:.80}")
        lists: dict[str, Any] = {field: [getattr(self, field)[n] for n in at] for field in _PARALLEL}
        return replace(
            self, **lists, positions={name: [places[n] for n in at] for name, places in self.positions.items()}
        )

    @torch.no_grad()
    def differences(self, model: Model) -> Float[Tensor, "2 pairs"]:
        """Logit differences of the clean and of the corrupted runs, on the CPU, in float32: can the model do the task?

        >>> clean, corrupted = engine.tasks.contrast("agreement", model, count=8).differences(model)
        >>> bool(clean.mean() > 0 > corrupted.mean())
        True
        """
        answers = [
            [first_token(model, Example(prompt, answer)) for answer in pair]
            for prompt, *pair in zip(self.prompts, self.targets, self.others, strict=True)
        ]
        return torch.stack([_differences(model, texts, answers) for texts in (self.prompts, self.source)])


_PARALLEL = ("prompts", "source", "targets", "others")


class _Aligned(NamedTuple):
    texts: tuple[str, str, str, str]  # prompt, source, target, other
    positions: dict[str, int]


def contrast(
    name: ContrastName, model: Model, count: Integer = 20, seed: Integer = 0, same_length: bool = False
) -> Contrast:
    """Contrastive pairs of prompts for causal tracing, path patching and circuits, checked for the model's tokenizer.

    name:        "ioi": "When Mary and John got to the station, John handed the book to" -> " Mary", not " John"; ABBA
                 and BABA. The partner names three others, once each (p_ABC). Positions: IO, S1, S1+1, S2.
                 "ioi_flipped": the partner says Mary the second time, so that " John" is right.
                 "greater_than": "The war lasted from the year 1732 to the year 17" -> "4", not "2", where digits are
                 tokens: the next decade or the last. Where the end of a year is one token (GPT-2): "42", not "22". The
                 partner's year is 1701, after which both are right. Positions: year, its last token; decade.
                 "agreement": "The keys near the cabinet" -> " are", not " is"; both numbers, three verbs, a noun of the
                 other number between. The partner's subject is "key". Positions: subject, attractor.
                 "facts": "The capital of France is the city of" -> " Paris", not the partner's capital; countries whose
                 names have equally many tokens. Position: subject, its last token.
                 All have the position "end". Words that are not one token are left out where one is needed.
    count, seed: so many pairs, no prompt twice; the same for a seed.
    same_length: all prompts have equally many tokens (those that first are as many as asked).

    Whether a model can do a task is another question: `Contrast.differences`. SmolLM2-135M prefers the target in nine
    pairs of ten or more, of every task, on the mean of three seeds: docs/tasks.md.

    Raises ValueError for an unknown task, a model without a tokenizer, a count below 1, more pairs than there are, or a
    tokenizer that has not the words, or cuts them where they would not align.

    Source: IOI, arXiv 2211.00593, section 2; greater-than, arXiv 2305.00586; agreement, arXiv 1611.01368, section 2,
    and arXiv 2106.06087; facts and the last token of the subject, arXiv 2202.05262, section 2. The wording is our own.

    >>> pairs = engine.tasks.contrast("ioi", model, count=4)
    >>> all(model.encode(a).shape == model.encode(b).shape for a, b in zip(pairs.prompts, pairs.source))
    True
    """
    check_model(model)
    if not isinstance(name, str) or name not in DRAWN:
        raise ValueError(f"no contrast {name!r}: expected one of {', '.join(CONTRASTS)}")
    count, draw = read_int(count, "count"), Random(read_seed(seed))
    if model.tokenizer is None:
        raise ValueError(
            f"{model.name} was wrapped without a tokenizer: contrasts are text, give wrap(..., tokenizer=)"
        )
    kept: dict[int, list[_Aligned]] = {}
    for drawn in DRAWN[name](draw, partial(_added, model)):
        if (pair := _aligned(model, drawn)) is None:
            continue
        some = kept.setdefault(pair.positions["end"] if same_length else 0, [])
        some.append(pair)
        if len(some) == count:
            lists = zip(_PARALLEL, map(list, zip(*(pair.texts for pair in some), strict=True)), strict=True)
            positions = {place: [pair.positions[place] for pair in some] for place in pair.positions}
            return Contrast(name, **dict(lists), positions=positions)
    most = max(map(len, kept.values()), default=0)
    length = " of one length" if same_length else ""
    raise ValueError(f"{name} has {most} pairs{length} that {model.name}'s tokenizer aligns, got count={count}")


def _ids(model: Model, text: str) -> list[int]:
    return model.encode(text).tolist()


def _added(model: Model, text: str, more: str) -> int:
    found = _tokens(model, [text, more])
    return len(found[1]) if found else 0


def _aligned(model: Model, drawn: Drawn) -> _Aligned | None:
    """None where a token is of two parts, a part is not as long as its partner's, or an answer is not one token."""
    clean, source = (_parts(drawn.template, words) for words in (drawn.clean, drawn.source))
    texts = [[text for _, text in parts] for parts in (clean, source)]
    runs = [_tokens(model, [*parts, answer]) for parts in texts for answer in (drawn.target, drawn.other)]
    if any(not run or len(run[-1]) != 1 for run in runs):
        return None
    positions: dict[str, int] = {}
    end = -1
    for n, (name, _) in enumerate(clean):
        if len({len(run[n]) if name else tuple(run[n]) for run in runs}) > 1:
            return None
        end += len(runs[0][n])
        positions |= {name: end} if name else {}
    if "S1" in positions:  # where the previous token heads of arXiv 2211.00593 write
        positions["S1+1"] = positions["S1"] + 1
    prompt, partner = map("".join, texts)
    return _Aligned((prompt, partner, drawn.target, drawn.other), positions | {"end": end})


def _parts(template: str, words: dict[str, str]) -> list[tuple[str, str]]:
    """A text by its parts: what fields stand for, with their names, and what is between them, without."""
    found = []
    for between, field, *_ in Formatter().parse(template):
        found += [("", between)] * bool(between) + ([(field, words[field])] if field else [])
    return found


def _tokens(model: Model, parts: Sequence[str]) -> list[list[int]]:
    """The tokens of each part of a text; of none where a token is of two parts."""
    whole, found, begin = _ids(model, "".join(parts)), [], 0
    for n in range(len(parts)):
        until = _ids(model, "".join(parts[: n + 1]))
        if whole[: len(until)] != until or len(until) <= begin:
            return []
        found.append(until[begin:])
        begin = len(until)
    return found


def _differences(model: Model, texts: Sequence[str], answers: Sequence[Sequence[int]]) -> Float[Tensor, " pairs"]:
    found = []
    for start in range(0, len(texts), AT_ONCE):
        logits = patch(model, list(texts[start : start + AT_ONCE]))[:, 0].float().cpu()
        target, other = torch.tensor(answers[start : start + AT_ONCE]).unbind(dim=1)
        rows = torch.arange(len(logits))
        found.append(logits[rows, target] - logits[rows, other])
    return torch.cat(found)
