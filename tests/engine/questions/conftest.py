"""Effects of every kind, made at random."""

import pytest
import torch

from engine.questions.effects import Effects
from tests.effects import H, L, N, P, made


@pytest.fixture
def effects():
    return made(reference=torch.linspace(3, 4, N), metric="logit_difference")


@pytest.fixture
def at_positions(random):
    patched = torch.randn(N, P, L, H, generator=random)
    return Effects(patched, torch.rand(N, generator=random), positions=(-2, -1), metadata={"model": "é", "seed": 3})


@pytest.fixture
def of_groups(random):
    masks = torch.rand(2, L, H, generator=random) < 0.5
    groups = {"late": masks[0], "early": masks[1]}
    return Effects(torch.randn(N, 2, generator=random), torch.rand(N), torch.rand(N) + 2, groups, metric="kl")


KINDS = ("effects", "at_positions", "of_groups")


@pytest.fixture(params=KINDS)
def any_kind(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def values(model, draw):
    return draw(model)[1]
