"""A search ends the same whether or not it was interrupted, killed, shared by ranks or replayed."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
import models
from engine import Example
from engine.artifacts import load_tensors, save_tensors
from engine.distributed import World
from engine.methods import trials
from engine.methods.mtv import PRESETS
from models import zoo
from tests.searching import ESTIMATOR, OTHERS, PRESET, same, search


@PRESET
def test_same_seed_same_result(model, preset):
    first = search(model, preset=preset, seed=1)
    torch.manual_seed(123)  # the caller's random numbers play no part
    same(search(model, preset=preset, seed=1), first)
    assert not torch.equal(search(model, preset=preset, seed=2).probabilities, first.probabilities)


class StoppedError(Exception):
    pass


@PRESET
@pytest.mark.parametrize("every", [1, 5])
def test_interrupted_and_resumed(model, tmp_path, preset, every):
    """Up to the last checkpoint nothing is run again; theta and losses are those of a search in one go."""
    whole = search(model, preset=preset)
    checkpoint = tmp_path / "search.safetensors"

    def stop(step):
        if step.step == 7:
            raise StoppedError

    with pytest.raises(StoppedError):
        search(model, preset=preset, checkpoint=checkpoint, checkpoint_every=every, on_step=stop)
    steps = []
    resumed = search(
        model, preset=preset, checkpoint=checkpoint, checkpoint_every=every, on_step=lambda s: steps.append(s.step)
    )
    assert steps == list(range(8 if every == 1 else 6, 21))
    same(resumed, whole)
    theta = load_tensors(checkpoint, ("theta",))[0]["theta"]
    clamp = PRESETS[preset].clamp
    assert torch.equal(theta.sigmoid().clamp(clamp, 1 - clamp), whole.probabilities)


@PRESET
def test_finished_search_is_resumed_too(model, tmp_path, preset):
    """Nothing is left to do, the result is the same; a longer search goes on from there."""
    checkpoint = tmp_path / "search.safetensors"
    whole = search(model, preset=preset, checkpoint=checkpoint)
    steps = []
    same(search(model, preset=preset, checkpoint=checkpoint, on_step=steps.append), whole)
    assert not steps
    longer = search(model, preset=preset, steps=25, checkpoint=checkpoint)
    same(longer, search(model, preset=preset, steps=25))


@pytest.mark.parametrize("prompts", [1, 3])
@ESTIMATOR
def test_any_estimator_is_resumed(model, tmp_path, estimator, prompts):
    """Bit by bit; and another estimator, or another number of prompts, is another search."""
    options = dict(estimator=estimator, prompts_per_step=prompts, steps=8)
    whole = search(model, **options)
    checkpoint = tmp_path / "search.safetensors"
    search(model, **options | dict(steps=3), checkpoint=checkpoint)
    same(search(model, **options, checkpoint=checkpoint), whole)
    assert whole.metadata["estimator"] == estimator
    assert whole.metadata["prompts_per_step"] == prompts
    others = OTHERS if estimator == "reinforce" else ["reinforce"]
    with pytest.raises(ValueError, match=r"is of another search: it has .*estimator"):
        search(model, **options | dict(estimator=others[0]), checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"is of another search: it has .*prompts_per_step"):
        search(model, **options | dict(prompts_per_step=4 - prompts), checkpoint=checkpoint)


def test_checkpoints_without_an_estimator_are_of_reinforce(model, tmp_path):
    checkpoint = tmp_path / "search.safetensors"
    search(model, steps=3, checkpoint=checkpoint)
    names = ("theta", "exp_avg", "exp_avg_sq", "random", "losses")
    tensors, identity = load_tensors(checkpoint, names)
    for key in ("estimator", "prompts_per_step"):
        identity.pop(key)
    save_tensors(checkpoint, tensors, identity)
    same(search(model, steps=6, checkpoint=checkpoint), search(model, steps=6))


@dataclass(frozen=True)
class Together(World):
    """A rank that is a thread of this process: what is exchanged lies in a list."""

    meeting: Any = None

    def _exchange(self, mine):
        barrier, parts = self.meeting
        parts[self.rank] = mine
        barrier.wait(30)
        found = list(parts)
        barrier.wait(30)
        return found


@pytest.mark.parametrize("estimator", ["leave_one_out", "straight_through", "relaxed"])
def test_ranks_share_a_step(estimator):
    """Two ranks, three prompts a step: bits of one process that runs the same at once; on both ranks."""
    options = dict(estimator=estimator, prompts_per_step=3, steps=4)
    meeting = (threading.Barrier(2), [None, None])

    # A model each: threads must not share the hooks of one.
    ranks = [models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="tiny-llama") for _ in range(2)]

    def rank(n):
        return search(ranks[n], **options, world=Together(n, 2, meeting=meeting))

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(rank, range(2)))
    want = search(ranks[0], **options, at_once=4 if estimator == "leave_one_out" else 2)
    for vector in found:
        same(vector, want)


def slow_search(checkpoint, out, seconds):
    """What the killed process runs."""
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="tiny-llama")
    pause = float(seconds)
    vector = search(
        model,
        steps=30,
        checkpoint=checkpoint,
        checkpoint_every=2,
        on_step=lambda _: time.sleep(pause) if pause else None,
    )
    vector.save(out)


def test_killed_and_rerun(tmp_path):
    """A kill -9 in the middle of a search costs the steps since the last checkpoint, and changes nothing."""
    checkpoint = tmp_path / "search.safetensors"

    def start(checkpoint, out, seconds):
        code = "import sys; from tests.engine.methods import test_resumed; test_resumed.slow_search(*sys.argv[1:])"
        arguments = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / out), str(seconds)]
        return subprocess.Popen(arguments, cwd=Path(__file__).parents[3])

    process = start(checkpoint, "killed.safetensors", 0.2)
    try:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() or len(load_tensors(checkpoint, ("losses",))[0]["losses"]) < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -9
    assert not (tmp_path / "killed.safetensors").exists()
    done = len(load_tensors(checkpoint, ("losses",))[0]["losses"])
    assert 4 <= done < 30

    resumed = start(checkpoint, "resumed.safetensors", 0)
    whole = start(tmp_path / "other.safetensors", "whole.safetensors", 0)
    assert (resumed.wait(60), whole.wait(60)) == (0, 0)
    same(
        engine.TaskVector.load(tmp_path / "resumed.safetensors"), engine.TaskVector.load(tmp_path / "whole.safetensors")
    )


def test_a_replayed_step_searches_alike(model, monkeypatch):
    """The pass that a GPU records, run over the same buffers: the same losses, for prompts of any length."""
    means = engine.mean_activations(model, ["Q: hot\nA:", "Q: big\nA:"], progress=False)
    examples = [Example("Q: hot\nA:", 5), Example("Q: a longer one\nA:", 7)]
    # Few steps: a head drawn alike in all rollouts has a gradient of pure rounding, which Adam turns into a full step.
    options = dict(steps=4, rollouts=8, progress=False)
    want = engine.mtv.extract(model, examples, means, **options)
    used = []

    def replay(shares):
        used.append(engine.RowStep(model, rows=shares.at_once, context=32))
        return used[0]

    made = cached_property(replay)
    made.__set_name__(trials.Shares, "replay")
    monkeypatch.setattr(trials.Shares, "replay", made)
    got = engine.mtv.extract(model, examples, means, **options)
    assert used[0]._held is not None
    assert got.metadata["losses"] == pytest.approx(want.metadata["losses"], abs=1e-4)
