"""Models spread over processes and devices: the results are those of one process with all of the model.

Under tensor parallelism this file is also the script that every process runs: it writes down what went wrong, and the
tests read that. Two processes are started, once.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests import conftest  # before engine and models, so that their calls are checked in the script too

# isort: split
import engine
import models
from engine import Example
from engine.core.planning import Strategy
from models import sharding, tiny, zoo
from tests.edits import on_z

ROOT = Path(conftest.__file__).parents[1]
RANKS = 2
EXACT = dict(atol=1e-5, rtol=1e-5)
STRATEGIES = get_args(Strategy)
TEXT = "Q: hot\nA: cold\n\nQ: big\nA:"
LLAMA = tiny.TEXT["llama"][1]
OWN = {
    "biased": ("LlamaForCausalLM", dict(LLAMA, attention_bias=True, mlp_bias=True)),  # W_O's is added once, not twice
    "three": ("LlamaForCausalLM", dict(LLAMA, num_key_value_heads=3)),
}
# Of 6 heads, those of each process: half of them, or all if the plan gathers them before W_O (olmo2 norms over all).
HEADS = {"llama": 3, "biased": 3, "qwen2": 3, "qwen3": 3, "gpt_neox": 3, "mixtral": 3, "gemma3": 3, "olmo2": 6}


def save(folder, families):
    """Tiny models on disk, and a tokenizer with each. The vocabulary is even: older transformers share out no other."""
    with pytest.MonkeyPatch.context() as patch:
        for family, (kind, fields) in (tiny.TEXT | OWN).items():
            patch.setitem(tiny.TEXT, family, (kind, dict(fields, vocab_size=98)))
        for family in families:
            tiny.tiny(family).save_pretrained(folder / family)
            tiny.tiny_tokenizer().save_pretrained(folder / family)


def draw(model, rows=5, per_row=False):
    """Random masks and values."""
    random, s = torch.Generator().manual_seed(0), model.shape
    masks = torch.rand(rows, s.n_layers, s.n_heads, generator=random) < 0.4
    return masks, torch.randn(*((rows,) if per_row else ()), s.n_layers, s.n_heads, s.head_dim, generator=random)


def check_strategies(model, alone, **options):
    """Every strategy, a prefix, and several prompts, against naive on the whole model. Returns all that was found."""
    want, found = engine.naive.patch(alone, TEXT, **options), []
    refused = {"packed": alone.rules().packed, "layered": alone.rules().why_not("layered")}
    for strategy in STRATEGIES:
        if not refused.get(strategy):
            found.append(engine.patch(model, TEXT, strategy=strategy, **options))
    found += [engine.naive.patch(model, TEXT, **options)]
    found += [engine.patch(model, engine.prefill(model, TEXT, options.get("positions", -1)), **options)]
    found += list(engine.patch(model, [TEXT, TEXT], **options))
    for got in found:
        torch.testing.assert_close(got, want, **EXACT)
    return torch.stack(found)


# What each process does under tensor parallelism.


def both(root, family):
    """A model shared out over the processes, and all of it in this one."""
    return models.load(root / family, tp_plan="auto"), models.load(root / family)


def same_bits(x):
    """The same on every process: what is decided by it is decided alike."""
    theirs = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(theirs, x.contiguous())
    assert all(torch.equal(x, one) for one in theirs)


def check_logits(root, family):
    model, alone = both(root, family)
    assert model.shape == alone.shape
    own = model.own_heads(torch.arange(6), 0)
    assert own.tolist() == list(range(6))[-HEADS[family] :] if dist.get_rank() else list(range(6))[: HEADS[family]]
    for mode, positions, per_row in (("replace", -1, False), ("add", [-1, 4, 5], True)):
        heads, values = draw(model, per_row=per_row)
        same_bits(check_strategies(model, alone, heads=heads, values=values, positions=positions, mode=mode))


def check_heads_of_one_process(root):
    """The others compute along."""
    model, alone = both(root, "llama")
    _, values = draw(model)
    for head in (0, 5):
        check_strategies(model, alone, heads=[(1, head)], values=values)


def check_activations(root):
    for family in ("llama", "olmo2"):
        model, alone = both(root, family)
        prompts = [TEXT, TEXT[3:], TEXT[5:]]
        for positions in (-1, [0, 3, -2]):
            got = engine.capture(model, prompts, positions)
            torch.testing.assert_close(got, engine.capture(alone, prompts, positions), **EXACT)
            same_bits(got)
        got, want = (engine.mean_activations(m, prompts, progress=False) for m in (model, alone))
        torch.testing.assert_close(got, want, **EXACT)


def check_answers(root):
    model, alone = both(root, "llama")
    heads, values = draw(model, rows=3)
    for strategy in ("auto", "expanded"):
        options = dict(heads=heads, values=values, max_new_tokens=5, strategy=strategy)
        got, want = (engine.generate(m, [TEXT, TEXT[7:]], **options) for m in (model, alone))
        assert got == want


def check_gradients(root):
    """They are of all heads on every process, also where patched heads are all on one of them."""
    for family in ("llama", "olmo2"):
        model, alone = both(root, family)
        heads, values = draw(model)
        for mask, trained in ((heads, True), (heads & (torch.arange(6) < 3), False)):
            model.hf.requires_grad_(trained)
            for strategy in ("auto", "batch", "naive"):
                grads = []
                for m in (model, alone):
                    x = values.clone().requires_grad_()
                    engine.patch(m, TEXT, heads=mask, values=x, strategy=strategy).square().sum().backward()
                    grads.append(x.grad)
                largest = grads[1].abs().max()
                torch.testing.assert_close(grads[0] / largest, grads[1] / largest, **EXACT)


def check_search(root):
    model, alone = both(root, "llama")
    _, means = draw(model)
    examples = [Example("Q: hot\nA:", " cold"), Example("Q: big\nA:", " small"), Example("Q: up\nA:", " down")]
    got, want = (engine.mtv.extract(m, examples, means, steps=4, progress=False) for m in (model, alone))
    assert torch.equal(got.mask, want.mask)
    torch.testing.assert_close(got.probabilities, want.probabilities, **EXACT)
    torch.testing.assert_close(got.metadata["losses"], want.metadata["losses"], **EXACT)
    same_bits(got.probabilities)


def check_images(root):
    """A model that was loaded by transformers, wrapped."""
    from transformers import AutoModelForImageTextToText
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto")
    hf = AutoModelForImageTextToText.from_pretrained(root / "llava", distributed_config=config)
    processor = tiny.tiny_processor("llava")
    model, alone = models.wrap(hf, processor=processor), models.wrap(tiny.tiny("llava"), processor=processor)
    heads, values = draw(model)
    prompt = models.Prompt("<image> which?\nA:", (Image.new("RGB", (28, 28), "red"),))
    want = engine.naive.patch(alone, prompt, heads=heads, values=values)
    for strategy in STRATEGIES:
        got = engine.patch(model, prompt, heads=heads, values=values, strategy=strategy)
        torch.testing.assert_close(got, want, **EXACT)


def check_heads_that_do_not_go_round(root):
    """Three key/value heads over two processes: refused, unless the plan leaves attention whole."""
    with pytest.raises(models.UnsupportedModelError, match=r"6 heads with 3 key/value heads .* 2 processes"):
        models.load(root / "three", tp_plan="auto")
    plan = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
    plan["model.layers.*.self_attn.o_proj"] = "rowwise_split_input"
    model, alone = models.load(root / "three", tp_plan=plan), models.load(root / "three")
    heads, values = draw(model)
    check_strategies(model, alone, heads=heads, values=values)


def check_other_plans(root):
    # Query heads of one process would be scored against key heads of another.
    plan = {f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qv"}
    plan |= {"model.layers.*.self_attn.k_proj": "colwise_gather_output", "model.layers.*.self_attn.o_proj": "rowwise"}
    with pytest.raises(models.UnsupportedModelError, match="'k_proj': 'colwise_gather_output'"):
        models.load(root / "llama", tp_plan=plan)
    # For GPT-2 transformers has no plan: some versions refuse, others share out what is not attention.
    try:
        model = models.load(root / "gpt2", tp_plan="auto")
    except ValueError as error:
        if "has no `tp_plan`" not in str(error):
            raise
    else:
        heads, values = draw(model)
        check_strategies(model, models.load(root / "gpt2"), heads=heads, values=values)


def check_other_backends(root):
    from nnsight import NNsight

    hf = models.load(root / "llama", tp_plan="auto").hf
    with pytest.raises(models.UnsupportedModelError, match="wrap the transformers model itself"):
        models.wrap(NNsight(hf))


def check_sharded_by_others(root):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    hf = tiny.tiny("llama")
    for block in hf.model.layers:
        styles = {"self_attn.q_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel()}
        parallelize_module(block, init_device_mesh("cpu", (RANKS,)), styles)
    with pytest.raises(models.UnsupportedModelError, match="not by transformers' tensor parallelism"):
        models.wrap(hf)


def check_linear_layers(root):
    """Sharded ones are left to their owner, during a call and after it."""
    model = models.load(root / "llama", tp_plan="auto")
    assert not model._linears

    def forwards():
        return [module.__dict__.get("forward") for module in model.hf.modules()]

    before, during = forwards(), []
    with torch.no_grad():
        model.forward(model.encode(TEXT)[None], on_z(model, lambda layer, z: during.append(forwards()) or z))
    assert during == [before] * 3
    assert forwards() == before


def check_what_is_sent(root):
    """Two all-reduces a layer, and one where embeddings are shared out; the logits; nothing for a patch; z once."""
    from torch.distributed.tensor.debug import CommDebugMode

    model = models.load(root / "llama", tp_plan="auto")
    heads, values = draw(model)
    calls = {
        "patched": lambda: engine.patch(model, TEXT, heads=heads, values=values),
        "unpatched": lambda: engine.patch(model, TEXT, heads=None, values=None),
        "captured": lambda: engine.capture(model, [TEXT]),
    }
    sent = {}
    for name, call in calls.items():
        call()  # the model is checked when it is met
        with CommDebugMode() as mode:
            call()
        counts = {str(operation): count for operation, count in mode.get_comm_counts().items()}
        reduced = sum(count for operation, count in counts.items() if "reduce" in operation)
        sent[name] = (reduced, sum(counts.values()) - reduced)
    reduced, _ = sent["unpatched"]
    assert reduced in (6, 7)
    assert sent == {"unpatched": (reduced, 1), "patched": (reduced, 1), "captured": (reduced, 2)}


ONCE = (
    check_heads_of_one_process,
    check_activations,
    check_answers,
    check_gradients,
    check_search,
    check_images,
    check_heads_that_do_not_go_round,
    check_other_plans,
    check_other_backends,
    check_sharded_by_others,
    check_linear_layers,
    check_what_is_sent,
)
LOGITS = {f"logits {family}": (check_logits, family) for family in HEADS}
SOME = {f"logits {family}": LOGITS[f"logits {family}"] for family in ("llama", "mixtral")}
CHECKS = {"some": SOME | {check.__name__[6:]: (check,) for check in ONCE}}
CHECKS["other"] = {name: check for name, check in LOGITS.items() if name not in SOME}


def main(root, which):
    """One process: what each check said, in a file."""
    said = {}
    for name, (check, *family) in CHECKS[which].items():
        try:
            check(root, *family)
            said[name] = ""
        except (Exception, pytest.fail.Exception):
            said[name] = traceback.format_exc()
    (root / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))
    if dist.is_initialized():
        dist.destroy_process_group()


# One test, lest each of pytest's processes start the ranks again.
@pytest.mark.parametrize("which", ["some", pytest.param("other", marks=pytest.mark.slow)])
def test_tensor_parallel(tmp_path, which):
    """What every process says of every check of some: nothing."""
    save(tmp_path, (*HEADS, "three", "gpt2", "llava"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command += [str(tmp_path), which]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stdout + done.stderr
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(RANKS)]
    assert [one.keys() for one in said] == [CHECKS[which].keys()] * RANKS
    wrong = {f"{name}, process {rank}": text for rank, one in enumerate(said) for name, text in one.items() if text}
    assert not wrong, "\n\n".join(f"{name}: {text}" for name, text in wrong.items())


# What needs one process only.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offloaded")
    save(folder, ("llama", "gpt2"))
    return folder


@pytest.mark.parametrize(
    "options", [dict(device_map="auto"), dict(backend="nnsight"), dict(backend="transformer_lens")]
)
def test_options_that_exclude_each_other(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}='{next(iter(options.values()))}'"):
        models.load("no such model", tp_plan="auto", **options)


def test_a_process_that_was_started_alone(folder, monkeypatch):
    for name in sharding.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node N script.py"):
        models.load("no such model", tp_plan="auto")
    with pytest.raises(ValueError, match=r"tp_plan must be 'auto' or a dict .* got 'fast'"):
        models.load("no such model", tp_plan="fast")
    for name, value in zip(sharding.LAUNCHED, ("0", "0", "1"), strict=True):  # torchrun, one process
        monkeypatch.setenv(name, value)
    model = models.load(folder / "llama", tp_plan="auto")
    assert model.own_heads(torch.arange(6), 0).tolist() == list(range(6))


def test_accelerate_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(sharding, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install accelerate"):
        models.load("no such model", device_map="auto")


# By the names of their modules, what lies on the disk: weights that are nowhere until their layer runs.
ON_DISK = {
    "some layers": lambda name: name.endswith((".1", ".2")),
    "embeddings and head": lambda name: not name[-1].isdigit(),
    "everything": lambda name: True,
}


@pytest.mark.parametrize("on_disk", ON_DISK)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_device_map(folder, family, on_disk):
    alone = models.load(folder / family)
    blocks = {"llama": "model.layers", "gpt2": "transformer.h"}[family]
    decoder = blocks.split(".")[0]
    names = [f"{decoder}.{name}" for name, _ in alone.decoder.named_children() if f"{decoder}.{name}" != blocks]
    names += [*(f"{blocks}.{i}" for i in range(3)), "lm_head"]
    model = models.load(
        folder / family, device_map={name: "disk" if ON_DISK[on_disk](name) else "cpu" for name in names}
    )
    assert any(parameter.is_meta for parameter in model.hf.parameters())
    assert (model.device, model.dtype, model.shape) == (alone.device, alone.dtype, alone.shape)
    heads, values = draw(model)
    check_strategies(model, alone, heads=heads, values=values)
    check_strategies(model, alone, heads=heads, values=values, positions=[-1, 4], mode="add")
    prompts = [TEXT, TEXT[3:]]
    torch.testing.assert_close(engine.capture(model, prompts), engine.capture(alone, prompts), **EXACT)
    answers = [engine.generate(m, TEXT, heads=heads, values=values, max_new_tokens=3) for m in (model, alone)]
    assert answers[0] == answers[1]


def test_device_map_auto(folder):
    model, alone = models.load(folder / "llama", device_map="auto"), models.load(folder / "llama")
    heads, values = draw(model)
    check_strategies(model, alone, heads=heads, values=values)


def test_device_map_that_is_incomplete(folder):
    with pytest.raises(ValueError, match="cannot be spread over devices as asked for"):
        models.load(folder / "llama", device_map={"model.layers.0": "cpu", "model.layers.1": "disk"})


def test_the_packaged_model_is_spread_too(folder, monkeypatch):
    hf = models.load(folder / "llama").hf
    monkeypatch.setattr(zoo, "smollm2", lambda dtype: (hf, tiny.tiny_tokenizer()))
    model = models.load("smollm2-135m", device_map={"": "disk"})
    assert all(parameter.is_meta for parameter in model.hf.parameters())
    assert model.name == "smollm2-135m"


def test_linear_layers_with_weights_of_a_kind_of_their_own():
    class Weight(torch.nn.Parameter):
        pass

    from models.linear import onednn_layers

    plain, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    other.weight = Weight(other.weight.data)
    assert onednn_layers([plain, other]) == [plain]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
