"""The checks are on: a shape that the signature does not allow is refused."""

import pytest
import torch
from jaxtyping import TypeCheckError

from models.attention import Rule, causal_attention


def test_shapes_that_do_not_fit():
    q, rule = torch.zeros(1, 2, 3, 4), Rule(1.0, None, None)
    assert causal_attention(q, q, q, rule, None).shape == q.shape
    with pytest.raises(TypeCheckError):
        causal_attention(q, q[0], q, rule, None)
    with pytest.raises(TypeCheckError):
        causal_attention(q, q, q, "rule", None)
