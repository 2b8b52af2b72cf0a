"""Activation patching of attention heads: 32 interventions for the price of one forward, exactly.

import engine, models
model = models.load("smollm2-135m")
logits = engine.patch(model, "Q: hot\\nA:", heads=masks, values=means)
"""

from engine import naive
from engine.activations import capture, mean_activations
from engine.artifacts import TaskVector
from engine.evaluation import Score, evaluate
from engine.generation import generate
from engine.intervention import Patch
from engine.methods import mtv
from engine.patching import patch, plan
from engine.planning import Plan
from engine.prefix import Prefix, PrefixPool, prefill
from engine.tasks import Example, Task

__all__ = [
    "Example",
    "Patch",
    "Plan",
    "Prefix",
    "PrefixPool",
    "Score",
    "Task",
    "TaskVector",
    "capture",
    "evaluate",
    "generate",
    "mean_activations",
    "mtv",
    "naive",
    "patch",
    "plan",
    "prefill",
]
