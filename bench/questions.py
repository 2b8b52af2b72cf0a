"""The questions of the field on the real model, against loops of hooked forwards in the same run.

Pairs are of indirect object identification (Wang et al., arXiv 2211.00593); the metric is the logit difference of the
two names. Of a loop some forwards are timed, drawn from all of its cells: they cost the same; what it takes from the
source run is at hand.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import engine
from bench.timing import interleaved, ratio
from engine import tasks
from engine.progress import track
from models import Model

PAIRS = 20
DRAWN = 150  # of which those of the commonest length are taken
CELLS = 12  # cells of a loop that are timed in a round
QUERIES = 5  # heads whose queries receive
# A change of the transformers model: (module, whether of its output, x -> x).
Hook = tuple[Any, bool, Callable[[Tensor], Tensor]]


class Pairs:
    """IOI pairs of one length, 15 to 20 tokens, and what is asked of them."""

    def __init__(self, model: Model, count: int = PAIRS, seed: int = 0):
        made = tasks.contrast("ioi", model, DRAWN, seed)
        lengths = [len(model.encode(text)) for text in made.prompts]
        length = max(range(15, 21), key=lengths.count)
        made = made.take([n for n, tokens in enumerate(lengths) if tokens == length][:count])
        self.ids = torch.stack([model.encode(text) for text in made.prompts])
        self.source = torch.stack([model.encode(text) for text in made.source])
        both = zip(made.prompts, made.targets, made.others, strict=True)
        self.answers = [
            [tasks.first_token(model, tasks.Example(prompt, answer)) for answer in answers] for prompt, *answers in both
        ]

    def asked(self, which: Sequence[int]) -> dict[str, Any]:
        """Arguments of a verb, for some of the pairs."""
        targets, others = ([self.answers[n][i] for n in which] for i in (0, 1))
        more = dict(targets=targets, others=others, metric="logit_difference", progress=False)
        return dict(prompts=[self.ids[n] for n in which], source=[self.source[n] for n in which]) | more

    def score(self, n: int, logits: Tensor) -> Tensor:
        target, other = self.answers[n]
        return logits[..., target] - logits[..., other]

    def __str__(self) -> str:
        return f"{len(self.ids)} pairs of {self.ids.shape[1]} tokens"


class Plain:
    """The transformers model by plain hooks, a forward a cell: the loop that people write."""

    def __init__(self, model: Model, dtype: torch.dtype | None = None):
        hf, body = model.hf, model.body  # type: ignore[attr-defined]
        names = {id(module): name for name, module in hf.named_modules()}
        self.hf = hf if dtype is None else deepcopy(hf).to(dtype)
        self.blocks, self.outputs = (
            [self.hf.get_submodule(names[id(module)]) for module in modules]
            for modules in (body.blocks, model.projections)  # type: ignore[attr-defined]
        )
        self.width = model.shape.head_dim

    @torch.no_grad()
    def run(self, ids: Tensor, hooks: Sequence[Hook] = ()) -> Tensor:
        """Logits of the last token."""
        handles = [
            module.register_forward_hook(lambda _, __, out, f=function: f(out))
            if after
            else module.register_forward_pre_hook(lambda _, args, f=function: (f(args[0].clone()), *args[1:]))
            for module, after, function in hooks
        ]
        try:
            return self.hf(input_ids=ids[None], logits_to_keep=1, use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()

    def seen(
        self, ids: Tensor, modules: Sequence[Any], after: bool = False, hooks: Sequence[Hook] = ()
    ) -> list[Tensor]:
        """What modules are given, or give, [1, T, width] each."""
        found: list[Tensor] = []

        def see(x: Tensor) -> Tensor:
            found.append(x.clone())
            return x

        self.run(ids, [*hooks, *((module, after, see) for module in modules)])
        return found

    def block(self, ids: Tensor, source: Sequence[Tensor], layer: int, position: int) -> Tensor:
        """resid_pre of a layer at a token, from the source's."""

        def put(x: Tensor) -> Tensor:
            x[0, position] = source[layer][0, position]
            return x

        return self.run(ids, [(self.blocks[layer], False, put)])

    def head(self, source: Sequence[Tensor], layer: int, head: int, tokens: slice = slice(None)) -> Hook:
        """A head's z at some tokens, from the source's."""
        width = slice(head * self.width, (head + 1) * self.width)

        def put(x: Tensor) -> Tensor:
            x[0, tokens, width] = source[layer][0, tokens, width]
            return x

        return self.outputs[layer], False, put

    def held(self, own: Sequence[Tensor], after: int) -> list[Hook]:
        """All heads of later layers, as they were."""

        def put(_: Tensor, layer: int) -> Tensor:
            return own[layer]

        return [(self.outputs[i], False, partial(put, layer=i)) for i in range(after + 1, len(self.outputs))]


def compared(
    ours: Callable[[], object], loops: dict[str, tuple[Callable[[], object], float]], rounds: int
) -> dict[str, Any]:
    """Seconds of ours, and each loop's, so many times what is timed of it, over them."""
    ways: dict[str, Callable[[], object]] = {"ours": ours} | {name: loop for name, (loop, _) in loops.items()}
    seconds = interleaved(ways, rounds, progress=False)
    found: dict[str, Any] = {"ours, seconds": round(statistics.median(seconds["ours"]), 3)}
    for name, (_, times) in loops.items():
        found[f"{name} / ours"] = ratio([times * x for x in seconds[name]], seconds["ours"])
    return found


def apart(got: Tensor, true: Tensor) -> str:
    return f"{(got.double() - true.double()).abs().max().item():.1e}"


def trace(model: Model, rounds: int = 3, count: int = PAIRS) -> dict[str, Any]:
    """Every layer's resid_pre at every token: a hook on the block, and TransformerLens' own function, over ours."""
    pairs, plain, double = Pairs(model, count), Plain(model), Plain(model, torch.float64)
    layers, tokens = model.shape.n_layers, pairs.ids.shape[1]
    cells = [(c // tokens, c % tokens) for c in torch.linspace(0, layers * tokens - 1, CELLS).long().tolist()]
    lens = Lens(model, pairs)

    few = [0, 1]
    sources = {by: [by.seen(pairs.source[n], by.blocks) for n in few] for by in (plain, double)}

    def loop(by: Plain, n: int) -> Tensor:
        return torch.stack([pairs.score(n, by.block(pairs.ids[n], sources[by][n], *cell)) for cell in cells])

    sweep = partial(engine.sweep, model, site="resid_pre", positions="all")
    share = layers * tokens / CELLS
    found = compared(
        partial(sweep, **pairs.asked([0])),
        {
            "hooks": (partial(loop, plain, 0), share),
            "TransformerLens, a pair at a time": (partial(lens.cells, cells, *lens.of([0])), share),
            f"TransformerLens, {count} pairs in a batch": (
                partial(lens.cells, cells, *lens.of(range(count))),
                share / count,
            ),
        },
        rounds,
    )
    ours = sweep(**pairs.asked(few)).patched
    got = torch.stack([ours[:, position, layer] for layer, position in cells], dim=1)
    true = torch.stack([loop(double, n) for n in few])
    counted = layers * tokens * tokens / (tokens + sum((tokens - p) * (layers + 1) / 2 for p in range(tokens)))
    return found | {
        "pairs": str(pairs),
        "cells a pair": layers * tokens,
        "counted products, loop / ours": round(counted, 1),
        "ours, from float64": apart(got, true),
        "hooks, from float64": apart(torch.stack([loop(plain, n) for n in few]), true),
        "TransformerLens, from float64": apart(lens.cells(cells, *lens.of(few)), true),
        "largest": f"{true.abs().max():.1f}",
    }


class Lens:
    """TransformerLens' own patching function, of some cells; a batch of pairs in a forward."""

    def __init__(self, model: Model, pairs: Pairs):
        from models.lens import from_huggingface

        self.bridge, self.pairs = from_huggingface(model.hf).bridge, pairs  # type: ignore[attr-defined]

    @torch.no_grad()
    def of(self, which: Sequence[int]) -> tuple[list[int], Any]:
        """Pairs, and what their sources have."""
        some = list(which)
        _, cache = self.bridge.run_with_cache(self.pairs.source[some], names_filter=lambda name: "resid_pre" in name)
        return some, cache

    @torch.no_grad()
    def cells(self, cells: Sequence[tuple[int, int]], some: list[int], cache: Any) -> Tensor:
        import pandas
        from transformer_lens import patching

        pairs = self.pairs
        return patching.generic_activation_patch(
            self.bridge,
            pairs.ids[some],
            cache,
            lambda logits: torch.stack([pairs.score(n, logits[i, -1]) for i, n in enumerate(some)]),
            patching.layer_pos_patch_setter,
            "resid_pre",
            index_df=pandas.DataFrame(cells, columns=["layer", "pos"]),
            reduce="none",
        ).values.T


def heads(model: Model, rounds: int = 3) -> dict[str, Any]:
    """Every head at all tokens together: a hook on W_O over ours."""
    pairs, plain = Pairs(model, 1), Plain(model)
    layers, n_heads = model.shape.n_layers, model.shape.n_heads
    cells = [(c // n_heads, c % n_heads) for c in torch.linspace(0, layers * n_heads - 1, CELLS).long().tolist()]

    source = plain.seen(pairs.source[0], plain.outputs)

    def loop() -> Tensor:
        scores = [pairs.score(0, plain.run(pairs.ids[0], [plain.head(source, *cell)])) for cell in cells]
        return torch.stack(scores)

    sweep = partial(engine.sweep, model, positions="together", **pairs.asked([0]))
    found = compared(sweep, {"hooks": (loop, layers * n_heads / CELLS)}, rounds)
    ours = sweep().patched[0]
    return found | {
        "pairs": str(pairs),
        "rows": layers * n_heads,
        "counted products, loop / ours": round(2 * layers / (layers + 1), 2),
        "apart": apart(torch.stack([ours[cell] for cell in cells]), loop()),
    }


def paths(model: Model, rounds: int = 3) -> dict[str, Any]:
    """All heads to the logits, and to the queries of five heads, at the last token: two hooked forwards a head."""
    pairs, plain = Pairs(model, 1), Plain(model)
    layers, n_heads, width = model.shape.n_layers, model.shape.n_heads, model.shape.head_dim
    senders = [(c // n_heads, c % n_heads) for c in torch.linspace(0, layers * n_heads - 1, CELLS).long().tolist()]
    late = engine.paths(model, **pairs.asked([0])).top(QUERIES)
    queries = [module.self_attn.q_proj for module in plain.blocks]
    last, ids = slice(-1, None), pairs.ids[0]
    own, source = plain.seen(ids, plain.outputs), plain.seen(pairs.source[0], plain.outputs)

    def loop(receivers: Sequence[tuple[int, int]]) -> Tensor:
        found = []
        for layer, head in senders:
            first = [plain.head(source, layer, head, last), *plain.held(own, layer)]
            if not receivers:
                found.append(pairs.score(0, plain.run(ids, first)))
                continue
            given = plain.seen(ids, queries, after=True, hooks=first)

            def put(x: Tensor, to: int, unit: int, given: list[Tensor] = given) -> Tensor:
                x = x.clone()
                x[0, -1, unit * width : (unit + 1) * width] = given[to][0, -1, unit * width : (unit + 1) * width]
                return x

            second: list[Hook] = [
                (queries[to], True, partial(put, to=to, unit=unit)) for to, unit in receivers if to > layer
            ]
            found.append(pairs.score(0, plain.run(ids, second)))
        return torch.stack(found)

    found: dict[str, Any] = {"pairs": str(pairs), "rows": layers * n_heads}
    for name, receivers in (("logits", []), (f"queries of {QUERIES} heads", late)):
        to: Any = [(*head, "q") for head in receivers] or "logits"
        ask = partial(engine.paths, model, receivers=to, **pairs.asked([0]))
        timed = compared(ask, {"hooks": (partial(loop, receivers), layers * n_heads / CELLS)}, rounds)
        ours = ask().patched[0]
        found |= {f"{name}: {what}": x for what, x in timed.items()}
        found[f"{name}: apart"] = apart(torch.stack([ours[cell] for cell in senders]), loop(receivers))
    return found


def curve(model: Model, rounds: int = 3) -> dict[str, Any]:
    """The faithfulness of ten sizes as rows of a pass, against as many naive forwards."""
    pairs = Pairs(model, 1)
    ranking = engine.attribute(model, positions="together", **pairs.asked([0]))
    ask = partial(engine.circuits.faithfulness, model, ranking=ranking, **pairs.asked([0]))
    found = ask()
    new = engine.capture(model, [pairs.source[0]], list(range(pairs.ids.shape[1])))
    at = list(range(pairs.ids.shape[1]))

    def naive() -> Tensor:
        rows = []
        for count in found.counts:
            mask = torch.ones(model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
            for head in ranking.top(count) if count else []:
                mask[head] = False
            rows.append(engine.naive.patch(model, pairs.ids[0], engine.Patch("z", mask, new, at))[0])
        return pairs.score(0, torch.stack(rows))

    timed = compared(ask, {"naive": (naive, 1.0)}, rounds)
    return {"pairs": str(pairs), "sizes": len(found.sizes), **timed, "apart": apart(found.metric[0], naive())}


def areas(model: Model, seeds: Sequence[int] = (0, 1, 2), count: int = PAIRS, steps: int = 5) -> list[dict[str, Any]]:
    """CPR and CMD of rankings of heads, and of edges, of some pairs, on others of the same task."""
    found = []
    for seed in track(list(seeds), f"circuits of {count} pairs, by seed", show=True):
        train, test = Pairs(model, count, seed), Pairs(model, count, seed + 100)
        given, asked = train.asked(range(count)), test.asked(range(count))
        shape = (1, model.shape.n_layers, model.shape.n_heads)
        draw = torch.Generator().manual_seed(seed)
        random = torch.rand(shape, generator=draw, dtype=torch.float64)
        heads = {
            "exact sweep": engine.sweep(model, positions="together", **given),
            "attribution": engine.attribute(model, positions="together", **given),
            f"attribution, {steps} steps": engine.attribute(model, positions="together", steps=steps, **given),
            "random": engine.Effects(random, torch.zeros(1, dtype=torch.float64)),
        }
        edges = {
            "EAP": engine.attribute(model, edges=True, **given),
            f"EAP-IG, {steps} steps": engine.attribute(model, edges=True, steps=steps, **given),
        }
        scores = edges["EAP"].clean[:, None] + torch.rand(edges["EAP"].patched.shape[1], generator=draw).double()
        edges["random"] = replace(edges["EAP"], patched=scores)
        for items, rankings in (("heads", heads), ("edges", edges)):
            for name, ranking in rankings.items():
                for by in ("absolute", "negative"):
                    one = engine.circuits.faithfulness(model, ranking=ranking, by=by, **asked)
                    found.append(
                        {"items": items, "ranking": name, "by": by, "seed": seed, "cpr": one.cpr, "cmd": one.cmd}
                    )
    return found


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Means over seeds, and the least and the most of a seed."""
    shown = Table("items", "ranking", "first", "CPR", "CMD")
    for key in dict.fromkeys((one["items"], one["ranking"], one["by"]) for one in found):
        mine = [one for one in found if (one["items"], one["ranking"], one["by"]) == key]
        cells = []
        for name in ("cpr", "cmd"):
            each = [one[name] for one in mine]
            cells.append(f"{statistics.mean(each):.2f} ({min(each):.2f} to {max(each):.2f})")
        shown.add_row(*key, *cells)
    return shown
