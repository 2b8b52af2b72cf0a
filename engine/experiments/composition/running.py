"""`headpatch weights`: base, task vectors, every way to compose them, for each seed; finished parts are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from safetensors.torch import load_file
from torch import nn

from engine import plots
from engine.artifacts import save_tensors, versions, write_whole
from engine.experiments.composition import encoders, sets, stages, ways
from engine.experiments.parts import part
from engine.weights import TaskVectors, task_vectors
from models.reading import read_int

Record: TypeAlias = dict[str, Any]
Sets: TypeAlias = Literal["images", "texts"]


@dataclass(frozen=True)
class Options:
    """Sizes.

    seeds:      of splits, training and fits: 0, 1, ...
    samples:    of each set at most, in all four parts.
    base_steps: in which the vision transformer is trained on all sets at once, of 64 pictures.
    tune_steps, tune_lr: of finetuning on one set: mild.
    epochs:     in which coefficients are learned; those that all samples share, twice as many. forget_epochs: of
                negation.
    tokens:     of a sentence at most.
    head_c:     inverse strength of the heads' regularisation (scikit-learn's C).
    """

    seeds: int = 3
    samples: int = 3000
    base_steps: int = 200
    tune_steps: int = 300
    tune_lr: float = 1e-3
    epochs: int = 8
    forget_epochs: int = 3
    tokens: int = 16
    head_c: float = 1.0


DEFAULTS: dict[str, Options] = {
    "images": Options(),
    "texts": Options(samples=1200, base_steps=0, tune_steps=60, tune_lr=5e-5, epochs=5, head_c=0.01),
}


@dataclass(frozen=True)
class Results:
    """addition: a record for each seed and way, with the accuracy of each set. negation: for each seed, target, way."""

    kind: str
    options: Options
    addition: list[Record]
    negation: list[Record]
    folder: Path

    def rows(self) -> list[dict[str, str]]:
        """A row a way: accuracy, mean and standard deviation over seeds; how far the gated posterior is from it, paired
        by seed, in points; exact zeros.
        """
        names, found = list(self.addition[0]["right"]), []
        gated = {one["seed"]: one["mean"] for one in self.addition if one["way"] == "gated (VTVC)"}
        for way in dict.fromkeys(one["way"] for one in self.addition):
            mine = [one for one in self.addition if one["way"] == way]
            row = {"way": way, "mean": _spread([one["mean"] for one in mine])}
            apart = [100 * (gated[one["seed"]] - one["mean"]) for one in mine if one["seed"] in gated]
            row["gated minus this way"] = _spread(apart, 1) if apart and way != "gated (VTVC)" else ""
            row["zeros"] = f"{ways.mean([one['zeros'] for one in mine]):.0%}"
            row |= {name: f"{ways.mean([one['right'][name] for one in mine]):.2f}" for name in names}
            found.append(row)
        return found

    def negation_rows(self) -> list[dict[str, str]]:
        """A row a target and way: accuracy of the target and of all others, before and after; mean over seeds."""
        found = []
        for target, way in dict.fromkeys((one["target"], one["way"]) for one in self.negation):
            mine = [one for one in self.negation if (one["target"], one["way"]) == (target, way)]

            def of(key: str, mine: list[Record] = mine) -> str:
                return _spread([one[key] for one in mine])

            row = {"forgotten": target, "way": way, "target": of("target_right"), "before": of("base_target")}
            row |= {"chance": of("chance"), "others": of("control"), "others before": of("base_control")}
            found.append(row)
        return found


def _spread(values: Sequence[float], digits: int = 3) -> str:
    spread = torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else None
    said = f"{ways.mean(list(values)):.{digits}f}"
    return said if spread is None else f"{said} ± {spread:.{digits}f}"


def run(
    kind: Sets = "images",
    options: Options | None = None,
    *,
    folder: str | Path,
    names: Sequence[str] = (),
    ways_asked: Sequence[str] = ways.WAYS,
    negation: bool = True,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Compose task vectors of weights on real sets, in every way that there is, and write its files.

    kind:       "images": a vision transformer of 468,000 parameters, trained here on six packaged sets; "texts":
                MiniLM on sentiment of films and tweets, and WordNet's glosses. Both are small; large models differ.
    options:    default `DEFAULTS[kind]`.
    folder:     gets results.json, scores.png, coefficients.png, and for each seed base, vectors and fits. What is there
                and was made with the same options is not made again.
    names:      of the sets, default all of the kind. ways_asked: of `ways.WAYS`. negation: also forget each set.

    Raises ValueError for an unknown kind, way or option; ImportError or OSError for data that cannot be had.

    Source: Variational Task Vector Composition (arXiv 2509.18208) and aTLAS (arXiv 2407.02880): task addition,
    task negation.
    """
    if kind not in get_args(Sets):
        raise ValueError(f"kind must be one of {get_args(Sets)}, got {kind!r}")
    if wrong := [way for way in ways_asked if way not in ways.WAYS]:
        raise ValueError(f"no way {wrong[0]!r}: expected some of {ways.WAYS}")
    options, folder = options or DEFAULTS[kind], Path(folder)
    for name, number in asdict(options).items():
        if name not in ("tune_lr", "head_c"):
            read_int(number, name, 0 if name == "base_steps" else 1)
    folder.mkdir(parents=True, exist_ok=True)
    encoder, loaded = _opened(kind, options, tuple(names))
    addition: list[Record] = []
    negations: list[Record] = []
    for seed in range(options.seeds):
        setting = _setting(kind, encoder, loaded, options, seed, folder, progress)
        identity = {"kind": kind, "sets": setting.names, "seed": seed, **asdict(options)} | {"seeds": None}
        for way in ways_asked:
            found = _kept(setting.folder / "addition" / f"{way}.json", identity, partial(ways.added, setting, way))
            right = dict(zip(setting.names, found["right"], strict=True))
            addition.append({"seed": seed, "way": way, "mean": ways.mean(found["right"]), **found, "right": right})
            if say:
                say(f"seed {seed}, {way}: {addition[-1]['mean']:.3f} {found['chosen']} ({found['seconds']:.0f} s)")
        for target, name in enumerate(setting.names if negation else ()):
            for way in ways.NEGATIONS:
                path = setting.folder / "negation" / f"{name}-{way}.json"
                found = _kept(path, identity, partial(ways.negated, setting, target, way))
                record = {"seed": seed, "target": name, "way": way, "target_right": found["target"]}
                negations.append(record | {key: x for key, x in found.items() if key != "target"})
                if say:
                    say(f"seed {seed}, forget {name}, {way}: {found['target']:.3f} ({found['seconds']:.0f} s)")
    results = Results(kind, options, addition, negations, folder)
    _write(results)
    return results


def _opened(kind: Sets, options: Options, names: tuple[str, ...]) -> tuple[nn.Module | None, list[sets.Labelled]]:
    """The packaged encoder, if it is one; the sets."""
    if kind == "images":
        return None, sets.images(names)
    encoder, tokenizer = encoders.minilm()
    return encoder, sets.texts(tokenizer, options.tokens, names)


def _setting(
    kind: Sets, encoder: nn.Module | None, loaded: list[sets.Labelled], options: Options, seed: int, folder: Path,
    progress: bool,
) -> ways.Setting:  # fmt: skip
    """Base, heads and task vectors of a seed, from their files if these were made so."""
    split = [one.split(seed, options.samples) for one in loaded]
    train, names = [one["train"] for one in split], tuple(one.name for one in loaded)
    mine = folder / f"{kind}-{seed}"
    mine.mkdir(exist_ok=True)
    made = {
        "kind": kind,
        "names": names,
        "seed": seed,
        **asdict(options),
        "seeds": None,
        "epochs": None,
        "forget_epochs": None,
    }
    told, paths = mine / "made.json", {part: mine / f"{part}.safetensors" for part in ("base", "heads", "vectors")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = encoder if encoder is not None else encoders.Pictures()
    heads = stages.Heads(
        stages.features_of(base, train[0].at(torch.arange(1))).shape[1], [len(s.classes) for s in loaded]
    )
    if told.is_file() and told.read_text() == json.dumps(made):
        base.load_state_dict(load_file(paths["base"]))
        heads.load_state_dict(load_file(paths["heads"]))
        vectors = TaskVectors.load(paths["vectors"])
    else:
        if encoder is None:
            base = stages.pretrained(base, train, steps=options.base_steps, lr=1e-3, seed=seed, progress=progress)
        heads = stages.fitted_heads(base, train, options.head_c)
        tuned = [
            stages.finetuned(
                base, heads, part, at, steps=options.tune_steps, lr=options.tune_lr, seed=seed, progress=progress
            )
            for at, part in enumerate(train)
        ]
        vectors = task_vectors(base, *tuned, names=names)
        save_tensors(paths["base"], base.state_dict(), made)
        save_tensors(paths["heads"], heads.state_dict(), made)
        vectors.save(paths["vectors"])
        write_whole(told, json.dumps(made))
    parts = {name: ways.Part.of(base, [one[name] for one in split]) for name in ("compose", "select", "test")}
    heads.requires_grad_(False)
    return ways.Setting(base, heads, vectors, parts, names, options.epochs, options.forget_epochs, seed, mine, progress)


def _kept(path: Path, identity: Record, make: Callable[[], Any]) -> Record:
    """A part, with the seconds that making it took."""

    def timed() -> Record:
        started = time.perf_counter()
        return asdict(make()) | {"seconds": time.perf_counter() - started}

    return part(path, identity, timed)


def _write(results: Results) -> None:
    folder = results.folder
    said = dict(
        kind=results.kind, options=asdict(results.options), addition=results.addition, negation=results.negation,
        table=results.rows(), negation_table=results.negation_rows(), versions=versions(),
    )  # fmt: skip
    write_whole(folder / "results.json", json.dumps(said, indent=1) + "\n")
    values: dict[str, list[float]] = {}
    for one in results.addition:
        values.setdefault(one["way"], []).append(one["mean"])
    title = f"task addition, {results.kind}"
    plots.scores(folder / "scores.png", {"all sets": values}, "accuracy, mean over sets", title)
    gated = [one for one in results.addition if one["way"] == "gated (VTVC)"]
    if gated:
        names = list(gated[0]["right"])
        c = torch.tensor([one["coefficients"] for one in gated]).mean(dim=0)
        plots.effect_maps(
            folder / "coefficients.png", c[None], torch.zeros_like(c[None], dtype=torch.bool),
            "mean coefficient", (names, names), ("samples of", "vector of"),
            title="what the gated posterior adds",
        )  # fmt: skip
