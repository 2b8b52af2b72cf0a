"""Activation patching of attention heads: 32 interventions for the price of one forward, exactly.

import engine, models
model = models.load("smollm2-135m")
logits = engine.patch(model, "Q: hot\\nA:", heads=masks, values=means)
"""

from engine import distributed, experiments, weights
from engine.answers import evaluation
from engine.answers.decoding import Answer
from engine.answers.evaluation import Cost, Score, cost, evaluate
from engine.answers.generation import generate
from engine.answers.handover import start
from engine.artifacts import TaskVector
from engine.core import naive
from engine.core.activations import capture, mean_activations
from engine.core.patches import Edit, Knockout, Patch
from engine.core.patching import patch, plan
from engine.core.planning import Plan
from engine.core.prefix import Prefix, PrefixPool, prefill
from engine.core.rowstep import RowStep
from engine.methods import function_vectors as fv
from engine.methods import learned, linear, mtv, sav, stv, vtv, vtvc
from engine.questions import circuits, groups, metrics
from engine.questions.attribution import attribute
from engine.questions.edges.estimates import attribute_edges
from engine.questions.edges.graph import Graph
from engine.questions.edges.runs import edge_runs, exact_edges
from engine.questions.effects import Effects
from engine.questions.knockout import sweep_knockout
from engine.questions.pages import Page
from engine.questions.paths import paths
from engine.questions.sweeping import sweep
from engine.tasks import Example, Task

__all__ = [
    "Answer",
    "Cost",
    "Edit",
    "Effects",
    "Example",
    "Graph",
    "Knockout",
    "Page",
    "Patch",
    "Plan",
    "Prefix",
    "PrefixPool",
    "RowStep",
    "Score",
    "Task",
    "TaskVector",
    "attribute",
    "attribute_edges",
    "capture",
    "circuits",
    "cost",
    "distributed",
    "edge_runs",
    "evaluate",
    "evaluation",
    "exact_edges",
    "experiments",
    "fv",
    "generate",
    "groups",
    "learned",
    "linear",
    "mean_activations",
    "metrics",
    "mtv",
    "naive",
    "patch",
    "paths",
    "plan",
    "prefill",
    "sav",
    "start",
    "stv",
    "sweep",
    "sweep_knockout",
    "vtv",
    "vtvc",
    "weights",
]
