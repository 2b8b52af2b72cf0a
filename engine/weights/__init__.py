"""Task vectors of weights: differences of finetuned models to their base, added to it with weights for every sample.

vectors = engine.weights.task_vectors(base, one, another)
logits = engine.weights.forward(base, inputs, vectors, coefficients)  # [batch, vectors, blocks]
"""

from engine.weights import naive
from engine.weights.differences import task_vectors
from engine.weights.forwarding import forward
from engine.weights.merging import merged
from engine.weights.vectors import TaskVectors

__all__ = ["TaskVectors", "forward", "merged", "naive", "task_vectors"]
