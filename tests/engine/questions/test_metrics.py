"""Every metric against its formula written out over plain numbers; NaN never passes for a score."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import engine
from engine.questions.metrics import METRICS, check_scores, read_metric

ROWS, VOCAB, TARGET, OTHER = 4, 11, 3, 7


@pytest.fixture
def logits(random):
    return 3 * torch.randn(ROWS, VOCAB, generator=random, dtype=torch.float64)


@pytest.fixture
def clean(random):
    return 3 * torch.randn(VOCAB, generator=random, dtype=torch.float64)


def score(metric, logits, clean, target=TARGET, other=OTHER):
    read = read_metric(metric, [TARGET], [OTHER], prompts=1, vocab_size=VOCAB)
    return read(logits, target, other, clean)


def softmax(row):
    whole = math.fsum(math.exp(x) for x in row)
    return [math.exp(x) / whole for x in row]


FORMULAS = {
    "probability": lambda row, clean: softmax(row)[TARGET],
    "log_probability": lambda row, clean: math.log(softmax(row)[TARGET]),
    "logit_difference": lambda row, clean: row[TARGET] - row[OTHER],
    "rank": lambda row, clean: sorted(row, reverse=True).index(row[TARGET]),
    "kl": lambda row, clean: math.fsum(
        p * math.log(p / q) for p, q in zip(softmax(clean), softmax(row), strict=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
def test_formula(logits, clean, metric):
    got = score(metric, logits, clean)
    want = [FORMULAS[metric](row, clean.tolist()) for row in logits.tolist()]
    assert got.tolist() == pytest.approx(want, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_precision(logits, clean, metric, given, kept):
    """Half precision is widened before anything is computed, float64 stays."""
    logits, clean = logits.to(given), clean.to(given)
    got = score(metric, logits, clean)
    assert got.dtype == kept
    assert torch.equal(got, score(metric, logits.to(kept), clean.to(kept)))


def test_kl(logits, clean):
    """Of the clean distribution from the patched one, not the other way round; nothing where nothing changed."""
    before = Categorical(logits=clean)
    want = kl_divergence(before, Categorical(logits=logits))
    assert torch.allclose(score("kl", logits, clean), want, rtol=1e-12)
    assert not torch.allclose(kl_divergence(Categorical(logits=logits), before), want, rtol=0.01)
    assert torch.equal(score("kl", clean[None].float(), clean.float()), torch.zeros(1))


def test_kl_with_tokens_that_cannot_be(logits, clean):
    """Logits of -inf (padding of a vocabulary) are of no consequence."""
    padding = torch.tensor([-torch.inf, -torch.inf], dtype=torch.float64)
    padded = score("kl", torch.cat([logits, padding.expand(ROWS, 2)], dim=1), torch.cat([clean, padding]))
    assert torch.allclose(padded, score("kl", logits, clean), rtol=1e-12)


def test_rank_counts_what_is_likelier(logits, clean):
    logits[0, TARGET] = logits[0].max() + 1
    logits[1, TARGET] = logits[1].min() - 1
    logits[2] = 5.0  # no token is likelier than another
    assert score("rank", logits, clean)[:3].tolist() == [0, VOCAB - 1, 0]


@pytest.mark.parametrize("metric", ["probability", "log_probability", "rank", "kl"])
@pytest.mark.parametrize("token", [TARGET, OTHER])
def test_nan_logits_give_nan(logits, clean, metric, token):
    """Also where only another token's logit is broken: a rank of 0 would be a perfect score."""
    logits[1, token] = torch.nan
    assert score(metric, logits, clean).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("metric", ["probability", "log_probability", "logit_difference", "kl"])
def test_gradients(logits, clean, metric):
    """Attribution needs them; that of the log-probability is onehot - p."""
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(score(metric, leaf, clean).sum(), leaf)
    assert gradient.isfinite().all()
    assert (gradient != 0).any(dim=1).all()
    if metric == "log_probability":
        assert torch.allclose(gradient, torch.eye(VOCAB)[TARGET].double() - logits.detach().softmax(dim=-1))


def test_function_of_ones_own(logits, clean):
    """Is given the logits alone, widened, and returns a number a row."""
    seen = []

    def entropy(x):
        seen.append(x.dtype)
        return Categorical(logits=x).entropy()

    got = read_metric(entropy, prompts=1, vocab_size=VOCAB)(logits.bfloat16(), None, None, clean)
    assert seen == [torch.float32]
    assert torch.equal(got, Categorical(logits=logits.bfloat16().float()).entropy())


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda logits: logits.mean(), ValueError, ("[4, 11]", "shape [4]", "got []")),
        (lambda logits: logits[:2, 0], ValueError, ("shape [4]", "got [2]")),
        (lambda logits: logits.argmax(dim=-1), TypeError, ("floating-point tensor [rows]", "torch.int64")),
        (lambda logits: logits[:, 0].tolist(), TypeError, ("floating-point tensor [rows]", "list")),
    ],
)
def test_function_of_ones_own_that_returns_something_else(logits, clean, function, error, words):
    read = read_metric(function, prompts=1, vocab_size=VOCAB)
    with pytest.raises(error) as caught:
        read(logits, None, None, clean)
    assert all(word in str(caught.value) for word in words)


def test_on_a_model(model, draw):
    """Rows of a real patch, and the clean run from the same model."""
    heads, values = draw(model, rows=5)
    heads[0] = False
    rows = engine.patch(model, "Q: hot\nA:", heads=heads, values=values)
    clean = engine.patch(model, "Q: hot\nA:", heads=None, values=None)[0]
    divergence = read_metric("kl", prompts=1, vocab_size=97)(rows, None, None, clean)
    assert abs(divergence[0]) < 1e-6  # nothing was patched
    assert (divergence[1:] > 1e-6).all()
    best = int(rows[3].argmax())
    assert read_metric("rank", [best], prompts=1, vocab_size=97)(rows, best, None, clean)[3] == 0


def test_check_scores():
    scores = torch.zeros(5, 3, 2)
    check_scores(scores, "rank")
    scores[1, 2, 0], scores[4, 0, 1] = torch.nan, -torch.inf
    with pytest.raises(ValueError, match=r"^rank is NaN or infinite for prompts \[1, 4\]$"):
        check_scores(scores, "rank")
    with pytest.raises(ValueError, match=r"prompts \[21, 24\]$"):
        check_scores(scores, "rank", prompts=range(20, 25))
    with pytest.raises(ValueError, match=r"prompts \[0, 1, .*, 9, \.\.\.\] \(12 in all\)$"):
        check_scores(torch.full((12,), torch.nan), "rank")
