"""What a steering vector must be, said before anything runs."""

import pytest
import torch

import engine


@pytest.mark.parametrize(
    ("vector", "layers", "error", "said"),
    [
        (lambda d: torch.zeros(d + 1), 0, ValueError, "floating-point tensor"),
        (lambda d: torch.zeros(d).long(), 0, ValueError, "int64"),
        (lambda d: [0.0] * d, 0, ValueError, "list"),
        (lambda d: torch.full((d,), torch.nan), 0, ValueError, "NaN"),
        (lambda d: torch.zeros(d), 99, IndexError, "99"),
        (lambda d: torch.zeros(d), -1, IndexError, "-1"),
        (lambda d: torch.zeros(d), [0, "1"], IndexError, "'1'"),
    ],
)
def test_vectors_and_layers(model, vector, layers, error, said):
    with pytest.raises(error, match=said):
        engine.patch(model, "Q: hot", steering=engine.Steering(vector(model.shape.d_model), layers))


def test_one_layer_a_row(model):
    heads = torch.zeros(3, model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
    with pytest.raises(ValueError, match="each of 3 rows, got 2"):
        engine.patch(model, "Q: hot", heads=heads, steering=engine.Steering(torch.zeros(model.shape.d_model), [0, 1]))
