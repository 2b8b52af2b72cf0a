"""Functions that are given their tensors by name, as torch names them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.engine.weights.test_apart import against_naive
from tests.engine.weights.test_forward import found_apart


class Asked(nn.Module):
    def __init__(self, asked):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.kernel, self.asked = nn.Parameter(torch.randn(4, 4, 1)), asked

    def forward(self, x):
        return self.asked(self, x)


def written(m, x):
    y = torch.empty(len(x), 4, dtype=x.dtype)
    torch.matmul(x, m.weight, out=y)
    return y


ASKED = {
    "linear": lambda m, x: F.linear(input=x, weight=m.weight, bias=m.bias),
    "linear, bias first": lambda m, x: F.linear(bias=m.bias, weight=m.weight, input=x),
    "conv": lambda m, x: F.conv1d(input=x[..., None], weight=m.kernel, bias=m.bias, padding=0)[..., 0],
    "matmul": lambda m, x: torch.matmul(x, other=m.weight.T),
    "matmul, all": lambda m, x: torch.matmul(input=x, other=m.weight),
    "matmul, of a tensor": lambda m, x: x.matmul(other=m.weight),
    "addmm": lambda m, x: torch.addmm(input=m.bias, mat1=x, mat2=m.weight),
    "addmm, scaled": lambda m, x: torch.addmm(m.bias, mat1=x, mat2=m.weight, alpha=2),
    "norm": lambda m, x: F.layer_norm(input=x, normalized_shape=(4,), weight=m.weight[0], bias=m.bias),
    "embedding": lambda m, x: F.embedding(input=x.argmax(dim=1), weight=m.weight),
    "softmax": lambda m, x: x @ torch.softmax(input=m.weight, dim=-1),
    "transposed": lambda m, x: x @ torch.t(input=m.weight) + x @ m.weight.transpose(dim0=0, dim1=1),
    "transposed, by name": lambda m, x: x @ torch.transpose(input=m.weight, dim0=0, dim1=1),
    "added": lambda m, x: torch.add(input=x, other=m.bias, alpha=2),
    "einsum": lambda m, x: torch.einsum("bi,io->bo", [x, m.weight]),
    "out": written,
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_keywords(asked):
    torch.manual_seed(0)
    base = nn.Sequential(Asked(asked), nn.Linear(4, 3)).double()
    against_naive(base, torch.randn(5, 4, dtype=torch.float64))
    assert found_apart(base) <= {"0"}
