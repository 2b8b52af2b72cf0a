"""k-means (Lloyd 1982) from seeds drawn far apart (k-means++, Arthur and Vassilvitskii 2007), for many sets at once."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from models.shapes import Float

ROUNDS = 100  # at most; it ends when no point changes its cluster


def kmeans(points: Float[Tensor, "sets points width"], k: int, random: Generator) -> Float[Tensor, "sets {k} width"]:
    """Centroids of k clusters of each set; one that loses all its points stays where it was."""
    centroids = _far_apart(points, k, random)
    before = None
    for _ in range(ROUNDS):
        nearest = _apart(points, centroids).argmin(dim=-1)  # [sets, points]
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        belongs = torch.nn.functional.one_hot(nearest, k).to(points)  # [sets, points, k]
        sizes = belongs.sum(dim=1)[..., None]
        centroids = torch.where(sizes > 0, belongs.mT @ points / sizes.clamp_min(1), centroids)
    return centroids


def _apart(points: Tensor, others: Tensor) -> Float[Tensor, "sets points others"]:
    """By differences: |a|^2 + |b|^2 - 2ab, which torch takes of many, loses clusters that lie far from the origin."""
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")


def _far_apart(points: Tensor, k: int, random: Generator) -> Float[Tensor, "sets k width"]:
    """Points, each drawn by its squared distance from the nearest one drawn before."""
    every = torch.arange(len(points))
    drawn = [points[every, torch.randint(points.shape[1], (len(points),), generator=random)]]
    while len(drawn) < k:
        squared = _apart(points, torch.stack(drawn, dim=1)).amin(dim=-1).square()
        # Where all points are drawn already, any of them.
        weights = torch.where(squared.sum(dim=-1, keepdim=True) > 0, squared, 1.0)
        drawn.append(points[every, torch.multinomial(weights, 1, generator=random)[:, 0]])
    return torch.stack(drawn, dim=1)
