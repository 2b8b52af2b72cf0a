"""Learned task vectors: their gradient is that of plain hooked forwards, in float64; kept, resumed, applied."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import engine
import models
from engine import Example
from engine.methods import learned
from engine.methods.learned import LearnedVector, Learning, Lesson
from models import zoo
from tests import plain

ASKED = [Example(f"Q: {'ab' * n}\nA:", f" {letter * (1 + n % 2)}") for n, letter in enumerate("colder", start=1)]
# Site, (layer, unit) pairs, positions.
PLACES = [
    ("resid_post", [(1, 0)], (-1,)),
    ("resid_post", [(0, 0), (2, 0)], (-3, -1)),
    ("z", [(0, 1), (1, 3), (2, 4)], (-1,)),
    ("mlp_act", [(1, 0), (1, 7)], (2, -1)),
]


@pytest.fixture(scope="module")
def double():
    """A function of the family: a model in float64, and transformers' own of the same weights; made once."""
    made = {}

    def make(family):
        if family not in made:
            hf = plain.made(family, torch.float64)
            model = models.wrap(plain.made(family, torch.float64), zoo.tiny_tokenizer(), name=f"double-{family}")
            made[family] = model, hf
        return made[family]

    return make


def lesson(model, site, pairs, positions, mean=False):
    size = model.site(site)
    units = torch.zeros(size.n_layers, size.units, dtype=torch.bool)
    for pair in pairs:
        units[pair] = True
    pool = engine.PrefixPool(model, [example.prompt for example in ASKED])
    targets = [engine.tasks.answer_tokens(model, example) for example in ASKED]
    return Lesson(model, pool, targets, mean, site, units, positions), size.width


def hooked_losses(model, hf, family, some, vectors, which):
    """Each example by forwards of one row: the vectors added at each position of the prompt, by hooks."""
    layers, units = some.units.nonzero(as_tuple=True)
    values = torch.zeros(len(vectors), *some.units.shape, vectors.shape[-1], dtype=vectors.dtype)
    n, places = len(layers), torch.arange(len(vectors))
    index = places.repeat_interleave(n), layers.repeat(len(vectors)), units.repeat(len(vectors))
    values = values.index_put(index, vectors.flatten(0, 1))
    losses = []
    for index in which:
        before, answer, total = model.encode(ASKED[index].prompt).tolist(), some.targets[index], 0.0
        at = [p % len(before) for p in some.positions]
        for n, token in enumerate(answer):
            changes = plain.patched(some.site, some.units, values, at, "add")
            logits = plain.logits(hf, family, before + answer[:n], changes)
            total = total + cross_entropy(logits[None], torch.tensor([token]))
        losses.append(total / len(answer) if some.mean else total)
    return torch.stack(losses)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("site", "pairs", "positions"), PLACES, ids=lambda x: str(x))
def test_losses_and_gradients(double, random, family, site, pairs, positions):
    """Against autograd through hooked forwards, and central differences of them."""
    model, hf = double(family)
    some, width = lesson(model, site, pairs, positions, mean=site == "z")
    vectors = torch.randn(len(positions), len(pairs), width, generator=random, dtype=torch.float64)
    which = [0, 3, 4]
    ours, theirs = (vectors.clone().requires_grad_() for _ in range(2))
    losses, want = some.losses(which, ours), hooked_losses(model, hf, family, some, theirs, which)
    torch.testing.assert_close(losses, want, atol=1e-10, rtol=0)
    (got,), (whole,) = torch.autograd.grad(losses.mean(), ours), torch.autograd.grad(want.mean(), theirs)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(got, whole, atol=1e-10, rtol=1e-8)
    moved, step = torch.randn(vectors.shape, generator=random, dtype=torch.float64), 1e-5
    with torch.no_grad():
        ends = [hooked_losses(model, hf, family, some, vectors + sign * step * moved, which).mean() for sign in (1, -1)]
    slope = ((ends[0] - ends[1]) / (2 * step)).item()
    assert (got * moved).sum().item() == pytest.approx(slope, abs=1e-6 * max(1, abs(slope)))


def learn(model, steps=30, **options):
    options = dict(units=[1], prompts_per_step=3, validation=ASKED[:3], lr=0.1, progress=False) | options
    return learned.extract(model, ASKED, steps=steps, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_learns(tiny, family):
    """The loss falls; the model is left as it was."""
    model = tiny(family)
    model.hf.zero_grad(set_to_none=True)  # other tests share it
    before = {name: weight.clone() for name, weight in model.hf.state_dict().items()}
    vector = learn(model, steps=15, look_every=5, lr=0.3)
    seen = vector.metadata["validation_losses"]
    assert vector.metadata["validation_loss"] == min(seen) < 0.8 * vector.metadata["losses"][0]
    assert vector.vectors.shape == (1, 1, model.shape.d_model)
    for name, weight in model.hf.state_dict().items():
        assert torch.equal(weight, before[name])
    assert all(weight.grad is None for weight in model.hf.parameters())


def test_two_steps_are_adamw(model):
    """From 0, by torch's own optimiser on plain forwards; a mean over the examples that the seed draws."""
    hf = plain.made("llama")
    vector = learn(model, steps=2, seed=3, weight_decay=0.5, look_every=2)
    some, _ = lesson(model, "resid_post", [(1, 0)], (-1,))
    theta = torch.zeros(1, 1, 48, requires_grad=True)
    adam = torch.optim.AdamW([theta], lr=0.1, weight_decay=0.5)
    random, losses = torch.Generator().manual_seed(3), []
    for _ in range(2):
        drawn = torch.randint(len(ASKED), (3,), generator=random).tolist()
        loss = hooked_losses(model, hf, "llama", some, theta, drawn).mean()
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert vector.metadata["losses"] == pytest.approx(losses, abs=1e-4)
    # Where a gradient is nearly 0, Adam's first step is its sign.
    assert ((vector.vectors - theta.detach()).abs() < 1e-3).float().mean() > 0.9


def test_the_best_is_kept(model):
    """A look at the validation examples that is worse leaves the vectors of the best; after `patience` it is done."""
    search = Learning(torch.zeros(1, 1, 2), lr=0.1, seed=0, decay=0.0, patience=2)
    for value, loss in ((1.0, 3.0), (2.0, 2.0), (3.0, 2.5)):
        with torch.no_grad():
            search.theta.fill_(value)
        search.look(loss, 0)
        assert not search.done
    search.look(2.0, 0)
    assert search.done
    assert search.best.unique().tolist() == [2.0]
    vector = learn(model, steps=60, lr=2.0, look_every=1, patience=3)  # it soon overshoots
    seen = vector.metadata["validation_losses"]
    assert len(seen) == len(vector.metadata["losses"]) == vector.metadata["steps"] < 60
    assert min(seen[-3:]) >= min(seen[:-3]) == vector.metadata["validation_loss"]


def same(one, other):
    """Bit for bit."""
    assert torch.equal(one.vectors, other.vectors)
    for key in ("losses", "validation_losses", "validation_loss", "steps"):
        assert one.metadata[key] == other.metadata[key]


def test_same_seed_same_result(model):
    first = learn(model, steps=8, seed=1)
    torch.manual_seed(123)  # the caller's random numbers play no part
    same(learn(model, steps=8, seed=1), first)
    assert learn(model, steps=8, seed=2).metadata["losses"] != first.metadata["losses"]


def test_interrupted_and_resumed(model, tmp_path):
    """Bit by bit: vectors, moments, draws, the best so far. One that is done stays done."""
    options = dict(lr=2.0, look_every=2, patience=2, steps=30)
    whole, checkpoint = learn(model, **options), tmp_path / "search.safetensors"
    assert 7 < whole.metadata["steps"] < 30  # it ends by itself

    def stop(step):
        if step.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(model, **options, checkpoint=checkpoint, checkpoint_every=3, on_step=stop)
    steps = []
    options |= dict(checkpoint=checkpoint, checkpoint_every=3)
    same(learn(model, **options, on_step=lambda step: steps.append(step.step)), whole)
    assert steps == list(range(7, whole.metadata["steps"] + 1))
    steps.clear()
    same(learn(model, **options, on_step=steps.append), whole)
    assert not steps


def test_saved_and_applied(model, tmp_path):
    """Patched, generated and evaluated by the verbs; several layers and positions are what hooks would add."""
    vector = learn(model, steps=4, units=[(0, 1), (2, 4)], site="z", positions=[-2, -1])
    vector.save(tmp_path / "learned.safetensors")
    loaded = LearnedVector.load(tmp_path / "learned.safetensors", model)
    assert (loaded.site, loaded.positions, loaded.metadata) == ("z", (-2, -1), vector.metadata)
    assert torch.equal(loaded.vectors, vector.vectors)
    ids, hf = model.encode("Q: zz\nA:"), plain.made("llama")
    values = torch.zeros(2, 3, 6, 8)
    values[:, [0, 2], [1, 4]] = vector.vectors
    changes = plain.patched("z", loaded.units, values, (len(ids) - 2, len(ids) - 1), "add")
    got = engine.patch(model, "Q: zz\nA:", loaded.patch)
    assert torch.allclose(got[0], plain.logits(hf, "llama", ids, changes), atol=1e-5)
    assert (got - engine.patch(model, "Q: zz\nA:")).abs().max() > 1e-3
    assert isinstance(engine.generate(model, "Q: zz\nA:", loaded.patch, max_new_tokens=2), str)


def test_it_carries_on_from_few_shot_prompts(model):
    """On top of demonstrations: prompts of other lengths, the vector at the last token of each."""
    examples = [Example(f"Q: a\nA: b\n\n{one.prompt}", one.answer) for one in ASKED]
    vector = learned.extract(model, examples, [2], steps=3, validation=examples[:2], progress=False)
    assert len(vector.metadata["losses"]) == 3


def test_inference_mode_and_no_grad(model):
    """The caller's own mode is put aside, and back."""
    want = learn(model, steps=3)
    with torch.no_grad():
        same(learn(model, steps=3), want)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("steps", [7, 14])
def test_on_from_a_checkpoint_of_the_last_step_asked_for(model, tmp_path, steps):
    """As a search of so many steps from the start, whose last look is at the last step."""

    class StoppedError(Exception):
        pass

    def stop(step):
        if step.step == steps + 1:
            raise StoppedError

    given = dict(validation=ASKED[:2], progress=False, checkpoint_every=7)
    with pytest.raises(StoppedError):
        learned.extract(model, ASKED, [1], steps=20, checkpoint=tmp_path / "kept", on_step=stop, **given)
    got = learned.extract(model, ASKED, [1], steps=steps, checkpoint=tmp_path / "kept", **given)
    want = learned.extract(model, ASKED, [1], steps=steps, **given)
    for _ in range(2):  # and again, of a search that is done
        assert got.metadata["validation_losses"] == want.metadata["validation_losses"]
        assert torch.equal(got.vectors, want.vectors)
        got = learned.extract(model, ASKED, [1], steps=steps, checkpoint=tmp_path / "kept", **given)
