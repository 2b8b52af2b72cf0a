"""What is asked of every provider, how its answer is compared with the oracle, and the least that must be computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.limits import Sizes, Work
from bench.providers.provider import Provider
from engine import naive
from engine.methods import mtv
from models import Model, Shape
from models.shapes import Bool, Float, Int

NEW_TOKENS = 4  # of a patched answer
PATCHED = 0.27  # share of heads that a rollout patches: sigmoid(-1), where the search begins


@dataclass(frozen=True)
class Question:
    """The same for every provider.

    heads:   masks, on the CPU, where a search draws them.
    prompts: of the case that takes means; each is a row.
    run:     the rows that are run, of all: a loop runs a few.
    """

    ids: Int[Tensor, " tokens"]
    heads: Bool[Tensor, "rows layers heads"]
    values: Float[Tensor, "layers heads head_dim"]
    prompts: Int[Tensor, "rows tokens"]
    run: Int[Tensor, " run"]

    @property
    def few(self) -> Bool[Tensor, "run layers heads"]:
        return self.heads[self.run]

    @property
    def target(self) -> int:
        """A token whose loss is asked for."""
        return int(self.ids[0])


def ask(shape: Shape, tokens: int, heads: Tensor, device: torch.device) -> Question:
    """Random ids and values, the same at every call."""
    random = torch.Generator().manual_seed(0)
    rows = len(heads)
    prompts = torch.randint(shape.vocab_size, (rows, tokens), generator=random)
    values = 0.3 * torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    return Question(prompts[0].to(device), heads, values.to(device), prompts.to(device), torch.arange(rows))


class Case:
    """Rows of one prompt, each with its own random heads patched at the last token."""

    name = ""
    title = ""
    by_row = True  # an answer has a row for each that was run

    def rows(self, shape: Shape, rows: int) -> int:
        """Of the case, given those of the grid."""
        return rows

    def heads(self, shape: Shape, rows: int) -> Bool[Tensor, "rows layers heads"]:
        random = torch.Generator().manual_seed(1)
        return torch.rand(rows, shape.n_layers, shape.n_heads, generator=random) < PATCHED

    def prepare(self, provider: Provider, question: Question) -> Callable[[], Tensor]:
        """What is timed, all that may be kept between calls being at hand."""
        return lambda: provider.patch(question.ids, question.few, question.values)

    def apart(self, model: Model, question: Question, answer: Tensor, oracle: Tensor) -> float:
        """How far an answer is from the oracle's, as a share of it: of the worst row."""
        if answer.shape != oracle.shape:
            raise ValueError(f"it answers {list(answer.shape)}, expected {list(oracle.shape)}")
        got, want = (x.double().reshape(len(x), -1) for x in (answer, oracle))
        return ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()

    def passes(self, sizes: Sizes, heads: Bool[Tensor, "rows layers heads"], tokens: int) -> list[Work]:
        """The least work, forward by forward."""
        return [sizes.fresh(len(heads), tokens, depth(heads))]


class Rollouts(Case):
    """Nothing is computed beforehand."""

    name = "rollouts"
    title = "rollouts, fresh prefix"


class Reused(Case):
    """The same with the prompt computed beforehand. Loops cannot keep it, and compute it for every row."""

    name = "reused"
    title = "rollouts, prefix reused"

    def prepare(self, provider: Provider, question: Question) -> Callable[[], Tensor]:
        prefix = provider.prefill(question.ids)
        return lambda: provider.patch(prefix, question.few, question.values)

    def passes(self, sizes: Sizes, heads: Tensor, tokens: int) -> list[Work]:
        return [sizes.row_step(len(heads), tokens, depth(heads))]


class Sweep(Case):
    """Every head patched alone: layers x heads rows of one prompt, whatever rows the grid asks for."""

    name = "sweep"
    title = "head sweep, every head alone"

    def rows(self, shape: Shape, rows: int) -> int:
        return shape.n_layers * shape.n_heads

    def heads(self, shape: Shape, rows: int) -> Tensor:
        return torch.eye(rows, dtype=torch.bool).view(rows, shape.n_layers, shape.n_heads)


class Means(Case):
    """Mean activations of the last token over many prompts; a row is a prompt."""

    name = "means"
    title = "mean activations, a prompt a row"
    by_row = False

    def prepare(self, provider: Provider, question: Question) -> Callable[[], Tensor]:
        prompts = question.prompts[question.run.to(question.prompts.device)]
        return lambda: provider.means(prompts)

    def passes(self, sizes: Sizes, heads: Tensor, tokens: int) -> list[Work]:
        return [Work(len(heads) * sizes.prefill(tokens).flops)]


class SearchStep(Case):
    """One step of MTV-EXTRACT: masks drawn, losses of all rollouts, Adam's update; the prompt has come before."""

    name = "search"
    title = "one search step (draw, rollouts, losses, update)"

    def prepare(self, provider: Provider, question: Question) -> Callable[[], Tensor]:
        prefix = provider.prefill(question.ids)

        def losses(masks: Tensor) -> Tensor:
            return provider.losses(prefix, masks, question.values, question.target)

        return lambda: step(question, losses)

    def passes(self, sizes: Sizes, heads: Tensor, tokens: int) -> list[Work]:
        return [sizes.row_step(len(heads), tokens, depth(heads))]


class Generate(Case):
    """Greedy answers of a patched model, a row an answer, 4 tokens each."""

    name = "generate"
    title = f"patched generation of {NEW_TOKENS} tokens"

    def prepare(self, provider: Provider, question: Question) -> Callable[[], Tensor]:
        return lambda: provider.generate(question.ids, question.few, question.values, NEW_TOKENS)

    def apart(self, model: Model, question: Question, answer: Tensor, oracle: Tensor) -> float:
        """Largest regret: how far below the oracle's best logit, given the tokens before it, a token was chosen.

        Two right ways may choose differently where two tokens are all but equally likely.
        """
        if answer.shape != oracle.shape:
            raise ValueError(f"it answers {list(answer.shape)}, expected {list(oracle.shape)}")
        worst, last = 0.0, len(question.ids) - 1
        for mask, got, want in zip(question.few, answer, oracle, strict=True):
            if got.equal(want):
                continue
            for n, token in enumerate(got):
                ids, positions = torch.cat([question.ids, got[:n]]), range(last, last + n + 1)
                logits = naive.patch(model, ids, heads=mask[None], values=question.values, positions=positions)[0]
                worst = max(worst, ((logits.max() - logits[token]) / logits.abs().max()).item())
        return worst

    def passes(self, sizes: Sizes, heads: Tensor, tokens: int) -> list[Work]:
        rows, share = len(heads), depth(heads)
        later = [sizes.row_step(rows, tokens + n, share) for n in range(1, NEW_TOKENS)]
        return [sizes.fresh(rows, tokens, share), *later]


def depth(heads: Bool[Tensor, "rows layers heads"]) -> float:
    """Share of the blocks that rows go through from the first that patches them on; before it all rows are alike."""
    patched = heads.any(dim=2).cummax(dim=1).values  # [R, L], from the first on
    return patched.double().mean().item()


def step(question: Question, losses: Callable[[Tensor], Tensor]) -> Float[Tensor, " run"]:
    """One step of the search from its start. A loop's few losses stand for those of all rows in the update."""
    shape = (question.heads.shape[1], question.heads.shape[2])
    search = mtv.Search(mtv.PRESETS["reference"], shape, 0.1, 0)
    masks = search.draw(len(question.heads))
    found = losses(masks[question.run])
    with torch.enable_grad():
        search.update(masks, found.repeat(-(-len(masks) // len(found)))[: len(masks)])
    return found


def draw_and_update(question: Question) -> Any:
    """What a step costs besides its losses: it is not multiplied when a loop's few rows are scaled to all."""
    step(question, lambda masks: torch.rand(len(masks), generator=torch.Generator().manual_seed(0)))


CASES: dict[str, Case] = {
    case.name: case for case in (Rollouts(), Reused(), Sweep(), Means(), SearchStep(), Generate())
}
