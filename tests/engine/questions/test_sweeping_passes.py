"""What a sweep saves on the way: memory, prefixes, checkpoints; and what it makes of errors."""

from collections import Counter

import pytest
import torch

import engine
import models
from engine import Example
from engine.core.budget import Budget
from engine.questions import runs, sweeping
from models import zoo
from models.calls import Passing
from tests.sweeps import LIMIT, PROMPTS, TARGETS, each_head, options


@pytest.fixture
def passes(monkeypatch):
    """Rows of every pass."""
    seen = []

    def counted(model, prompt, patches=None, **where):
        seen.append(len(patches[0].units) if patches else 1)
        return engine.patch(model, prompt, patches, **where)

    monkeypatch.setattr(runs, "patch", counted)
    return seen


@pytest.mark.parametrize("positions", [-1, [-1, 1]])
@pytest.mark.parametrize("family", ["llama", "unpacked"])
def test_little_memory(tiny, draw, passes, monkeypatch, family, positions):
    """Several passes over one prefix give what one pass gives."""
    model = tiny(family)
    new, prompts = draw(model)[1], PROMPTS[:2]
    more = dict(targets=TARGETS[:2], positions=positions, progress=False)
    whole = engine.sweep(model, prompts, new, **more)
    n_rows = len(each_head(model)) + 1
    assert max(passes) in (n_rows, 2 * n_rows - 1)  # two positions in a call, and one unpatched row
    passes.clear()
    monkeypatch.setattr(sweeping, "TOGETHER", 0)
    row = Budget(model, 2**40)
    n_tokens = len(model.encode(prompts[0]))
    masks = sweeping.MASKS * len(each_head(model))
    for memory, most in ((1, 1), (5 * (row._row + row._token + n_tokens * row._key + masks), 5)):
        in_parts = engine.sweep(model, prompts, new, memory=memory, **more)
        assert max(passes) == most
        torch.testing.assert_close(in_parts.patched, whole.patched, atol=1e-6, rtol=0)
        passes.clear()


def test_the_prefix_is_computed_once(model, values, monkeypatch):
    """Tokens that go through the first block, pass by pass; all units lie in it."""
    shape, ids = model.shape, list(range(5, 25))
    units = {str(head): mask for head, mask in enumerate(each_head(model)[: shape.n_heads])}

    def tokens(**given):
        seen = []
        handle = model.body.blocks[0].register_forward_pre_hook(Passing(lambda _, args: seen.append(args[0].shape[1])))
        try:
            engine.sweep(model, [ids], values, targets=[5], groups=units, progress=False, **given)
        finally:
            handle.remove()
        return seen

    n_rows = len(units) + 1
    assert tokens() == [19 + n_rows]  # with the rows, if one pass takes them
    assert tokens(memory=1) == [19] + [1] * n_rows
    assert tokens(positions=[-1, -3]) == [17 + 3 * (2 * len(units) + 1)]  # so few rows share a call
    monkeypatch.setattr(sweeping, "TOGETHER", 0)
    assert tokens(positions=[-1, -3]) == [19, n_rows, 3 * len(units)]  # the unpatched row is in the first


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_memory_that_runs_out(model, values, monkeypatch, error):
    """Half as many rows are tried, and no more are from then on."""
    whole = engine.sweep(model, PROMPTS, values, **options())
    tried = []

    def narrow(model, prompt, patches):
        tried.append(len(patches[0].units))
        if tried[-1] > 5:
            raise error("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return engine.patch(model, prompt, patches)

    monkeypatch.setattr(runs, "patch", narrow)
    effects = engine.sweep(model, PROMPTS, values, **options())
    torch.testing.assert_close(effects.patched, whole.patched, atol=1e-6, rtol=0)
    assert tried[:3] == [19, 9, 4]
    assert max(tried[2:]) == 4
    assert Counter(tried)[19] == 1


def test_memory_that_runs_out_in_the_metric(model, values):
    whole = engine.sweep(model, PROMPTS, values, metric=lambda logits: logits[:, 3], progress=False)

    def greedy(logits):
        if len(logits) > 5:
            raise torch.OutOfMemoryError
        return logits[:, 3]

    effects = engine.sweep(model, PROMPTS, values, metric=greedy, progress=False)
    torch.testing.assert_close(effects.patched, whole.patched, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), RuntimeError("something else")])
def test_errors_that_fewer_rows_do_not_help(model, values, monkeypatch, error):
    def broken(model, prompt, patches=None, **where):
        raise error

    monkeypatch.setattr(runs, "patch", broken)
    with pytest.raises(type(error), match=str(error)):
        engine.sweep(model, PROMPTS, values, **options())


@pytest.mark.parametrize("source", [False, True])
def test_checkpoint(model, values, tmp_path, source):
    """A sweep that was stopped goes on where it was, and ends bit by bit as one that never was."""
    mark, prompts = tmp_path / "folder" / "sweep.ckpt", [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]]
    calls, left = [], 10**6

    def metric(logits):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        calls.append(len(logits))
        return logits[:, 3].sigmoid()

    given = dict(source=prompts[::-1]) if source else dict(values=values)
    given |= dict(metric=metric, progress=False)
    whole = engine.sweep(model, prompts, **given)
    n_calls = len(calls)
    assert not list(tmp_path.iterdir())

    left = n_calls // 2
    with pytest.raises(KeyboardInterrupt):
        engine.sweep(model, prompts, checkpoint=mark, **given)
    assert mark.exists()
    calls.clear()
    left = 10**6
    resumed = engine.sweep(model, prompts, checkpoint=mark, **given)
    assert len(calls) == n_calls - n_calls // 2  # the prompts that were left
    assert torch.equal(resumed.patched, whole.patched)
    assert torch.equal(resumed.clean, whole.clean)
    assert (resumed.reference is None) == (not source)
    assert not source or torch.equal(resumed.reference, whole.reference)
    assert resumed.metadata == whole.metadata
    assert not list(mark.parent.iterdir())


def test_checkpoint_of_another_sweep(model, tiny, draw, values, tmp_path):
    mark = tmp_path / "sweep.ckpt"
    calls = []

    def stops(logits):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return logits[:, 3]

    given = dict(metric=stops, checkpoint=mark, progress=False)
    with pytest.raises(KeyboardInterrupt):
        engine.sweep(model, PROMPTS, values, **given)
    saved = mark.read_bytes()
    others = dict(
        model=dict(model=tiny("gpt2"), values=draw(tiny("gpt2"))[1]),
        metric=dict(metric="kl"),
        values=dict(values=values + 1),
        positions=dict(positions=[-1, 0]),
        mode=dict(mode="add"),
        groups=dict(groups="layers"),
        data=dict(prompts=PROMPTS[::-1]),
        prompts=dict(prompts=[*PROMPTS, "more"]),
    )
    for name, other in others.items():
        with pytest.raises(ValueError, match=rf"sweep.ckpt is of another sweep: .*{name}.* differ"):
            engine.sweep(**(dict(model=model, prompts=PROMPTS, values=values) | given | other))
    with pytest.raises(ValueError, match="another sweep: values differ"):
        engine.sweep(model, PROMPTS, "resample", seed=3, **given)
    assert len(calls) == 2  # nothing ran
    assert mark.read_bytes() == saved
    mark.write_bytes(saved[: len(saved) // 2])
    with pytest.raises(ValueError, match="truncated"):
        engine.sweep(model, PROMPTS, values, **given)


@pytest.mark.parametrize("changed", ["weights", "scored", "dtype"])
def test_checkpoint_of_other_weights_or_another_score(values, tmp_path, changed):
    """Answers of several tokens, at a model that is not the same any more."""
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="tiny")
    examples = [Example(prompt, " no") for prompt in PROMPTS]
    given = dict(metric="log_probability", checkpoint=tmp_path / "kept", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        scores = sweeping._scores
        patch.setattr(sweeping, "_scores", lambda asked, n, *rest: scores(asked, n if n < 1 else 1 / 0, *rest))
        with pytest.raises(ZeroDivisionError):
            engine.sweep(model, examples, values, **given)
    if changed == "weights":
        with torch.no_grad():
            model.hf.lm_head.weight.mul_(3)
    if changed == "dtype":
        model = models.wrap(model.hf.half(), zoo.tiny_tokenizer(), name="tiny")
    more = {"scored": "token_mean"} if changed == "scored" else {}
    with pytest.raises(ValueError, match=f"is of another sweep: .*{changed}.* differ"):
        engine.sweep(model, examples, values, **given, **more)
