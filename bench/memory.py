"""Peak memory beyond the weights: the allocator's on a GPU; on the CPU, of a process for each measurement.

A child opens the model once and forks a process for each measurement: what one leaves behind counts for no other.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench.cells import Cell, some_rows, wrap
from bench.records import FORWARDS, Record
from engine.progress import track

MiB = 2**20


def peak_on_device(call: Callable[[], object], device: str) -> float:
    """MiB that the allocator of a GPU holds more, at the peak of a call."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MiB


def fill_in(
    records: Sequence[Record], cells: Sequence[Cell], repeats: int, cases: Sequence[str], progress: bool = True
) -> None:
    """The peaks of all records measured in these cells, medians over `repeats` processes each (Linux)."""
    models_of = {cell.model for cell in cells}
    wanted = [
        record
        for record in records
        if record.status == "measured"
        and (record.shape, record.dtype, record.device, record.backend) in models_of
        and (not cases or record.case in cases)
    ]
    if not sys.platform.startswith("linux"):
        for record in wanted:
            record.reason = "its peak is not measured: on the CPU that needs Linux"
        return
    jobs = [dict(key=record.key, rows_run=record.rows_run) for record in wanted for _ in range(repeats)]
    if not jobs:
        return
    command = [sys.executable, "-m", "bench", "memory-child"]
    asked = {"threads": torch.get_num_threads(), "model": asdict(cells[0]), "jobs": jobs}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(asked))
        child.stdin.close()
        peaks = [json.loads(next(child.stdout, "null")) for _ in track(jobs, "memory", progress)]
    for index, record in enumerate(wanted):
        found = [peak for peak in peaks[index * repeats : (index + 1) * repeats] if peak is not None]
        if found:
            record.memory = statistics.median(found)
        else:
            record.reason = "its peak is not measured: the process that ran it died"


@torch.no_grad()
def serve(request: str) -> None:
    """In the child: a line of JSON a job, MiB or null."""
    from bench.providers import PROVIDERS
    from bench.shapes import make

    asked = json.loads(request)
    # A pool of threads does not survive a fork: none is begun before it.
    torch.set_num_threads(1)
    cell = Cell(**asked["model"])
    hf = make(cell.shape, getattr(torch, cell.dtype), cell.device)
    for library in {PROVIDERS[job["key"][1]].library for job in asked["jobs"] if job["key"][1] not in FORWARDS}:
        if library:
            importlib.import_module(library)
    fork = multiprocessing.get_context("fork")
    for job in asked["jobs"]:
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=_measure, args=(there, hf, job, asked["threads"]))
        process.start()
        there.close()
        try:
            print(json.dumps(here.recv()), flush=True)
        except EOFError:  # it died: out of memory, as a rule
            print("null", flush=True)
        process.join()


@torch.no_grad()
def _measure(there: Any, hf: Any, job: dict[str, Any], threads: int) -> None:
    torch.set_num_threads(threads)
    case, provider, _, tokens, rows, _, _, backend = job["key"]
    model = wrap(hf, backend)
    short, whole = (_call(case, provider, hf, model, n, rows, job["rows_run"]) for n in (min(8, tokens), tokens))
    short()  # loads what code and kernels it needs
    there.send(peak(whole))


def _call(case: str, name: str, hf: Any, model: Any, tokens: int, rows: int, run: int) -> Callable[[], object]:
    from bench.cases import CASES, ask
    from bench.providers import PROVIDERS

    everything = ask(model.shape, tokens, CASES[case].heads(model.shape, rows), model.device)
    ids = everything.ids[None]
    if name == "one stock forward":
        return lambda: hf(input_ids=ids, logits_to_keep=1, use_cache=False).logits
    if name == "one forward":
        return lambda: model.forward(ids)
    return CASES[case].prepare(PROVIDERS[name](hf, model), some_rows(everything, run))


def peak(call: Callable[[], object]) -> float:
    """MiB that this process grows by at its peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))
