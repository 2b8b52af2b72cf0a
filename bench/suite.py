"""The suite: a grid of cells; in each, every provider is asked, compared with the oracle, and only then timed."""

from __future__ import annotations

import gc
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

import models
from bench import memory
from bench.cases import CASES, Case, Question, ask, depth, draw_and_update
from bench.cells import Cell, some_rows, wrap
from bench.limits import Rates, Sizes, floor
from bench.machine import describe, free_bytes, measure_rates, synchronise
from bench.providers import PROVIDERS, Cannot, Provider
from bench.records import FORWARDS, LOOPS, Record, Results
from bench.shapes import make, weights_bytes
from bench.timing import interleaved, ratio, summary
from engine.progress import track
from models import Model

# Largest distance from the oracle, as a share of its answer, that rounding explains; in half precision only gross
# errors show.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
ORACLE_ROWS = 2  # the first and the last: what every answer is compared in
LEAST_ROUNDS = 3
ROOM = 0.8  # share of the free memory that a cell may take


@dataclass(frozen=True)
class Settings:
    """rounds:    of each way, interleaved; fewer, but at least 3, where they would take longer than the budget.
    loop_rows: rows that a loop runs a round; its time is scaled to all.
    patience:  seconds that one call may take; ways that take longer are left out of the cell.
    budget:    seconds that the rounds of a cell may take; None: as long as they take.
    memory:    processes (on the CPU) whose median is the peak; 0: it is not measured.
    memory_cases: of which it is measured; empty: all.
    """

    rounds: int = 9
    loop_rows: int = 2
    patience: float = 15.0
    budget: float | None = 60.0
    memory: int = 3
    memory_cases: tuple[str, ...] = ()


def grid(
    sizes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    shapes: Sequence[str],
    dtypes: Sequence[str],
    devices: Sequence[str],
    backend: str = "huggingface",
) -> list[Cell]:
    """Of each case every length at the first number of rows, and every number of rows at the first length.

    A cross, not a square. A head sweep has rows of its own and takes only the lengths.
    """
    return [
        Cell(case, shape, n, r, dtype, device, backend)
        for device in devices
        for dtype in dtypes
        for shape in shapes
        for case, (tokens, rows) in sizes.items()
        for n, r in dict.fromkeys([*((n, rows[0]) for n in tokens), *((tokens[0], r) for r in rows)])
        if case != "sweep" or r == rows[0]
    ]


@torch.no_grad()
def run(cells: Sequence[Cell], providers: Sequence[str], settings: Settings, progress: bool = True) -> Results:
    """Measure them all. Cells of the same model share it."""
    records: list[Record] = []
    speeds: list[dict[str, Any]] = []
    for (shape, dtype, device, backend), same in groupby(cells, key=lambda cell: cell.model):
        some = list(same)
        rates = measure_rates(device, getattr(torch, dtype))
        speeds.append({"shape": shape, "dtype": dtype, "device": device, **asdict(rates)})
        needed, free = weights_bytes(shape, getattr(torch, dtype)), free_bytes(device)
        if needed > ROOM * free:
            reason = f"the weights take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            records += [_record(cell, name, status="skipped", reason=reason) for cell in some for name in providers]
            continue
        hf = make(shape, getattr(torch, dtype), device)
        ready = _Ready(hf, wrap(hf, backend), providers)
        for cell in track(some, f"{shape} {dtype} {device}", progress):
            records += measure(cell, ready, rates, settings)
        del hf, ready
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        if settings.memory and device == "cpu":
            memory.fill_in(records, some, settings.memory, settings.memory_cases, progress)
    machine = describe(cells[0].device)
    return Results(machine, speeds, {**asdict(settings), "providers": list(providers)}, records)


class _Ready:
    """A model, what wraps it, and the providers that could be made of it; of the others, why not."""

    def __init__(self, hf: Any, model: Model, providers: Sequence[str]):
        self.hf, self.model, self.sizes, self.names = hf, model, Sizes.of(hf), providers
        self.oracle = PROVIDERS["naive"](hf, model)
        self.providers: dict[str, Provider] = {}
        self.missing: dict[str, tuple[str, str]] = {}
        for name in providers:
            status, found = open_provider(name, hf, model)
            if isinstance(found, Provider):
                self.providers[name] = found
            else:
                self.missing[name] = status, found


def open_provider(name: str, hf: Any, model: Model) -> tuple[str, Provider | str]:
    """The provider; or a status and the reason why there is none."""
    kind = PROVIDERS[name]
    if kind.library and importlib.util.find_spec(kind.library) is None:
        return "not installed", f"{kind.library} is not installed"
    try:
        return "", kind(hf, model)
    except models.UnsupportedModelError as refused:
        return "cannot", str(refused)
    except Exception as error:  # another's library: whatever it raises, the others are measured
        return "failed", _said(error)


def measure(cell: Cell, ready: _Ready, rates: Rates, settings: Settings) -> list[Record]:
    """One cell: the records of all providers, and of one unpatched forward of either model beside them."""
    case, shape, sizes = CASES[cell.case], ready.model.shape, ready.sizes
    cell = replace(cell, rows=case.rows(shape, cell.rows))
    question = ask(shape, cell.tokens, case.heads(shape, cell.rows), ready.model.device)
    limits = dict(
        floor=floor(case.passes(sizes, question.heads, cell.tokens), rates),
        prefill_floor=sizes.prefill(cell.tokens - 1).seconds(rates),
        row_floor=sizes.row_step(cell.rows, cell.tokens, depth(question.heads)).seconds(rates),
    )
    records = [_record(cell, name, **limits) for name in ready.names]
    ways: dict[str, Callable[[], object]] = {}
    first: list[float] = []  # seconds of the first call of each
    oracle = cache(case.prepare(ready.oracle, some_rows(question, ORACLE_ROWS)))
    for record in records:
        try:
            ways[record.provider], seconds = admit(record, ready, cell, question, oracle, rates, settings)
            first.append(seconds)
        except _LeftOut as left_out:
            record.status, record.reason = left_out.args
    measured = {record.provider: record for record in records if record.provider in ways}
    if not measured:
        return records

    ids, wait = question.ids[None], synchronise(cell.device)
    ways["one stock forward"] = lambda: ready.hf(input_ids=ids, logits_to_keep=1, use_cache=False).logits
    ways["one forward"] = lambda: ready.model.forward(ids)
    for name in FORWARDS:
        first.append(timed(ways[name], wait)[1])
        measured[name] = _record(cell, name, rows_run=1, computed=float(cell.tokens))
        records.append(measured[name])
    rounds = settings.rounds
    if settings.budget is not None:
        rounds = min(rounds, max(LEAST_ROUNDS, int(settings.budget / sum(first))))
    once = {"once": lambda: draw_and_update(question)} if case.name == "search" else {}
    found = interleaved({**ways, **once}, rounds, warm_up=0, wait=wait, progress=False)
    for name, record in measured.items():
        fill_in(record, found[name], summary(found["once"])["median"] if once else 0.0)
    for record in measured.values():
        record.speedup = {n: ratio(measured[n].seconds, record.seconds) for n in LOOPS if n in measured}
        record.cost = {n: ratio(record.seconds, measured[n].seconds) for n in FORWARDS}
    if settings.memory and cell.device != "cpu" and (not settings.memory_cases or cell.case in settings.memory_cases):
        for name, record in measured.items():
            record.memory = memory.peak_on_device(ways[name], cell.device)
    return records


class _LeftOut(Exception):  # noqa: N818
    """A provider is not timed in a cell: status and reason."""


def admit(
    record: Record,
    ready: _Ready,
    cell: Cell,
    whole: Question,
    oracle: Callable[[], Tensor],
    rates: Rates,
    settings: Settings,
) -> tuple[Callable[[], object], float]:
    """The call that will be timed, its answer compared with the oracle's, and its first seconds.

    Raises _LeftOut.
    """
    if record.provider in ready.missing:
        raise _LeftOut(*ready.missing[record.provider])
    provider, case, wait = ready.providers[record.provider], CASES[cell.case], synchronise(cell.device)
    at_once = provider.at_once(case.name, cell.rows)
    question = some_rows(whole, settings.loop_rows if at_once == 1 else at_once)
    record.rows_run = len(question.run)
    if why := too_much(provider, ready.sizes, cell, question, rates, settings):
        raise _LeftOut("skipped", why)
    try:
        call = case.prepare(provider, question)
        with counted(provider.counted) as tokens:
            answer, seconds = timed(call, wait)
        planned = provider.planned(record.rows_run)
        record.computed = (tokens[0] / ready.sizes.layers if planned is None else planned) / record.rows_run
        few = some_rows(whole, ORACLE_ROWS)
        if not case.by_row:
            question, answer = few, case.prepare(provider, few)()
        found = apart(case, ready.model, question, answer, few, oracle())
    except (Cannot, models.UnsupportedModelError) as cannot:
        raise _LeftOut("cannot", str(cannot)) from cannot
    except Exception as error:  # another's library, or no memory
        raise _LeftOut("failed", _said(error)) from error
    if not math.isfinite(found):
        raise _LeftOut("wrong", "it answers NaN or infinity")
    record.apart = found
    if found > TOLERANCE[ready.model.dtype]:
        raise _LeftOut("wrong", f"off the oracle by {found:.1e} of its answer")
    if settings.patience < seconds < 2 * settings.patience:  # the first call also loads code and kernels
        seconds = timed(call, wait)[1]
    if seconds > settings.patience:
        raise _LeftOut("skipped", f"a call takes {seconds:.2g} s, {settings.patience:g} are allowed")
    return call, seconds


def apart(case: Case, model: Model, question: Question, answer: Tensor, few: Question, oracle: Tensor) -> float:
    """How far an answer to `question` is from the oracle's to `few`, in the rows that both have."""
    ours, theirs = torch.isin(question.run, few.run), torch.isin(few.run, question.run)
    if len(answer) != (len(question.run) if case.by_row else len(oracle)):
        raise ValueError(f"it answers {len(answer)} rows, was asked for {len(question.run)}")
    if case.by_row:
        answer, oracle = answer[ours.to(answer.device)], oracle[theirs.to(oracle.device)]
    return case.apart(model, replace(question, run=question.run[ours]), answer, oracle)


def too_much(provider: Provider, sizes: Sizes, cell: Cell, question: Question, rates: Rates, settings: Settings) -> str:
    """Why a cell is not tried; empty if it may be. A guess, from below for time and from above for memory."""
    rows = len(question.run)
    at_once = min(rows, provider.at_once(cell.case, rows))
    needed, free = provider.bytes_needed(sizes, at_once, cell.tokens), free_bytes(cell.device)
    if needed > ROOM * free:
        return f"it would take about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    weights = sizes.blocks + (sizes.vocabulary if provider.all_logits else 0)
    seconds = 2 * weights * provider.tokens(rows, cell.tokens) / rates.flops
    if seconds > settings.patience:
        return f"a call would take at least {seconds:.2g} s, {settings.patience:g} are allowed"
    return ""


def fill_in(record: Record, seconds: list[float], fixed: float = 0.0) -> None:
    """Seconds of a round's rows scaled to all rows, but for the `fixed` ones that rows do not multiply."""
    share = 1.0 if record.baseline else record.rows / (record.rows_run or record.rows)
    if record.baseline or share == 1:
        fixed = 0.0
    record.seconds = [fixed + share * max(0.0, s - fixed) for s in seconds]
    found = summary(record.seconds)
    record.median, record.low, record.high = found["median"], found["low"], found["high"]
    if not record.baseline:
        record.rows_per_second = record.rows / record.median
        record.percent_of_floor = 100 * (record.floor or 0.0) / record.median


@contextmanager
def counted(layers: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Within: tokens that go through all these layers. The hook is global: some libraries clear modules' own."""
    tokens, watched = [0], {id(layer) for layer in layers}

    def count(module: nn.Module, args: Any) -> None:
        if id(module) in watched:
            tokens[0] += args[0].shape[:-1].numel()

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield tokens
    finally:
        handle.remove()


def timed(call: Callable[[], Any], wait: Callable[[], None]) -> tuple[Any, float]:
    """What a call gives, and its seconds."""
    wait()
    started = time.perf_counter()
    answer = call()
    wait()
    return answer, time.perf_counter() - started


def _record(cell: Cell, provider: str, **found: Any) -> Record:
    return Record(
        cell.case, provider, cell.shape, cell.tokens, cell.rows, cell.dtype, cell.device, cell.backend, **found
    )


def _said(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first:.160}"
