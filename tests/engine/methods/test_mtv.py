"""The search finds planted heads, follows its formula, and records what it did."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import engine
import models
from engine import Example
from engine.distributed import World
from engine.methods import trials
from engine.methods.estimators import ESTIMATORS, gated
from engine.methods.mtv import PRESETS, Search
from models import zoo
from tests.searching import ESTIMATOR, EXAMPLES, PRESET, same, search


@ESTIMATOR
def test_losses_of_a_step_are_those_of_naive_patching(model, monkeypatch, estimator):
    """Every rollout on every prompt of the step; by gates, each prompt has its own."""
    drawn = []
    for name in ("draw_examples", "draw", "draw_gates"):
        plain = getattr(Search, name)

        def record(self, *args, plain=plain):
            drawn.append(plain(self, *args))
            return drawn[-1]

        monkeypatch.setattr(Search, name, record)
    vector = search(model, steps=1, estimator=estimator, prompts_per_step=3, validation=EXAMPLES)
    indices, rows = drawn[:2]
    means, losses = vector.values, []
    for n, index in enumerate(indices):
        prompt, target = EXAMPLES[index].prompt, engine.tasks.first_token(model, EXAMPLES[index])
        if estimator == "relaxed":
            ids = model.encode(prompt)[None]
            logits = model.forward(ids, gated(model, rows[n], means)).detach()
        else:
            masks = rows[n].bool() if estimator == "straight_through" else rows
            logits = engine.naive.patch(model, prompt, heads=masks, values=means)
        losses.append(cross_entropy(logits, torch.full((len(logits),), target)).item())
    assert vector.metadata["losses"] == [pytest.approx(sum(losses) / 3, abs=1e-5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(estimator="relaxed", rollouts=2), "all rollouts would be one: got rollouts=2"),
        (dict(estimator="leave_one_out", rollouts=1), "rollouts >= 2"),
        (dict(estimator="straight_through", rollouts=0), "rollouts >= 1"),
        (dict(prompts_per_step=0), "prompts_per_step >= 1, got prompts_per_step=0"),
        (dict(estimator="relaxed", prompts_per_step=2, at_once=3), "2 prompts shared by 1 rank"),
        (
            dict(estimator="relaxed", prompts_per_step=2, world=World(0, 3)),
            "at least one prompt for each of 3 ranks, got prompts_per_step=2",
        ),
    ],
)
def test_options_that_do_not_go_together(model, options, message):
    with pytest.raises(ValueError, match=message):
        search(model, **options)


def test_an_unknown_estimator():
    with pytest.raises(ValueError, match=r"estimator must be one of \['reinforce', .*got 'guess'"):
        engine.mtv.read_options(preset="paper", estimator="guess")


def test_probabilities_stay_inside(model):
    """The reference keeps them within [0.001, 0.999], even at a step size that would take them far beyond."""
    p = search(model, preset="reference", lr=10.0).probabilities
    assert p.min() == torch.tensor(1e-3)
    assert p.max() == 1 - torch.tensor(1e-3)


@PRESET
def test_update_is_reinforce(preset):
    """The gradient of log p(lambda) is lambda - p, weighted by the advantage; one step of Adam follows."""
    chosen = PRESETS[preset]
    made = Search(chosen, (3, 6), lr=0.1, seed=0)
    theta = made.theta.detach().clone()
    masks = made.draw(16)
    losses = torch.rand(16, generator=made.random) * 3
    made.update(masks, losses)

    p = 1 / (1 + (-theta).exp())
    score = masks.float() - p  # [16, 3, 6]
    if chosen.normalise:
        advantage = (losses - losses.mean()) / (losses.std() + 1e-3)
        gradient = (score * advantage[:, None, None]).sum(dim=0)
    else:
        gradient = (score * losses[:, None, None]).mean(dim=0)
    assert torch.allclose(made.adam.state[made.theta]["exp_avg"], 0.1 * gradient, rtol=1e-3, atol=1e-6)
    # Adam's first step from zero moments: lr times the sign, up to its epsilon.
    want = theta - 0.1 * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(made.theta.detach(), want, rtol=1e-4, atol=1e-5)
    assert made.losses == [pytest.approx(losses.mean().item())]


def test_presets():
    """What the paper and its code say, where they differ."""
    paper, reference = PRESETS["paper"], PRESETS["reference"]
    assert (paper.steps, reference.steps) == (100, 600)
    shape = (40, 50)
    assert Search(reference, shape, 0.1, 0).theta.unique().tolist() == [-1.0]
    normal = Search(paper, shape, 0.1, 0).theta
    assert abs(normal.mean()) < 0.1
    assert abs(normal.std() - 1) < 0.1
    made = Search(paper, shape, 0.1, 0)
    assert [made.losses.append(0.0) or made.draw_example(3) for _ in range(5)] == [1, 2, 0, 1, 2]
    made = Search(reference, shape, 0.1, 0)
    drawn = [made.draw_example(3) for _ in range(50)]
    assert set(drawn) == {0, 1, 2}
    assert drawn != sorted(drawn)


def test_draws_follow_the_probabilities():
    made = Search(PRESETS["paper"], (3, 6), 0.1, 0)
    often = made.draw(4000).float().mean(dim=0)
    assert (often - made.theta.sigmoid()).abs().max() < 0.05


@pytest.fixture
def planted():
    """A task that one head solves: its value makes the model say the answer, all others keep what they say anyway."""
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="planted")
    with torch.no_grad():
        model.hf.lm_head.weight *= 20  # a random model is sure of nothing; this one is of something
    prompt, head = "Q: hot\nA:", (1, 4)
    means = engine.capture(model, [prompt])[0]
    means[head] = 20 * torch.randn(8, generator=torch.Generator().manual_seed(3))
    logits = engine.naive.patch(model, prompt, heads=[head], values=means)
    answer = int(logits.argmax())
    before = engine.naive.patch(model, prompt, heads=None, values=None)
    gain = cross_entropy(before, torch.tensor([answer])) - cross_entropy(logits, torch.tensor([answer]))
    assert gain > 2  # the plant is worth finding
    return model, head, [Example(prompt, answer)], means


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "relaxed"])
@PRESET
def test_finds_the_planted_head(planted, preset, estimator):
    model, head, examples, means = planted
    vector = engine.mtv.extract(
        model, examples, means, preset=preset, steps=60, estimator=estimator, prompts_per_step=2, progress=False
    )
    start = Search(PRESETS[preset], (3, 6), 0.1, 0).probabilities()
    assert vector.probabilities[head] > start[head]
    assert vector.probabilities[head] > 0.9
    assert head in vector.heads
    losses = vector.metadata["losses"]
    assert sum(losses[-10:]) < sum(losses[:10])


@PRESET
def test_relaxed_lowers_the_loss_of_gates(planted, preset):
    """Which need not be that of heads: the plant is no better by halves, and may be missed."""
    model, _, examples, means = planted
    options = dict(preset=preset, estimator="relaxed", progress=False)
    losses = engine.mtv.extract(model, examples, means, steps=60, **options).metadata["losses"]
    assert losses[-1] < losses[0]
    gates = Search(PRESETS[preset], (3, 6), 0.1, 0).probabilities()
    logits = model.forward(model.encode(examples[0].prompt)[None], gated(model, gates[None], means))
    want = cross_entropy(logits, torch.tensor([examples[0].answer])).item()
    assert losses[0] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("given", [True, False])
def test_validation_decides_among_candidates(model, monkeypatch, given):
    """The heads kept have the lowest mean loss of all candidates, by naive patching, on examples not searched on."""
    drawn, searched = [], []
    draw = Search.draw_candidates

    def record(self, *options):
        drawn.append(draw(self, *options))
        return drawn[-1]

    monkeypatch.setattr(Search, "draw_candidates", record)
    monkeypatch.setattr(
        trials, "PrefixPool", lambda model, prompts: searched.append(prompts) or engine.PrefixPool(model, prompts)
    )
    validation = [Example("Q: xyz\nA:", " x"), Example("Q: q\nA:", " w"), Example("Hello", 50)] if given else None
    vector = search(model, steps=3, validation=validation)
    candidates = drawn[-1]
    assert len(candidates) == PRESETS["reference"].candidates == 10
    used = validation or [one for one in EXAMPLES if one.prompt not in searched[0]]
    assert len(searched[0]) == (len(EXAMPLES) if given else len(EXAMPLES) - len(EXAMPLES) // 3)
    assert used
    logits = engine.naive.patch(model, [e.prompt for e in used], heads=candidates, values=vector.values)
    targets = torch.tensor([engine.tasks.first_token(model, e) for e in used])
    losses = torch.stack([cross_entropy(logits[:, row], targets) for row in range(10)])
    assert losses.max() - losses.min() > 1e-3  # there is something to decide
    assert torch.equal(vector.mask, candidates[losses.argmin()])
    assert vector.metadata["validation_loss"] == pytest.approx(losses.min().item(), abs=1e-5)


def test_the_paper_keeps_one_draw(model, monkeypatch):
    sizes = []
    draw = Search._draw
    monkeypatch.setattr(Search, "_draw", lambda self, p, n: sizes.append(n) or draw(self, p, n))
    search(model, steps=3, preset="paper")
    assert sizes == [8, 8, 8, 1]


def test_the_last_draw_is_not_clamped_and_may_be_of_likely_heads_only():
    """Heads of probability 1e-9 are never drawn, those up to the threshold neither."""
    made = Search(PRESETS["reference"], (3, 6), 0.1, 0)
    with torch.no_grad():
        made.theta[:] = -20.0
        made.theta[1], made.theta[2] = 1.0, 20.0  # 0.73 and 1
    counts = sum(made.draw_candidates(0.0).sum(dim=(0, 2)) for _ in range(50))
    assert counts[0] == 0
    assert 0.6 < counts[1] / 3000 < 0.85
    assert counts[2] == 3000
    assert made.draw_candidates(0.8).any(dim=2).tolist() == [[False, False, True]] * 10
    assert made.draw(1000)[:, 0].any()  # on the way they are tried: the clamp


def test_thresholds_in_place_of_draws(model):
    """Of the heads above 1/11, 2/11, ...: those of the least loss on the validation examples, by naive patching."""
    vector = search(model, steps=15, candidates="thresholds", validation=EXAMPLES, lr=0.3)
    masks = torch.stack([vector.probabilities > n / 11 for n in range(1, 11)])
    assert len(masks.flatten(1).unique(dim=0)) > 3
    targets = torch.tensor([engine.tasks.first_token(model, example) for example in EXAMPLES])
    logits = engine.naive.patch(model, [e.prompt for e in EXAMPLES], heads=masks, values=vector.values)
    losses = torch.stack([cross_entropy(logits[:, row], targets) for row in range(10)])
    assert vector.metadata["validation_loss"] == pytest.approx(losses.min().item(), abs=1e-5)
    assert torch.equal(vector.mask, masks[losses.argmin()])
    assert vector.metadata["candidates"] == "thresholds"
    with_threshold = search(model, steps=15, candidates="thresholds", threshold=0.6, validation=EXAMPLES, lr=0.3)
    assert (vector.probabilities[with_threshold.mask] > 0.6).all()


@pytest.mark.parametrize("loss", ["answer", "token_mean"])
@pytest.mark.parametrize("estimator", ["reinforce", "straight_through"])
def test_the_loss_of_whole_answers(model, monkeypatch, estimator, loss):
    """One step, answers of several lengths: against naive patching of the prompt with the answer behind it."""
    drawn = []
    for name in ("draw_examples", "draw", "draw_gates"):
        plain = getattr(Search, name)
        monkeypatch.setattr(
            Search, name, lambda self, *args, plain=plain: drawn.append(plain(self, *args)) or drawn[-1]
        )
    examples = [Example("Q: hot\nA:", " cold"), Example("Q: up\nA:", "no"), Example("Q: big\nA:", "s")]
    means = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    by_gates = estimator == "straight_through"
    vector = engine.mtv.extract(
        model, examples, means, steps=1, estimator=estimator, rollouts=None if by_gates else 4, prompts_per_step=3,
        loss=loss, validation=examples, progress=False,
    )  # fmt: skip
    indices, rows = drawn[:2]
    losses = []
    for n, index in enumerate(indices):
        prompt, answer = model.encode(examples[index].prompt), model.tokenizer(examples[index].answer)["input_ids"]
        ids = torch.cat([prompt, torch.tensor(answer)])
        masks, total = rows[n].bool() if by_gates else rows, 0
        for k, token in enumerate(answer):
            logits = engine.naive.patch(
                model, ids[: len(prompt) + k], heads=masks, values=means, positions=len(prompt) - 1
            )
            total = total + cross_entropy(logits, torch.full((len(masks),), token), reduction="none")
        losses.append((total / (len(answer) if loss == "token_mean" else 1)).mean().item())
    assert vector.metadata["losses"] == [pytest.approx(sum(losses) / 3, rel=1e-5)]
    assert vector.metadata["loss"] == loss


def test_what_is_recorded(model):
    seen = []
    vector = search(model, steps=4, seed=9, on_step=seen.append)
    assert [(s.step, s.steps, s.loss) for s in seen] == [(i + 1, 4, x) for i, x in enumerate(vector.metadata["losses"])]
    assert seen[-1].heads == pytest.approx(vector.probabilities.sum().item())
    assert all(s.rollouts_per_second > 0 for s in seen)
    assert torch.equal(seen[-1].probabilities, vector.probabilities)
    kept = {key: vector.metadata[key] for key in ("method", "model", "preset", "steps", "rollouts", "lr", "seed")}
    assert kept == dict(
        method="mtv", model="tiny-llama", preset="reference", steps=4, rollouts=8, lr=0.1, seed=9
    )  # fmt: skip
    assert set(vector.metadata["versions"]) == {"python", "headpatch", "torch", "transformers"}
    vector.check(model)


def test_losses_that_are_not_finite():
    """A model that overflows says so, instead of searching on by NaN."""
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="broken")
    with torch.no_grad():
        model.hf.lm_head.weight[3] = float("nan")
    expected = pytest.raises(ValueError, match=r"step 0: the loss of example \d .*is not finite")
    with pytest.warns(UserWarning, match="no way can be compared"), expected:
        search(model)


@ESTIMATOR
def test_works_where_rows_are_not_packed(tiny, estimator):
    options = dict(steps=3, estimator=estimator, prompts_per_step=2)
    same(search(tiny("unpacked"), **options), search(tiny("unpacked"), **options))
