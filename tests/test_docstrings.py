"""The examples in the docstrings of every public name run, and say what they show."""

import doctest
import inspect

import pytest
import torch

import engine
import models
from engine import Example
from engine.core.planning import make_plan
from engine.tasks import Pair

# What they show is SmolLM2's own; the others run on a model of its layers, heads and tokenizer that is quicker.
REAL = ("engine.tasks.Contrast.differences", "engine.tasks.first_token_hits")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public():
    """Name and object of everything that users are told of: functions, classes and their methods."""
    places = {
        "engine": (engine, engine.__all__),
        "engine.distributed": (engine.distributed, ["World", "joined"]),
        "engine.evaluation": (engine.evaluation, ["wilson"]),
        "engine.experiments": (engine.experiments, engine.experiments.__all__),
        "engine.fv": (engine.fv, ["FunctionVector", "extract", "begun", "compose", "hits_by_layer"]),
        "engine.groups": (engine.groups, ["layers", "pairs", "cumulative"]),
        "engine.metrics": (engine.metrics, ["read_metric", "check_scores"]),
        "engine.sav": (engine.sav, ["SparseAttentionVectors"]),
        "engine.learned": (engine.learned, ["LearnedVector", "extract"]),
        "engine.linear": (engine.linear, ["LinearVector", "extract", "regress", "distance"]),
        "engine.stv": (engine.stv, ["extract", "sensitivity"]),
        "engine.vtv": (engine.vtv, ["extract"]),
        "engine.vtvc": (engine.vtvc, ["Posterior", "features_of", "fit"]),
        "engine.weights": (engine.weights, ["TaskVectors", "forward", "merged", "task_vectors"]),
        "engine.weights.naive": (engine.weights.naive, ["forward"]),
        "engine.mtv": (engine.mtv, ["extract", "Preset", "Step"]),
        "engine.naive": (engine.naive, ["patch"]),
        "engine.core.planning": (engine.core.planning, ["make_plan"]),
        "engine.tasks": (engine.tasks, engine.tasks.__all__),
        "engine.tasks.easy_vqa": (engine.tasks.easy_vqa, ["load", "told"]),
        "engine.tasks.two_way": (engine.tasks.two_way, ["two_way", "flowers", "cub", "fashion_mnist", "digits"]),
        "engine.tasks.vqa": (engine.tasks.vqa, ["accuracy", "normalised", "first_line", "vizwiz", "okvqa"]),
        "models": (models, models.__all__),
    }
    found = {}
    for place, (module, names) in places.items():
        for name in names:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                found[f"{place}.{name}"] = thing
    return found


PUBLIC = public()
EXAMPLES = {
    test.name: test
    for name, thing in PUBLIC.items()
    for test in doctest.DocTestFinder(exclude_empty=True).find(thing, name, module=False, globs={})
    if test.examples
}


@pytest.fixture(scope="module")
def means(small):
    return engine.mean_activations(
        small, ["Q: up\nA: down\n\nQ: old\nA:", "Q: in\nA: out\n\nQ: big\nA:"], progress=False
    )


@pytest.fixture
def names(small, means, tmp_path, monkeypatch):
    """What the examples speak of: a model, mean activations, a folder with a saved vector."""
    monkeypatch.chdir(tmp_path)
    mask = torch.zeros(30, 9, dtype=torch.bool)
    mask[10, 3] = mask[12, 0] = True
    engine.TaskVector(mask, means, mask.float(), {"model": small.name}).save("antonyms.safetensors")
    return dict(
        engine=engine,
        models=models,
        model=small,
        means=means,
        masks=mask.expand(4, -1, -1),
        Example=Example,
        Pair=Pair,
        PictureTask=engine.tasks.PictureTask,
        Question=engine.tasks.Question,
        Prompt=models.Prompt,
        Shape=models.Shape,
        make_plan=make_plan,
        Request=engine.core.planning.Request,
        torch=torch,
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(names, name, smollm2):
    said = []
    example = EXAMPLES[name]
    example.globs = names | dict(model=smollm2) if name in REAL else names
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=said.append)
    assert not said, "".join(said)


def test_every_public_name_is_documented():
    """A docstring for all; an example for every function. Dataclasses need none: functions show them."""
    undocumented = []
    for name, thing in PUBLIC.items():
        text = (thing.__doc__ or "").strip()
        if not text or text.startswith(f"{thing.__name__}("):  # what a dataclass makes up
            undocumented.append(name)
    assert not undocumented, f"without a docstring: {undocumented}"
    functions = [name for name, thing in PUBLIC.items() if inspect.isroutine(thing)]
    assert {"engine.patch", "engine.mtv.extract", "engine.tasks.load", "models.load"} <= set(functions)
    lacking = [name for name in functions if name not in EXAMPLES]
    assert not lacking, f"without an example: {lacking}"


def test_all_names_exist():
    for module in (engine, engine.tasks, models):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
