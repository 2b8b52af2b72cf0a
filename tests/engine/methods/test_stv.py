"""STV: where, what and which, each against what plain hooks and plain arithmetic say; resumed bit by bit."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import engine
import models
from engine import Example
from engine.methods import stv
from engine.methods.clusters import kmeans
from engine.methods.stv import Bank, Choice
from engine.methods.trials import Shares
from models import zoo
from tests import plain

FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2"])
ASKED = [Example(f"Q: {'ab' * n}\nA:", f" {letter}") for n, letter in enumerate("colder", start=1)]
SHOWN = [f"Q: {letter}\nA: {letter}\n\n{example.prompt}" for letter, example in zip("qrstuv", ASKED, strict=True)]


def search(model, steps=6, **options):
    options = dict(heads=5, centroids=3, rollouts=4, validation=ASKED[:3], progress=False) | options
    return stv.extract(model, ASKED, SHOWN, steps=steps, **options)


def z_of(hf, family, model, prompt):
    """At the last token, by hooks: [layers, heads, head_dim]."""
    return plain.activations(hf, family, model.encode(prompt), ["z"])["z"][:, -1].detach()


@FAMILY
@pytest.mark.parametrize("by", ["consistency", "distance"])
def test_where(tiny, family, by):
    """By arithmetic on what hooks read; and the heads of the largest."""
    model, hf = tiny(family), plain.made(family)
    pairs = zip(SHOWN, [example.prompt for example in ASKED], strict=True)
    apart = [z_of(hf, family, model, one) - z_of(hf, family, model, two) for one, two in pairs]
    want = sum(one.square().sum(dim=-1).sqrt() for one in apart) / len(apart)
    if by == "consistency":
        want = (sum(apart) / len(apart)).square().sum(dim=-1).sqrt() / want
    assert torch.allclose(stv.sensitivity(model, SHOWN, ASKED, by=by, progress=False), want, atol=1e-5)
    vector = search(model, by=by, steps=1)
    ranked = [divmod(i, model.shape.n_heads) for i in want.flatten().argsort(descending=True)[:5].tolist()]
    assert [tuple(head) for head in vector.metadata["ranked"]] == ranked
    assert vector.heads == sorted(ranked)


def test_as_many_centroids_as_contexts(model):
    """Each context is a centroid: the values of a head are those of one of the prompts, chosen for it."""
    vector, hf = search(model, centroids=len(SHOWN)), plain.made("llama")
    z = torch.stack([z_of(hf, "llama", model, one) for one in SHOWN])
    for layer, head in vector.heads:
        off = (z[:, layer, head] - vector.values[layer, head]).abs().amax(dim=-1)
        assert off.min() < 1e-5
    others = ~vector.mask
    assert torch.allclose(vector.values[others], z.mean(dim=0)[others], atol=1e-5)


def test_one_centroid_is_the_mean(model):
    """Nothing is left to choose: the mean with context, as MTV carries it."""
    vector = search(model, centroids=1)
    means = engine.mean_activations(model, SHOWN, progress=False)
    assert torch.allclose(vector.values, means, atol=1e-5)
    assert set(vector.metadata["choices"]) == {0}


@FAMILY
def test_a_step_is_hooked_forwards(tiny, monkeypatch, family):
    """Every rollout carries its own values, all of them in one pass; its loss is that of a hooked forward."""
    model, hf, seen = tiny(family), plain.made(family), []
    whole = Shares.by_rollouts

    def watched(self, drawn, masks, values):
        seen.append((drawn, masks, values, whole(self, drawn, masks, values)))
        return seen[-1][-1]

    monkeypatch.setattr(Shares, "by_rollouts", watched)
    vector = search(model, steps=2, prompts_per_step=2, loss="answer")
    assert len(seen) == 2
    for step, (drawn, masks, values, losses) in enumerate(seen):
        assert values.shape == (4, *vector.values.shape)
        assert not torch.equal(values[0], values[1])
        for row in range(4):
            for at, index in enumerate(drawn):
                before = model.encode(ASKED[index].prompt).tolist()
                answer = model.encode(ASKED[index].prompt + ASKED[index].answer).tolist()[len(before) :]
                want = 0.0
                for n, token in enumerate(answer):
                    changes = plain.patched("z", masks[row], values[row][None], (len(before) - 1,))
                    logits = plain.logits(hf, family, before + answer[:n], changes)
                    want += cross_entropy(logits[None], torch.tensor([token])).item()
                assert losses[at, row].item() == pytest.approx(want, abs=2e-5)
        assert vector.metadata["losses"][step] == pytest.approx(losses.mean().item(), abs=1e-6)


def test_one_pass_a_step(model):
    """32 rollouts with values of their own cost one forward of 32 last tokens."""
    tokens = []
    handle = model.hf.get_input_embeddings().register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    try:
        search(model, steps=3, rollouts=32, on_step=lambda step: tokens.append(f"step {step.step}"))
    finally:
        handle.remove()
    first, second = tokens.index("step 1"), tokens.index("step 2")
    assert tokens[first + 1 : second] in ([32], [33])  # one more where rows come in late


def test_the_policy_gradient():
    """Of Adam's first moment after a step: the gradient of REINFORCE's objective, by hand."""
    search = Choice(2, 3, lr=0.1, seed=0)
    with torch.no_grad():
        search.theta.copy_(torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 0.0]]))
    p = search.theta.detach().softmax(dim=-1)
    chosen, losses = torch.tensor([[0, 1], [2, 1], [1, 0], [0, 0]]), torch.tensor([1.0, 3.0, 2.0, 0.5])
    search.update(chosen, losses)
    advantage = (losses - losses.mean()) / (losses.std() + 1e-3)
    taken = torch.nn.functional.one_hot(chosen, 3).float()  # [rollouts, heads, centroids]
    want = (advantage[:, None, None] * (taken - p)).sum(dim=0)  # of log p
    assert torch.allclose(search.adam.state[search.theta]["exp_avg"], 0.1 * want, atol=1e-6)
    assert search.theta[0, 2] < -1 < 0 < search.theta[0, 0]  # the worst less likely, the best more


def test_the_best_choice_is_found():
    """Losses that are a sum over heads of what each carries: softmax ends at the least of them."""
    search = Choice(4, 5, lr=0.1, seed=0)
    costs = torch.rand(4, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(200):
        chosen = search.draw(32)
        search.update(chosen, costs.gather(1, chosen.T).sum(dim=0))
    candidates = search.draw_candidates(10)
    assert candidates.shape == (10, 4)
    assert torch.equal(candidates[0], costs.argmin(dim=1))


def test_a_bank():
    bank = Bank(torch.tensor([4, 1]), torch.arange(12.0).view(2, 3, 2), -torch.ones(2, 3, 2))
    assert bank.mask.tolist() == [[False, True, False], [False, True, False]]
    values = bank.values(torch.tensor([[2, 0], [0, 1]]))
    assert values[:, 1, 1].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert values[:, 0, 1].tolist() == [[6.0, 7.0], [8.0, 9.0]]
    values[:, [1, 0], [1, 1]] = -1
    assert (values == -1).all()
    assert (bank.means == -1).all()


def test_clusters_are_found(random):
    """Well apart: their means, in every set; and what Lloyd's iteration ends at does not move."""
    centres = 20 * torch.randn(3, 1, 4, 2, generator=random)
    points = (centres + 0.1 * torch.randn(3, 15, 4, 2, generator=random)).transpose(1, 2)  # [sets, clusters, points, 2]
    found = kmeans(points.flatten(1, 2), 4, random)
    want = points.mean(dim=2)
    assert torch.cdist(found, want).amin(dim=1).max() < 1e-4
    cluttered = torch.randn(1, 60, 3, generator=random)
    centroids = kmeans(cluttered, 5, random)[0]
    nearest = torch.cdist(cluttered[0], centroids).argmin(dim=1)
    for k in range(5):
        assert torch.allclose(cluttered[0][nearest == k].mean(dim=0), centroids[k], atol=1e-5)


def test_clusters_far_from_the_origin(random):
    """More points than torch takes differences of by itself."""
    near = torch.randn(1, 60, 8, generator=random) + 20 * (torch.arange(60) % 3)[:, None]
    centroids = kmeans(1e-3 * near + 100, 3, torch.Generator().manual_seed(0))
    apart = torch.cdist(1e-3 * near.double() + 100, centroids.double()).amin(dim=-1)
    assert apart.max() < 0.01  # of clusters 0.05 apart


def test_clusters_of_equal_points(random):
    points = torch.ones(2, 6, 3)
    assert torch.equal(kmeans(points, 4, random), torch.ones(2, 4, 3))


def same(one, other):
    """Bit for bit."""
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.mask, other.mask)
    for key in ("choices", "losses", "validation_loss"):
        assert one.metadata[key] == other.metadata[key]


def test_same_seed_same_result(model):
    first = search(model, seed=1)
    torch.manual_seed(123)  # the caller's random numbers play no part
    same(search(model, seed=1), first)
    assert search(model, seed=2).metadata["losses"] != first.metadata["losses"]


def test_interrupted_and_resumed(model, tmp_path):
    whole, checkpoint = search(model, steps=9), tmp_path / "search.safetensors"

    def stop(step):
        if step.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, steps=9, checkpoint=checkpoint, checkpoint_every=2, on_step=stop)
    steps = []
    options = dict(steps=9, checkpoint=checkpoint, checkpoint_every=2)
    same(search(model, **options, on_step=lambda step: steps.append(step.step)), whole)
    assert steps == [7, 8, 9]
    steps.clear()
    same(search(model, **options, on_step=steps.append), whole)
    assert not steps


def test_it_is_a_task_vector(model, tmp_path):
    """Saved, loaded, moved nowhere; patched as any other."""
    vector = search(model)
    vector.save(tmp_path / "stv.safetensors")
    loaded = engine.TaskVector.load(tmp_path / "stv.safetensors", model)
    assert loaded.metadata["method"] == "stv"
    assert torch.equal(loaded.probabilities, vector.mask.float())
    got = engine.patch(model, ASKED[0].prompt, heads=loaded.heads, values=loaded.values)
    hf = plain.made("llama")
    changes = plain.patched("z", vector.mask, vector.values[None])
    want = plain.logits(hf, "llama", model.encode(ASKED[0].prompt), changes)
    assert torch.allclose(got[0], want, atol=1e-5)


def test_validation_loss_is_that_of_the_vector(model):
    vector = search(model)
    targets = [engine.tasks.first_token(model, example) for example in ASKED[:3]]
    logits = engine.naive.patch(model, [e.prompt for e in ASKED[:3]], heads=vector.mask, values=vector.values)
    want = cross_entropy(logits[:, 0], torch.tensor(targets)).item()
    assert vector.metadata["validation_loss"] == pytest.approx(want, abs=1e-5)


def test_frozen_and_half_models():
    """Weights that require no gradient; bfloat16."""
    hf = zoo.tiny("llama").bfloat16().requires_grad_(False)
    vector = search(models.wrap(hf, zoo.tiny_tokenizer(), name="half"))
    assert vector.values.dtype == torch.float32
    assert all(weight.grad is None for weight in hf.parameters())
