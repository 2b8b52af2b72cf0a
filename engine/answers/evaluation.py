"""How good the answers of a patched model are, over held-out examples; and, apart from that, what a query costs."""

from __future__ import annotations

import re
import statistics
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.answers.generation import NEW_TOKENS, generate
from engine.answers.steps import Patched, read_steps
from engine.core.patches import Heads, One, Values
from engine.core.patching import patch
from engine.core.prefix import as_prefix
from engine.distributed import ALONE, World, digest, identity
from engine.progress import track
from engine.tasks import vqa
from engine.tasks.scoring import Example, ExampleLike, check_examples, first_token_hits, read_examples
from models import Model
from models.reading import read_int
from models.shapes import Integer

By: TypeAlias = Literal["exact", "normalised", "vqa", "first_token"]
# Of one's own: of the text of an answer and its example, a score from 0 to 1.
Scorer: TypeAlias = Callable[[str, Example], float]
TOGETHER = 64  # examples that are asked together


@dataclass(frozen=True)
class Score:
    """The mean of `scores`, one of each query, and its 95% interval: Wilson's of hits, else bootstrap over queries.

    by: how answers are scored.

    >>> engine.Score("zero-shot", "exact", (1.0, 0.0), 0.1, 0.9).accuracy
    0.5
    """

    name: str
    by: str
    scores: tuple[float, ...]
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def queries(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Cost:
    """tokens: of a prompt, mean. seconds: from a prompt's text to the first token of its answer, median."""

    tokens: float
    seconds: float


def exact(answer: str, example: Example) -> float:
    """1 if the answer is the example's, to the letter, but for space around it; else 0.

    >>> engine.evaluation.exact(" cold ", Example("Q: hot\\nA:", " cold"))
    1.0
    """
    return float(answer.strip() == str(example.answer).strip())


def normalised(answer: str, example: Example) -> float:
    """As `exact`, but for case, accents, punctuation and articles; of what is nothing else, as `exact`.

    >>> engine.evaluation.normalised("The Bogotá.", Example("Q: Colombia\\nA:", " Bogota"))
    1.0
    """
    given, wanted = (_plain(text) for text in (answer, str(example.answer)))
    return float(given == wanted) if given and wanted else exact(answer, example)


def _plain(text: str) -> list[str]:
    letters = unicodedata.normalize("NFKD", text.lower())
    letters = re.sub("[\u0300-\u036f]", "", letters)  # accents; vowel signs of other scripts are letters
    letters = re.sub(r"(?<!\S)[-\u2212](?=\d)", "\0", letters)  # a sign
    said = (one if one == "\0" or one.isalnum() or unicodedata.category(one)[0] == "M" else " " for one in letters)
    return [word for word in "".join(said).split() if word not in vqa.ARTICLES]


SCORERS: dict[str, Scorer] = {"exact": exact, "normalised": normalised}


def evaluate(
    model: Model,
    name: str,
    examples: Sequence[ExampleLike],
    patches: One | Sequence[One] | None = None,
    *,
    heads: Heads = None,
    values: Values = None,
    by: By | Scorer = "exact",
    answers: Sequence[Sequence[str]] | None = None,
    patched: Patched = "prompt",
    max_new_tokens: Integer = NEW_TOKENS,
    stop: str | Sequence[str] | None = "\n",
    progress: bool = False,
    world: World = ALONE,
) -> Score:
    """Ask all examples, patched if patches, or heads, are given (one row), and score what the model answers.

    by:      "exact" (default): the whole string, but for space around it; "normalised": but for case, accents,
             punctuation and articles; "vqa": the VQA accuracy, of its first line; "first_token": the likeliest first
             token, nothing is generated; or a function of the answer's text and its `Example`, from 0 to 1.
    answers: of several annotators, a list of texts an example, for "vqa"; default the example's own alone.
    patched, max_new_tokens, stop: as for `engine.generate`; an answer ends with its line by default.
    world:   the ranks (`engine.distributed.joined`) that share out the examples; default this process alone.

    Raises ValueError for no examples, answers that are no text where text is scored, or a function that does not give
    a number from 0 to 1; as `engine.generate` for the rest; LostRankError if a rank is lost.

    >>> engine.evaluate(model, "zero-shot", [Example("Q: hot\\nA:", " cold")]).queries
    1
    """
    steps = read_steps(model, patches, heads, values, "replace", patched)
    if steps.n_rows > 1:
        raise ValueError(f"a score is of one row of heads, got {steps.n_rows}")
    examples = read_examples(examples)
    lengths = check_examples(model, examples)
    scorer = _read_scorer(by, examples, answers)
    what = by if isinstance(by, str) else getattr(by, "__name__", "custom")
    if world.size > 1:
        patch_of = digest(*(part for change in steps.patch.each for part in (change.site, change.units, change.values)))
        world.same(identity(model) | {"name": name, "by": what, "lengths": lengths, "patch": patch_of})
    given: dict[str, Any] = dict(patches=patches, heads=heads, values=values)
    share = world.share(len(examples), TOGETHER)
    mine: list[float] = []
    for start in track(range(share.start, share.stop, TOGETHER), name, progress and world.rank == 0):
        some = list(range(start, min(start + TOGETHER, share.stop)))
        if scorer is None:
            mine += first_token_hits(model, [examples[n] for n in some], **given)[:, 0].double().tolist()
            continue
        prompts = [examples[n].prompt for n in some]
        how: dict[str, Any] = dict(patched=patched, max_new_tokens=max_new_tokens, stop=stop)
        mine += map(scorer, some, generate(model, prompts, **how, **given))
    scores = world.gather(torch.tensor(mine, dtype=torch.float64), len(examples), TOGETHER).tolist()
    return Score(name, what, tuple(scores), *interval(scores))


def cost(
    model: Model,
    examples: Sequence[ExampleLike],
    *,
    heads: Heads = None,
    values: Values = None,
    queries: Integer = 20,
) -> Cost:
    """What a query costs, asked one at a time, of the first `queries` examples; tokens are those of all.

    >>> engine.cost(model, [Example("Q: hot\\nA:", " cold")]).tokens
    6.0
    """
    examples, queries = read_examples(examples), read_int(queries, "queries")
    lengths = check_examples(model, examples)
    seconds = []
    with torch.no_grad():
        for example in (examples[0], *examples[:queries]):  # the first twice: it warms up
            started = time.perf_counter()
            patch(model, as_prefix(model, example.prompt), heads=heads, values=values).argmax(dim=-1).tolist()
            seconds.append(time.perf_counter() - started)
    return Cost(statistics.fmean(lengths), statistics.median(seconds[1:]))


def _read_scorer(
    by: By | Scorer, examples: Sequence[Example], answers: Sequence[Sequence[str]] | None
) -> Callable[[int, str], float] | None:
    """A function of an example's number and the text; None where no text is scored."""
    lists = answers is not None and all(each and not isinstance(each, str) for each in answers)
    if answers is not None and (by != "vqa" or len(answers) != len(examples) or not lists):
        raise ValueError(f"answers are of by='vqa', one list for each of {len(examples)} examples, got {answers!r:.80}")
    if by == "first_token":
        return None
    if not callable(by) and by not in ("vqa", *SCORERS):
        known = ("vqa", "first_token", *SCORERS)
        raise ValueError(f"by must be one of {sorted(known)}, or a function of text and example, got {by!r}")
    if not callable(by) and (odd := [one for one in examples if not isinstance(one.answer, str)]):
        raise ValueError(f"by={by!r} compares text: got the answer {odd[0].answer!r}; give text, or by='first_token'")
    function: Any = SCORERS.get(by, by) if isinstance(by, str) else by

    def score(n: int, text: str) -> float:
        if by == "vqa":
            return vqa.accuracy(vqa.first_line(text), answers[n] if answers else [str(examples[n].answer).strip()])
        found = function(text, examples[n])
        if isinstance(found, (np.generic, Tensor)) and found.ndim == 0:
            found = found.item()
        if not isinstance(found, (int, float)) or not 0 <= found <= 1:
            raise ValueError(f"a scorer must give a number from 0 to 1, got {found!r} for the answer {text!r:.80}")
        return float(found)

    return score


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean."""
    if set(scores) <= {0.0, 1.0}:
        return wilson(int(sum(scores)), len(scores))
    from scipy.stats import bootstrap

    if len(set(scores)) == 1:
        return scores[0], scores[0]
    ends = bootstrap((list(scores),), statistics.fmean, vectorized=False, method="percentile", rng=0, n_resamples=2000)
    return float(ends.confidence_interval.low), float(ends.confidence_interval.high)


def wilson(hits: int, queries: int) -> tuple[float, float]:
    """Wilson's 95% interval of an accuracy of so many hits among queries.

    >>> low, high = engine.evaluation.wilson(45, 100)
    >>> f"{low:.2f} to {high:.2f}"
    '0.36 to 0.55'
    """
    from scipy.stats import binomtest

    found = binomtest(hits, queries).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
