"""Small modules with every kind of layer, models finetuned from them, and the oracle: none of it the engine's."""

from copy import deepcopy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from engine import weights

BATCH, COUNT = 7, 3


class Vision(nn.Module):
    """Class token and places held by the model itself, patches, scales, a bias-free head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 10, 12))
        self.more, self.scale = nn.Parameter(torch.randn(10, 12)), nn.Parameter(torch.randn(12))
        self.kinds = nn.Embedding(10, 12)
        self.norm, self.wide, self.narrow = nn.LayerNorm(12), nn.Linear(12, 29), nn.Linear(29, 12)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.places
        x = x + self.more + self.kinds(torch.arange(10))
        return self.head((x + self.scale * self.narrow(self.wide(self.norm(x)).relu()))[:, 0])


class Convolutions(nn.Module):
    """Grouped, strided, transposed; norms over batch, groups and instances."""

    def __init__(self):
        super().__init__()
        self.all = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=2, padding=(1, 0)), nn.GroupNorm(2, 8), nn.PReLU(8),
            nn.ConvTranspose2d(8, 4, 2), nn.InstanceNorm2d(4, affine=True), nn.Flatten(2),
            nn.Conv1d(4, 4, 5, dilation=2, padding="same"), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.all(x)


class Attention(nn.Module):
    """torch's own encoder, and a recurrence: modules that run sample by sample."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        self.recurrence, self.head = nn.LSTM(8, 6, batch_first=True), nn.RMSNorm(6)

    def forward(self, x):
        return self.head(self.recurrence(self.encoder(x))[0])


class TokensFirst(nn.Module):
    """Rows of a sample do not lie together."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.inner(x.transpose(0, 1).reshape(-1, 8)).view(x.shape[1], x.shape[0], 8)
        return self.outer(x.transpose(0, 1).tanh())


class Tied(nn.Module):
    """A table that is read as embedding, as projection, and as a matrix; learned queries; a matrix from the left."""

    def __init__(self):
        super().__init__()
        self.table, self.matrix = nn.Embedding(11, 8, padding_idx=0), nn.Parameter(torch.randn(8, 8))
        self.queries, self.read, self.out = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8), nn.Linear(8, 11)
        self.out.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) @ self.matrix
        x = (self.read(self.queries) @ x.transpose(1, 2)).softmax(-1) @ x
        x = torch.einsum("btd,de->bte", x, self.matrix) + x @ self.table.weight.t().softmax(-1) @ self.table.weight
        return self.out(x), {"more": (1 + self.queries) * x}


class Normed(nn.Module):
    """Weights that are computed of parameters, by the new way and the old one."""

    def __init__(self):
        super().__init__()
        self.new = nn.utils.parametrizations.weight_norm(nn.Linear(8, 9))
        self.old = nn.utils.spectral_norm(nn.Linear(9, 8))

    def forward(self, x):
        return self.old(self.new(x))


NETWORKS = {
    Vision: lambda: torch.randn(BATCH, 3, 12, 12),
    Convolutions: lambda: torch.randn(BATCH, 3, 9, 9),
    Attention: lambda: torch.randn(BATCH, 5, 8),
    TokensFirst: lambda: torch.randn(BATCH, 6, 8),
    Tied: lambda: torch.randint(11, (BATCH, 4)),
    Normed: lambda: torch.randn(BATCH, 8),
}


def finetuned(base, count=COUNT, by=0.2):
    torch.manual_seed(1)
    made = [deepcopy(base) for _ in range(count)]
    with torch.no_grad():
        for p in (p for one in made for p in one.parameters()):
            p += by * torch.randn_like(p)
    return made


def setting(kind, dtype=torch.float64, count=COUNT):
    """A base in eval mode, models finetuned from it, inputs."""
    torch.manual_seed(0)
    base, inputs = kind().to(dtype).eval(), NETWORKS[kind]()
    return base, finetuned(base, count), inputs.to(dtype) if inputs.is_floating_point() else inputs


def draw(vectors, batch=BATCH, blocks="parameter", dtype=torch.float64):
    return torch.rand(batch, len(vectors), len(vectors.blocks(blocks)), generator=torch.Generator().manual_seed(2)).to(
        dtype
    )


def leaves(answer):
    return [x for x in tree_leaves(answer) if isinstance(x, torch.Tensor)]


@torch.no_grad()
def by_hand(base, tuned, inputs, c):
    """Each sample by a copy of the base whose weights are written over: c [batch, T, parameters]."""
    model, answers = deepcopy(base), []
    ours, theirs = list(base.parameters()), [list(one.parameters()) for one in tuned]
    for b in range(len(c)):
        for i, p in enumerate(model.parameters()):
            p.copy_(ours[i] + sum(c[b, t, i] * (theirs[t][i] - ours[i]) for t in range(len(tuned))))
        one = (
            {k: x[b : b + 1] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
            if isinstance(inputs, dict)
            else inputs[b : b + 1]
        )
        answers.append(leaves(model(**one) if isinstance(one, dict) else model(one)))
    return [torch.cat(each) for each in zip(*answers, strict=True)]


def off(got, want):
    """Of the largest output."""
    got, want = leaves(got), leaves(want)
    assert [x.shape for x in got] == [x.shape for x in want]
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want, strict=True))


def vectors_of(base, tuned):
    return weights.task_vectors(base, *tuned)
