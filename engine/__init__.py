"""Activation patching of attention heads: 32 interventions for the price of one forward, exactly.

import engine, models
model = models.load("smollm2-135m")
logits = engine.patch(model, "Q: hot\\nA:", heads=masks, values=means)
"""

from engine import distributed, experiments, groups, metrics, naive
from engine.activations import capture, mean_activations
from engine.artifacts import TaskVector
from engine.attribution import attribute
from engine.decoding import Answer
from engine.effects import Effects
from engine.evaluation import Cost, Score, cost, evaluate
from engine.generation import generate
from engine.handover import start
from engine.intervention import Patch, Steering
from engine.methods import function_vectors as fv
from engine.methods import mtv, sav, vtv
from engine.patching import patch, plan
from engine.planning import Plan
from engine.prefix import Prefix, PrefixPool, prefill
from engine.rowstep import RowStep
from engine.sweeping import sweep
from engine.tasks import Example, Task

__all__ = [
    "Answer",
    "Cost",
    "Effects",
    "Example",
    "Patch",
    "Plan",
    "Prefix",
    "PrefixPool",
    "RowStep",
    "Score",
    "Steering",
    "Task",
    "TaskVector",
    "attribute",
    "capture",
    "cost",
    "distributed",
    "evaluate",
    "experiments",
    "fv",
    "generate",
    "groups",
    "mean_activations",
    "metrics",
    "mtv",
    "naive",
    "patch",
    "plan",
    "prefill",
    "sav",
    "start",
    "sweep",
    "vtv",
]
