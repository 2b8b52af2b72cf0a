"""The experiments of Multimodal Task Vectors (arXiv 2406.15334), each a function of a `Setting`."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from engine.core.patching import patch
from engine.experiments.methods import methods
from engine.experiments.setting import AnyTask, Record, Setting, Way, brings_pair
from engine.experiments.vectors import function_vector, visual_vector
from engine.tasks import Example

COUNTS = (1, 4, 16, 64, 100, 256, 500)  # of examples behind the means, Figure 1 of the appendix
FOUR = 4  # shots of the single prompt of Table 1b
MiB = 2**20


def main(s: Setting) -> list[Record]:
    """Many-shot means, then MTV, against zero-shot, k-shot prompts and random heads (section 4, Table 1)."""
    return _main(s, ())


def _main(s: Setting, more: Sequence[Way]) -> list[Record]:
    base, vector = s.asked(0), s.vector()
    ways = [
        Way(base),
        Way(f"{base} + MTV", vector.mask, vector.values),
        *more,
        *s.random_heads(vector, f"{base} + random heads"),
    ]
    zero_shot, *patched = s.ask(s.queries(0), ways)
    return [zero_shot, *_few_shot(s), *patched]


def _few_shot(s: Setting) -> list[Record]:
    shots = s.options.shots
    return s.ask(s.queries(shots), [Way(f"{s.asked(shots)} ICL")]) if shots else []


def baselines(s: Setting) -> list[Record]:
    """VTV and function vectors beside it (Table 3b; appendix B.2, B.3).

    VTV: means and heads from one-shot prompts, ten iterations each. FV: means of the many-shot prompts, heads ranked on
    prompts whose demonstrations' answers are permuted; added after the layer that is best on validation questions,
    where the paper takes layer 20.
    """
    base, visual = s.asked(0), visual_vector(s)
    visual.save(s.path("vtv"))
    records = _main(s, [Way(f"{base} + VTV", visual.mask, visual.values)])

    function = function_vector(s, s.vector().values)
    function.metadata.update(task=s.task.name, seed=s.seed)
    function.save(s.path("fv"))
    *before, chance = records
    return [*before, *s.ask(s.queries(0), [Way(f"{base} + FV")], function.after(function.metadata["layer"])), chance]


def one_shot(s: Setting) -> list[Record]:
    """MTV on top of one-shot prompts; and its extreme, the means of one single four-shot prompt (Table 1b)."""
    base, one, four = s.asked(0), s.asked(s.one), s.asked(FOUR)
    vector = s.vector("one-shot", shots=s.one)
    records = s.ask(
        s.queries(s.one),
        [
            Way(one),
            Way(f"{one} + MTV", vector.mask, vector.values),
            *s.random_heads(vector, f"{one} + random heads"),
        ],
    )
    single = s.vector("four-shot-once", [s.task.few_shot(s.split.train, FOUR, 1, s.seed)[0].prompt])
    ways = [
        Way(f"{base} + MTV of one {FOUR}-shot prompt", single.mask, single.values),
        *s.random_heads(single, f"{base} + random heads, one {FOUR}-shot prompt"),
    ]
    if s.one:  # else the one-shot prompts are these
        ways.insert(0, Way(base))
    return [*records, *s.ask(s.queries(FOUR), [Way(f"{four} ICL")]), *s.ask(s.queries(0), ways)]


def transfer(s: Setting) -> list[Record]:
    """Heads found on another task with the means of this one, against its own heads and random ones (Table 1a)."""
    base, own = s.asked(0), s.vector()
    ways = [Way(base), Way(f"{base} + own heads", own.mask, own.values)]
    for task in s.tasks:
        if task is not s.task:
            ways.append(Way(f"{base} + heads of {task.name}", replace(s, task=task).vector().mask, own.values))
    return s.ask(s.queries(0), [*ways, *s.random_heads(own, f"{base} + random heads")])


def order(s: Setting) -> list[Record]:
    """The same examples in other orders (appendix A.1): split, questions, demonstrations and search are seed 0's, the
    seed permutes the demonstrations of every prompt.
    """
    first = replace(s, seed=0)
    prompts = [example.prompt for example in permuted(first, first.split.train[: s.options.examples], s.seed)]
    icl = permuted(first, first.held_out, s.seed)
    base, vector = s.asked(0), first.vector(f"order-{s.seed}", prompts)
    ways = [Way(f"{base} + MTV", vector.mask, vector.values), *s.random_heads(vector, f"{base} + random heads")]
    zero_shot, *patched = first.ask(first.queries(0), [Way(base), *ways])
    return [zero_shot, *first.ask(icl, [Way(f"{s.asked(s.options.shots)} ICL")]), *patched]


def permuted(s: Setting, questions: Sequence[Any], order: int) -> list[Example]:
    """Each question after the same demonstrations, whatever the order, in another order for each."""
    draw = random.Random(s.seed)
    chosen = [(question, s.demonstrations(question, draw)) for question in questions]
    return [
        s.task.queries([question], shown, s.options.shots, order * len(chosen) + index)[0]
        for index, (question, shown) in enumerate(chosen)
    ]


def scaling(s: Setting) -> list[Record]:
    """More and more one-shot examples behind the means (appendix, Figure 1); heads searched anew for each number."""
    base, train = s.asked(0), s.split.train
    prompts = [example.prompt for example in s.task.queries(train[: max(COUNTS)], train, s.one, s.seed)]
    counts = [count for count in COUNTS if count <= len(prompts)]
    ways = []
    for count in counts:
        vector = s.vector(f"of-{count}", prompts[:count])
        ways.append(Way(f"{base} + MTV of {count}", vector.mask, vector.values))
    chance = s.random_heads(vector, f"{base} + random heads, means of {count}")
    zero_shot, *patched, random_heads = s.ask(s.queries(0), [Way(base), *ways, *chance])
    for record, count in zip(patched, counts, strict=True):
        record["examples"] = count
    return [zero_shot, *_few_shot(s), *patched, random_heads]


def cost(s: Setting) -> list[Record]:
    """Milliseconds (median) and memory a query, asked one at a time, from pictures and text to the answer (Table 4).

    memory_mib: on a GPU the allocator's peak beyond what it held; else the keys and values of the prompt, and MTV's
                activations: what a server holds for a query.
    """
    base, shots, vector = s.asked(0), s.options.shots, s.vector()
    ways = [
        (0, Way(base)),
        *([(shots, Way(f"{s.asked(shots)} ICL"))] if shots else []),
        (0, Way(f"{base} + MTV", vector.mask, vector.values)),
    ]
    return [_cost(s, s.queries(n), way) for n, way in ways]


def _cost(s: Setting, examples: Sequence[Example], way: Way) -> Record:
    cuda = s.model.device.type == "cuda"
    seconds, peaks = [], []
    for example in (examples[0], *examples):  # the first twice: it warms up
        if cuda:
            torch.cuda.synchronize(s.model.device)
            torch.cuda.reset_peak_memory_stats(s.model.device)
        held = torch.cuda.memory_allocated(s.model.device) if cuda else 0
        started = time.perf_counter()
        _answer(s, example, way)
        if cuda:
            torch.cuda.synchronize(s.model.device)
        seconds.append(time.perf_counter() - started)
        peaks.append(torch.cuda.max_memory_allocated(s.model.device) - held if cuda else 0)
    tokens = statistics.fmean(len(s.model.encode(example.prompt)) for example in examples)
    memory = statistics.median(peaks[1:]) if cuda else _kept_bytes(s, tokens, way)
    return dict(
        way=way.name, milliseconds=1000 * statistics.median(seconds[1:]), memory_mib=memory / MiB, tokens=tokens,
        queries=len(examples), memory="peak beyond the weights" if cuda else "keys, values, activations",
    )  # fmt: skip


@torch.no_grad()
def _answer(s: Setting, example: Example, way: Way) -> None:
    patched: dict[str, Any] = dict(heads=way.mask, values=way.values)
    if getattr(s.task, "open_ended", False):
        s.answers([example.prompt], **patched)
    else:
        patch(s.model, example.prompt, **patched).argmax(dim=-1).tolist()


def _kept_bytes(s: Setting, tokens: int | float, way: Way) -> float:
    shape, size = s.model.shape, s.model.dtype.itemsize
    keys_and_values = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * size * tokens
    return float(keys_and_values + (0 if way.mask is None else int(way.mask.sum()) * shape.head_dim * size))


EXPERIMENTS: dict[str, Callable[[Setting], list[Record]]] = {
    "main": main,
    "baselines": baselines,
    "one_shot": one_shot,
    "transfer": transfer,
    "order": order,
    "scaling": scaling,
    "cost": cost,
    "methods": methods,
    # The paper's data sets, each `main` on itself.
    "vizwiz": main,
    "okvqa": main,
    "flowers": main,
    "cub": main,
}
DATA_SETS = ("vizwiz", "okvqa", "flowers", "cub")


def default_shots(name: str, tasks: Sequence[AnyTask]) -> int:
    """As in the paper: four for VizWiz and OK-VQA, none where every question brings its own pair; else eight.

    >>> engine.experiments.default_shots("main", [engine.tasks.load("antonyms")])
    8
    """
    if name in ("vizwiz", "okvqa"):
        return FOUR
    return 0 if all(map(brings_pair, tasks)) else 8
