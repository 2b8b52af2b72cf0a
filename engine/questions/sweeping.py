"""Every head patched alone, or group by group, on many prompts: what does each do to the answer?

    clean[n]       = metric(model(prompt n))
    patched[n, u]  = metric(model(prompt n), z of unit u := values)

The prefix of a prompt is computed once; a row comes in at its first patched layer, which is half the work of running
each through all layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor

from engine.artifacts import can_begin, load_tensors, save_tensors
from engine.core.activations import capture
from engine.core.budget import Budget
from engine.core.checking import able
from engine.core.patches import Mode, Positions, read_patch, read_values
from engine.core.patching import patch
from engine.core.prefix import Prefix, as_prefix, compute, patched_positions, shareable
from engine.distributed import ALONE, World, digest, identity
from engine.progress import track
from engine.questions.effects import Effects
from engine.questions.metrics import Metric, MetricFunction, log_probability, read_metric
from engine.tasks.scoring import Answer, Example, ExampleLike, Scored, as_example, scored_tokens, with_answer
from models import Model, PromptLike
from models.reading import as_int, read_list, read_seed, read_tensor
from models.shapes import Bool, Float, Integer

Ablation: TypeAlias = Literal["zero", "mean", "resample"]
Groups: TypeAlias = Mapping[str, Tensor | np.ndarray] | Literal["heads", "layers"]
Answers: TypeAlias = Sequence[Answer] | Tensor | np.ndarray | None
BY_ANSWER = ("probability", "log_probability", "logit_difference")  # metrics of all tokens of an answer


def sweep(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    values: Tensor | np.ndarray | Ablation | None = None,
    *,
    source: Sequence[PromptLike] | None = None,
    metric: Metric | Callable[[Tensor], Tensor] = "probability",
    targets: Answers = None,
    others: Answers = None,
    scored: Scored = "answer",
    groups: Groups = "heads",
    positions: Positions = -1,
    mode: Mode = "replace",
    memory: Integer | None = None,
    seed: Integer = 0,
    checkpoint: str | Path | None = None,
    world: World = ALONE,
    progress: bool = True,
) -> Effects:
    """The effect of patching each head alone, on every prompt: L x H rows a prompt, for a few forwards' work.

    prompts:   what is patched; an `Example`, or a plain (prompt, answer) pair, brings its target.
    values:    Float[L, H, D] for all prompts, or Float[N, L, H, D], one set a prompt; or an ablation: "zero"; "mean" of
               the prompts' own activations; "resample", those of another of the prompts, drawn by `seed`.
    source:    in place of values, a prompt for each prompt: its activations, at the same position, are patched in, and
               its own metric is the result's reference. Clean prompts with corrupted sources: noising; the other
               way round: denoising.
    metric:    "probability" (of the target; default), "log_probability", "logit_difference" (target less other),
               "rank", "kl" (to the unpatched run), or a function of logits Float[rows, vocab].
    targets:   an answer a prompt: text as it follows the prompt, a token id, or a list of them.
    others:    likewise, the second answer of "logit_difference": log P(target) - log P(other).
    scored:    of an answer of several tokens: "answer" (default): all of it, each token after those before it, the
               prompt patched at the same positions; still one pass. "token_mean": log-probabilities a token, and
               probabilities' geometric mean. "first_token". "kl" and functions of your own see the first token's.
    groups:    "heads" (default), "layers", or masks by name (`engine.groups` makes some): what is patched together.
    positions: one, or a list, of which each is patched by itself. Default: the last token.
    mode:      "replace" the heads' output, or "add" the values, then a tensor, to it.
    memory:    bytes that rows may take; default an eighth of what is free. Fewer rows are tried when it does run out.
    checkpoint: a file, written after every prompt; a sweep that was stopped goes on from it, with the same results. It
               is removed at the end. A metric of one's own is known by its being one, not by what it does.
    world:     ranks that share out the prompts (`engine.distributed.joined`).

    Returns `Effects`. Raises ValueError, TypeError or IndexError before anything runs for what does not fit: a metric
    without targets, values of another shape, sources whose length differs where positions other than the last must
    match, a checkpoint of another sweep; after it, for a metric that is NaN, naming the prompts.

    Source: causal indirect effects, Function Vectors (arXiv 2310.15213), section 2.2; activation patching, How to use
    and interpret activation patching (arXiv 2404.15255).

    >>> effects = engine.sweep(model, [Example("Q: hot\\nA:", " cold")], "zero", progress=False)
    >>> effects.patched.shape == (1, model.shape.n_layers, model.shape.n_heads)
    True
    """
    asked = read(model, prompts, values, source, metric, targets, others, positions, mode, seed, scored)
    masks, names = read_groups(model, groups)
    budget = Budget(model, memory)
    known = dict(asked.known, mode=mode, groups=digest(list(names or ()), masks))
    world.same(dict(known, **(identity(model) if world.size > 1 else {})))
    mine = world.share(len(asked.prompts))
    clean = torch.full((mine.stop - mine.start,), torch.nan, dtype=torch.float64)
    patched = clean.new_full((len(clean), len(asked.at), len(masks)), torch.nan)
    found = {"patched": patched, "clean": clean} | ({"reference": clean.clone()} if source is not None else {})
    part = dict(known, prompts=[mine.start, mine.stop])
    mark = None if checkpoint is None else Path(f"{checkpoint}.{world.rank}" if world.size > 1 else checkpoint)
    done = _resume(mark, part, found)
    able(model, asked.prompts, layered=True)

    for i in track(range(done, len(clean)), f"sweep of {len(masks)} units", progress and world.rank == 0):
        n = mine.start + i
        prompt, (new, source_run) = asked.prompts[n], asked.patched_in(n)
        if len(asked.at) > 1:
            prompt = computed(prompt, asked.at)
        for p, position in enumerate(asked.at):
            scores, unpatched = _scores(asked, n, prompt, masks, new[p], position, mode, budget)
            clean[i], patched[i, p] = scores[0], scores[1:]
        if source_run is not None:
            found["reference"][i] = asked.scores(n, source_run, unpatched)[0]
        if mark is not None:
            save_tensors(mark, {name: scores[: i + 1] for name, scores in found.items()}, part)

    found = {name: world.gather(scores, len(asked.prompts)) for name, scores in found.items()}
    named = None if names is None else dict(zip(names, masks, strict=True))
    effects = asked.effects(**found, groups=named, metadata=known)
    if mark is not None:
        mark.unlink(missing_ok=True)
    return effects


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of every prompt, checked: what is patched in, where, and what scores the answer.

    sources: a prompt for each prompt, or none, where `values` says what is patched in.
    at:      positions, patched one at a time. several: they were given as a list.
    metric:  its name. function: the metric itself, of tokens that `targets` and `others` have for each prompt: those of
             an answer that count.
    """

    model: Model
    prompts: list[Prefix]
    sources: list[Prefix]
    values: Tensor | Ablation | None
    at: tuple[int, ...]
    several: bool
    metric: str
    function: MetricFunction
    targets: list[list[int]] | None
    others: list[list[int]] | None
    seed: int
    scored: Scored = "answer"

    @torch.no_grad()
    def patched_in(self, n: int) -> tuple[Float[Tensor, "positions layers heads head_dim"], Prefix | None]:
        """What is patched into prompt n at each position; and the prompt it came from, if a source."""
        if self.sources:
            whole = computed(self.sources[n], self.at)
            return activations(whole, self.at), whole
        if isinstance(self.values, Tensor):
            values = self.values[n] if self.values.ndim == 4 else self.values
            return values.expand(len(self.at), *values.shape), None
        if self.values == "resample":
            return activations(self.prompts[self.partners[n]], self.at), None
        shape = self.model.shape
        zeros = torch.zeros(len(self.at), shape.n_layers, shape.n_heads, shape.head_dim)
        return zeros if self.values == "zero" else self.means, None

    @cached_property
    def means(self) -> Float[Tensor, "positions layers heads head_dim"]:
        """Of the prompts' own activations; summed in float64."""
        each = (activations(prompt, self.at).double() for prompt in self.prompts)
        total = reduce(torch.add, each)
        return (total / len(self.prompts)).to(torch.promote_types(self.model.dtype, torch.float32))

    @cached_property
    def partners(self) -> dict[int, int]:
        """For each prompt another, whose activations are taken: steps along a cycle through all of them."""
        random, size = torch.Generator().manual_seed(self.seed), len(self.prompts)
        order, turn = torch.randperm(size, generator=random), torch.randint(1, size, (), generator=random)
        return dict(zip(order.tolist(), order.roll(int(turn)).tolist(), strict=True))

    def answers(self, n: int) -> list[list[int]]:
        """The answers that prompt n is continued with, each a pass of its own: one, or none but its first token; two
        where the logits of one token do not tell the difference between them.
        """
        if self.targets is None or self.metric not in BY_ANSWER:
            return [[0]]
        both = [self.targets[n], *([self.others[n]] if self.others and self.metric == "logit_difference" else [])]
        return both if len(both) == 2 and max(map(len, both)) > 1 else both[:1]

    def scores(
        self, n: int, prompt: Prefix, clean: Float[Tensor, " vocab"] | None, position: int = -1, **patched: Any
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
        """The metric of rows of a prompt, and their logits at its last token; differentiable in the values patched in.

        n:     whose targets count. clean: those logits of its unpatched run; None: the first row's.
        """
        position, answers = position % len(prompt.tokens), self.answers(n)
        each = []
        for answer in answers:
            grown = with_answer(self.model, prompt, answer)
            logits = patch(self.model, grown, positions=position, **patched)
            first = logits if grown.places == 1 else logits[:, 0]
            clean = first[0].detach().clone() if clean is None else clean  # a view would keep those of all rows
            if len(answers) == 1 and len(answer) == 1:
                target, other = (None if ids is None else ids[n][0] for ids in (self.targets, self.others))
                return self.function(logits, target, other, clean), first
            log_p = log_probability(logits.view(len(logits), len(answer), -1), answer, None, clean)
            each.append(log_p / len(answer) if self.scored == "token_mean" else log_p)
        score = each[0] if len(each) == 1 else each[0] - each[1]
        return (score.exp() if self.metric == "probability" else score), first

    @property
    def known(self) -> dict[str, Any]:
        """What tells it from others, as JSON: in the result's metadata, in checkpoints, compared by ranks."""
        every = [*self.prompts, *self.sources]
        pixels = [x for prompt in every for x in prompt.prompt.inputs.values()]
        given = isinstance(self.values, Tensor)
        values = f"given, {digest(self.values)}" if given else "source" if self.values is None else self.values
        return dict(
            model=self.model.name,
            metric=self.metric,
            values=f"resample, seed {self.seed}" if values == "resample" else values,
            positions=list(self.at),
            data=digest([prompt.tokens.tolist() for prompt in every], self.targets, self.others, *pixels),
        )

    def effects(
        self,
        patched: Float[Tensor, "prompts positions units"],
        clean: Float[Tensor, " prompts"],
        reference: Float[Tensor, " prompts"] | None = None,
        groups: Mapping[str, Bool[Tensor, "layers heads"]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Effects:
        """The result of all prompts."""
        shape = (self.model.shape.n_layers, self.model.shape.n_heads) if groups is None else (len(groups),)
        patched = patched.unflatten(2, shape)
        return Effects(
            patched if self.several else patched[:, 0],
            clean,
            reference,
            groups=groups,
            positions=list(self.at) if self.several else None,
            metric=self.metric,
            metadata={**self.known, **(metadata or {}), "prompts": len(self.prompts)},
        )


def read(
    model: Model,
    prompts: Sequence[PromptLike | ExampleLike],
    values: Tensor | np.ndarray | Ablation | None,
    source: Sequence[PromptLike] | None,
    metric: Metric | Callable[[Tensor], Tensor],
    targets: Answers,
    others: Answers,
    positions: Positions,
    mode: Mode = "replace",
    seed: Integer = 0,
    scored: Scored = "answer",
) -> Asked:
    """The arguments of `sweep`, checked; nothing has run. Raises ValueError, TypeError or IndexError."""
    where, seed = read_patch(model, None, None, positions, mode), read_seed(seed)
    values = cast("Tensor | Ablation | None", read_tensor(values, "values"))
    given, targets = _read_prompts(prompts, targets)
    ready = [as_prefix(model, prompt) for prompt in given]
    if scored not in get_args(Scored):
        raise ValueError(f"scored must be one of {list(get_args(Scored))}, got {scored!r}")
    target_ids = read_answers(model, given, targets, "targets", scored)
    other_ids = read_answers(model, given, others, "others", scored)
    function = read_metric(metric, target_ids, other_ids, prompts=len(ready), vocab_size=model.shape.vocab_size)
    for n, one in enumerate(ready):
        patched_positions(where, one)
        for ids in (target_ids, other_ids) if metric in BY_ANSWER else ():
            with_answer(model, one, ids[n] if ids else [0])
    sources = _read_source(model, ready, source, where.positions)
    if (source is None) == (values is None):
        raise ValueError("expected either values or source, what is patched in")
    if mode == "add" and not isinstance(values, Tensor):
        raise ValueError(f"mode 'add' adds a tensor of values, got {'a source' if values is None else repr(values)}")
    if isinstance(values, Tensor):
        if values.ndim == 4 and len(values) != len(ready):
            raise ValueError(f"values must be one set, or one for each of {len(ready)} prompts: got {len(values)}")
        for some in values if values.ndim == 4 else [values]:
            read_values(model, some, where.heads)
    elif values is not None and values not in get_args(Ablation):
        raise ValueError(f"values must be a tensor or one of {get_args(Ablation)}, got {values!r:.80}")
    if values == "resample" and len(ready) < 2:
        raise ValueError("'resample' takes activations of another prompt: give two at least")
    name = metric if isinstance(metric, str) else "custom"
    several = as_int(positions) is None
    at = where.positions
    return Asked(model, ready, sources, values, at, several, name, function, target_ids, other_ids, seed, scored)


def _read_prompts(prompts: Sequence[PromptLike | ExampleLike], targets: Answers) -> tuple[list[PromptLike], Answers]:
    if isinstance(prompts, (str, Example)) or not isinstance(prompts, Sequence) or not len(prompts):
        raise ValueError(f"expected a list of prompts, got {prompts!r:.80}")
    examples = [example for one in prompts if (example := as_example(one)) is not None]
    if examples:
        if len(examples) < len(prompts) or targets is not None:
            raise ValueError("prompts must be all Examples, which bring their targets, or none of them")
        return [one.prompt for one in examples], [one.answer for one in examples]
    return list(prompts), targets  # type: ignore[arg-type]


def read_answers(
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


def read_groups(model: Model, groups: Groups) -> tuple[Bool[Tensor, "units layers heads"], list[str] | None]:
    """The masks, in order, and their names; single heads have none."""
    shape = (model.shape.n_layers, model.shape.n_heads)
    if isinstance(groups, str) and groups == "heads":
        return torch.eye(shape[0] * shape[1], dtype=torch.bool).unflatten(1, shape), None
    if isinstance(groups, str) and groups == "layers":
        from engine.questions.groups import layers

        groups = layers(model)
    if not isinstance(groups, Mapping):
        raise ValueError(f"groups must be 'heads', 'layers' or masks by name, got {groups!r:.80}")
    masks = {name: read_tensor(mask, f"group {name!r}") for name, mask in groups.items()}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"group {name!r} must be a bool mask {list(shape)}, got {mask!r:.80}")
    if not groups:
        raise ValueError("no groups were given")
    return torch.stack(list(masks.values())).cpu(), list(masks)


def _read_source(
    model: Model, prompts: Sequence[Prefix], source: Sequence[PromptLike] | None, at: Sequence[int]
) -> list[Prefix]:
    if source is None:
        return []
    if isinstance(source, str) or not isinstance(source, Sequence) or len(source) != len(prompts):
        raise ValueError(f"source must be a prompt for each of {len(prompts)} prompts, got {source!r:.80}")
    sources = [as_prefix(model, one) for one in source]
    for n, (one, other) in enumerate(zip(prompts, sources, strict=True)):
        if len(one.tokens) != len(other.tokens) and any(position != -1 for position in at):
            raise ValueError(
                f"prompt {n} has {len(one.tokens)} tokens, its source {len(other.tokens)}: "
                f"at positions {list(at)} they must match (at -1 they need not)"
            )
    return sources


def activations(prompt: Prefix, at: Sequence[int]) -> Float[Tensor, "positions layers heads head_dim"]:
    return capture(prompt.model, [prompt], at)[0]  # type: ignore[list-item]


def computed(prompt: Prefix, at: Sequence[int]) -> Prefix:
    """The prompt computed up to the last of these positions, for passes that follow; as it is if nothing is shared."""
    n_tokens = len(prompt.tokens)
    last = max(position % n_tokens for position in at)
    return compute([prompt], [shareable(prompt, last)])[0]


@torch.no_grad()
def _scores(
    asked: Asked,
    n: int,
    prompt: Prefix,
    masks: Bool[Tensor, "units layers heads"],
    values: Float[Tensor, "layers heads head_dim"],
    position: int,
    mode: Mode,
    budget: Budget,
) -> tuple[Float[Tensor, " unpatched_and_units"], Float[Tensor, " vocab"]]:
    """The metric of the unpatched run and, after it, of every unit; and the unpatched run's logits."""
    rows = torch.cat([torch.zeros_like(masks[:1]), masks])
    scores = torch.empty(len(rows), dtype=torch.float64)
    clean: Tensor | None = None

    def run(prompt: Prefix, some: slice) -> None:
        nonlocal clean
        given = dict(heads=rows[some], values=values, mode=mode)
        found, logits = asked.scores(n, prompt, clean if some.start else None, position, **given)
        if not some.start:
            clean = logits[0].clone()  # a view would keep those of all rows
        scores[some] = found.double().cpu()

    in_passes(asked, n, budget, len(rows), prompt, position, run)
    return scores, clean  # type: ignore[return-value]


def in_passes(
    asked: Asked,
    n: int,
    budget: Budget,
    n_rows: int,
    prompt: Prefix,
    position: int,
    run: Callable[[Prefix, slice], None],
) -> None:
    """`run(prompt, some)` for slices of the rows of prompt n, as many at once as fit. More than one share a prefix."""
    longest = with_answer(asked.model, prompt, max(asked.answers(n), key=len))
    fit = partial(budget.rows, longest, position % len(prompt.tokens))

    def part(some: slice) -> None:
        nonlocal prompt
        if some != slice(0, n_rows):
            prompt = computed(prompt, [position])
        run(prompt, some)

    budget.passes(n_rows, fit, part)


def _resume(mark: Path | None, part: dict[str, Any], found: Mapping[str, Tensor]) -> int:
    """How many prompts a checkpoint brings, read into the tensors."""
    if mark is None or can_begin(mark):
        return 0
    tensors, saved = load_tensors(mark, ("clean",))
    expected = json.loads(json.dumps(part))
    if differing := sorted(key for key in expected.keys() | saved.keys() if saved.get(key) != expected.get(key)):
        raise ValueError(f"checkpoint {mark} is of another sweep: {', '.join(differing)} differ")
    done = len(tensors["clean"])
    for name, scores in load_tensors(mark, tuple(found))[0].items():
        found[name][:done] = scores
    return done
