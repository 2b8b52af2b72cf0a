"""What is found to run sample by sample: models whose parameters are read in a way that has no form for many."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from engine import weights
from engine.weights import looking
from tests.engine.weights.networks import draw, finetuned, off
from tests.engine.weights.test_forward import found_apart


def against_naive(base, x, count=2, c=None):
    """The model, left as it was, against the loop over copies of it."""
    vectors = weights.task_vectors(base, *finetuned(base, count))
    c = draw(vectors, len(x)) if c is None else c
    want = weights.naive.forward(deepcopy(base), x, vectors, c)
    before = {key: value.clone() for key, value in base.named_parameters()}
    got = weights.forward(base, x, vectors, c)
    assert off(got, want) <= 1e-12
    assert all(torch.equal(value, before[key]) for key, value in base.named_parameters())
    return got


class Listed(nn.Module):
    """Parameters of a module that is never called, too large to be merged for more than 16 samples at once."""

    def __init__(self, held=nn.ParameterList):
        super().__init__()
        w = nn.Parameter(torch.randn(6, 4))
        self.held = held({"w": w}) if held is nn.ParameterDict else held([w])

    def forward(self, x):
        w = self.held["w"] if isinstance(self.held, nn.ParameterDict) else self.held[0]
        return torch.einsum("bi,io->bo", x, w)


class Counted(Listed):
    """Its state is another one after every forward."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("batch", [16, 17])
@pytest.mark.parametrize(
    "made", [Listed, Counted, lambda: nn.Sequential(Listed(nn.ParameterDict), nn.Linear(4, 3))],
    ids=["list", "counted", "dict"],
)  # fmt: skip
def test_parameters_of_a_module_that_is_never_called(made, batch):
    torch.manual_seed(0)
    against_naive(made().double(), torch.randn(batch, 6, dtype=torch.float64))


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
def test_weights_that_are_computed_anew_in_training(norm):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), norm(nn.Linear(4, 3))).double().train()
    against_naive(base, torch.randn(5, 4, dtype=torch.float64))


def test_nested_tensors_that_do_not_begin_with_samples():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, extra):
            return self.inner(x) * extra[0].sum()

    base = Mixed()
    vectors = weights.task_vectors(base, Mixed())
    for extra in ([torch.arange(7.0)], {"a": (torch.arange(7.0),)}, [torch.tensor(1.0)]):
        for verb in (weights.forward, weights.naive.forward):
            with pytest.raises(ValueError, match="5 samples, each a row of every input: got input 'extra' of shape"):
                verb(base, {"x": torch.randn(5, 4), "extra": extra}, vectors, draw(vectors, 5, dtype=torch.float32))


class Experts(nn.Module):
    """Each token goes to the expert that its first number asks for."""

    def __init__(self, how="nonzero", met=False):
        super().__init__()
        self.experts, self.how, self.met = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), how, met

    def forward(self, x):
        flat = x.reshape(-1, 4)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            asked = (flat[:, 0] > 0) == bool(e)
            if self.how == "mask":
                y[asked] = expert(flat[asked])
                continue
            at = asked.nonzero()[:, 0] if self.how == "nonzero" else torch.where(asked)[0]
            if at.numel() or not self.met:
                y = y.index_add(0, at, expert(flat[at]))
        return y.view_as(x)


class Sorted(nn.Module):
    """Tokens in order, so that each expert has its own together; a selection, and its inverse."""

    def __init__(self, how="argsort"):
        super().__init__()
        self.inner, self.outer, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x):
        flat = x.reshape(-1, 4)
        first = flat[:, 0]
        order = first.argsort() if self.how == "argsort" else first.topk(len(flat), largest=False).indices
        rows = flat.gather(0, order[:, None].expand(-1, 4)) if self.how == "gather" else flat.index_select(0, order)
        scale = torch.linspace(1, 2, 2, dtype=x.dtype).repeat(len(x))[:, None]
        y = torch.empty_like(flat).index_copy(0, order, self.inner(rows))
        return self.outer(y).view_as(x) * scale.view(len(x), 2, 1)


class Unpadded(nn.Module):
    """What is padding does not go through the layer."""

    def __init__(self, how="mask"):
        super().__init__()
        self.table, self.inner, self.outer, self.how = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3), how

    def forward(self, ids):
        h = self.table(ids)
        kept = ids != 0
        if self.how == "mask":
            rows = self.inner(h[kept])
        elif self.how == "select":
            rows = self.inner(h.masked_select(kept[..., None]).view(-1, 4))
        else:
            rows = self.inner(h[torch.where(kept)])
        return self.outer(torch.zeros_like(h).masked_scatter(kept[..., None], rows).tanh())


def tokens(signs):
    x = torch.randn(len(signs), len(signs[0]), 4, dtype=torch.float64)
    x[..., 0] = x[..., 0].abs() * torch.tensor(signs)
    return x


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", ["nonzero", "where", "mask"])
def test_experts_that_pick_their_tokens(how, inside):
    """Three samples have a token for each, a fourth and a fifth two for one: together as many."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Experts(how), nn.Linear(4, 4)) if inside else Experts(how)
    if inside:
        with torch.no_grad():
            for layer in base[:2]:
                layer.weight.copy_(torch.eye(4))
                layer.bias.zero_()
    against_naive(base.double(), tokens([[1, -1], [1, -1], [1, -1], [1, 1], [-1, -1]]))
    assert found_apart(base) == ({"2"} if inside else {""})


def test_experts_that_are_not_met_in_what_is_looked_at():
    torch.manual_seed(0)
    base = Experts(met=True).double()
    against_naive(base, tokens([[1, 1], [1, 1], [1, 1], [-1, -1], [-1, 1]]))


@pytest.mark.parametrize("how", ["argsort", "topk", "gather"])
def test_rows_put_in_order(how):
    """In order already, as far as is looked at."""
    torch.manual_seed(0)
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    x[..., 0] = torch.tensor([[1, 2], [3, 4], [5, 6], [12, 9], [7, 11], [10, 8]])
    base = nn.Sequential(Sorted(how), nn.Linear(4, 4)).double()
    against_naive(base, x)
    assert found_apart(base) == {"0"}


@pytest.mark.parametrize("how", ["mask", "select", "where"])
def test_padding_that_is_dropped(how):
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 0, 0], [3, 4, 0, 0], [1, 3, 0, 0], [1, 0, 0, 0], [4, 2, 2, 0]])
    against_naive(Unpadded(how).double(), ids)


class Harmless(nn.Module):
    """Data picks the entry of a table, the token of its own sample, a value in place of others: rows stay."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.register_buffer("scales", torch.rand(5, 4))

    def forward(self, ids):
        ids = ids.clone()
        ids[ids == 4] = 1
        h = self.table(ids) * self.scales[ids] * self.scales.index_select(0, ids.flatten()).view(*ids.shape, 4)
        h = h.gather(1, ids.argsort(dim=1)[..., None].expand_as(h))
        return self.inner(h[torch.arange(len(ids)), ids.argmax(dim=1)])


def test_what_data_may_pick():
    torch.manual_seed(0)
    base = Harmless().double()
    against_naive(base, torch.randint(5, (6, 3)))
    assert found_apart(base) == set()


class Flexible(nn.Module):
    """Its attention is one operator of higher order."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        q = self.inner(x)[:, None]
        return self.outer(flex_attention(q, x[:, None], q)[:, 0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_operators_of_higher_order():
    torch.manual_seed(0)
    base = Flexible().double()
    with torch.no_grad():
        against_naive(base, torch.randn(5, 8, 16, dtype=torch.float64))
    assert found_apart(base) == set()


class Clipped(nn.Module):
    """Its forward writes to its weights."""

    def __init__(self, how="data"):
        super().__init__()
        self.inner, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        if self.how == "data":
            self.inner.weight.data.clamp_(-0.2, 0.2)
        elif self.how == "no_grad":
            with torch.no_grad():
                self.inner.weight[:, :2] *= 0.5
        elif self.training:
            self.inner.weight.data.clamp_(-0.2, 0.2)
        return self.inner(x)


@pytest.mark.parametrize("how", ["data", "no_grad", "training"])
@pytest.mark.parametrize("single", [False, True])
def test_a_forward_that_writes_to_its_weights(how, single):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(4, 4), Clipped(how)).double().train(), torch.randn(5, 4, dtype=torch.float64)
    if single:
        x = x[:1]
    against_naive(base, x)
    assert single or "1" in found_apart(base)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_tables_whose_rows_are_made_shorter(kind, inference):
    torch.manual_seed(0)
    base = nn.Sequential(kind(6, 4, max_norm=1.0), nn.Linear(4, 3)).double()
    with torch.inference_mode(inference):
        against_naive(base, torch.randint(6, (5, 2)))
    assert found_apart(base) == {"0"}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("got", "want", "said"),
    [
        ([NAN, NAN], [1.0, 1.0], "NaN in other places"),
        ([1.0, 1.0], [1.0, NAN], "NaN in other places"),
        ([INF, 1.0], [3.0, 1.0], "inf off"),
        ([INF, 1.0], [-INF, 1.0], "inf off"),
        ([2.0, 1.0], [2.5, 1.0], "5.0e-01 off"),
        ([2, 1], [2, 3], "1 other values"),
        ([True, False], [True, True], "1 other values"),
        ([1j, 1.0], [1j, 2.0], "1.0e+00 off"),
        ([2, 1], [2.0, 1.0], "is of torch.int64"),
        ([NAN, -INF, 1.0], [NAN, -INF, 1.0 + 1e-7], ""),
        ([1, 2], [1, 2], ""),
        ([], [], ""),
    ],
)
def test_what_differs(got, want, said):
    found = looking._differs(torch.tensor(got), torch.tensor(want))
    assert said in found if said else not found


class Chosen(nn.Module):
    """Its samples see each other, in an answer of integers, or of NaN."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        y = self.inner(x)
        beyond = y - 2 * y.mean(dim=0)  # alone: -y
        return beyond.argmax(dim=1) if self.how == "argmax" else (beyond * y).neg().sqrt() * 0


@pytest.mark.parametrize(("how", "said"), [("argmax", "other values"), ("nan", "NaN")])
def test_integers_and_nan_of_samples_that_see_each_other(how, said):
    torch.manual_seed(0)
    base, x = Chosen(how).double(), torch.randn(5, 4, dtype=torch.float64)
    vectors = weights.task_vectors(base, *finetuned(base, 2))
    c = draw(vectors, 5)
    want = weights.naive.forward(base, x, vectors, c)
    with pytest.warns(UserWarning, match=said):
        got = weights.forward(base, x, vectors, c)
    assert torch.equal(got, want)
