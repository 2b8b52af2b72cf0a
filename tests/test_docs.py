"""What the README and the site show runs, says what they say it says, and the site is built strictly."""

import ast
import linecache
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

import engine
import models
from bench.providers.provider import twin
from engine.cli import app
from engine.core import checking
from models import tiny as tiny_models
from models.nnsight_backend import from_huggingface
from tests.test_docstrings import PUBLIC

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Numbers that make an example quick, in place of those that make it good.
FEWER = {"count": 2, "steps": 2, "shots": 2, "max_new_tokens": 4}
SLICE = re.compile(r"\[:(20|50|100)\]")
# Pages whose answers are SmolLM2's own; the README's example is also run as it is installed (test_wheel).
REAL = [DOCS / "questions" / "changes.md", DOCS / "questions" / "steer.md"]
LARGE = "meta-llama/Llama-3.1-70B-Instruct"
# What a page leaves to its reader.
BEFORE = {
    "devices.md": f"""
import torch
import engine, models
name, prompt, prompts, examples = "{LARGE}", "Q: hot\\nA:", ["Q: hot\\nA:"], [engine.Example("Q: hot\\nA:", " cold")]
masks, means = torch.ones(2, 30, 9).bool(), torch.zeros(30, 9, 4)
""",
    "tasks.md": "import engine, models\nfrom engine import tasks\nmodel = models.load('smollm2-135m')",
}
PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def blocks(page):
    """Code of a page, and what it says that it prints; parts of other pages are put in where they are named."""
    text = page.read_text()
    for name, part in re.findall(r'^--8<-- "(.*?):(.*?)"$', text, re.MULTILINE):
        text = text.replace(f'--8<-- "{name}:{part}"', section(ROOT / name, part))
    return PYTHON.findall(text)


def section(page, part):
    (found,) = re.findall(rf"\[start:{part}\] -->\n(.*?)<!-- --8<-- \[end:{part}\]", page.read_text(), re.DOTALL)
    return found


def run(code, names, title):
    """As if it stood in a file: nnsight reads what it runs."""
    linecache.cache[title] = (len(code), None, code.splitlines(keepends=True), title)
    exec(compile(code, title, "exec"), names)


def fewer(code):
    for name, most in FEWER.items():
        code = re.sub(rf"\b{name}=(\d+)", lambda found, n=name, m=most: f"{n}={min(m, int(found[1]))}", code)
    return SLICE.sub("[:5]", code)


@pytest.fixture
def standing_in(request, smollm2, small, tiny, tmp_path, monkeypatch):
    """What pages open by name are small models of random weights; files land in a folder of the test's."""
    monkeypatch.chdir(tmp_path)
    page = request.node.callspec.params.get("page")

    def load(name, **given):
        if "llava" in name:
            processor = tiny_models.tiny_processor("llava")
            return models.wrap(tiny_models.tiny("llava"), processor=processor, name="tiny-llava")
        if given.get("backend") == "nnsight":
            return from_huggingface(tiny_models.tiny("llama"), tiny_models.tiny_tokenizer())
        if name in ("smollm2-135m", LARGE):
            return models.wrap(smollm2.hf, smollm2.tokenizer, name=name) if page in REAL else small
        return models.wrap(tiny("llama").hf, tiny_models.tiny_tokenizer(), name="tiny-llama")

    # That their rows are exact is not this file's question; all of them belong to it, so nobody else is told so.
    monkeypatch.setattr(checking, "_compare", lambda *_: "")
    monkeypatch.setattr(models, "load", load)
    hf = tiny("llama").hf
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: twin(hf))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tiny_models.tiny_tokenizer())


EXAMPLES = [page for page in PAGES if blocks(page) and page.name != "coming-from.md"]


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page, standing_in, capsys):
    """All of a page, in order; where no number was lowered, what is printed is what stands there."""
    names = {}
    exec(BEFORE.get(page.name, ""), names)
    lowered = False
    for n, (code, shown) in enumerate(blocks(page)):
        quick = fewer(code).replace('"cuda"', '"cpu"')
        lowered |= quick != code
        capsys.readouterr()
        run(quick, names, f"{page.name}-{n}")
        printed = capsys.readouterr().out
        if "print(" in code:
            assert printed.strip()
        if shown and not lowered:
            assert alike(printed, shown), f"{page.name} shows:\n{shown}\nand is:\n{printed}"


def alike(got, want):
    """Words are the same; numbers up to another processor's rounding."""
    number = re.compile(r"-?\d+\.\d+")
    if number.sub("#", got).split() != number.sub("#", want).split():
        return False
    figures = zip(number.findall(got), number.findall(want), strict=True)
    return all(float(one) == pytest.approx(float(other), rel=0.02, abs=0.02) for one, other in figures)


def parts(library):
    """Of the page for those who come from others: what comes before, a library's opening, its pairs by heading."""
    text = (DOCS / "coming-from.md").read_text()
    before, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    section = next(section for section in sections if section.startswith(library))
    opening, *pairs = re.split(r"^### ", section, flags=re.MULTILINE)
    code = lambda part: [code for code, _ in PYTHON.findall(part)]  # noqa: E731
    return code(before) + code(opening), {pair.split("\n")[0]: code(pair) for pair in pairs}


LIBRARIES = {"TransformerLens": "transformer_lens", "nnsight": "nnsight", "pyvene": "pyvene"}


def opened_by(library, hf, monkeypatch):
    """What a library opens by name, around the weights of a tiny model."""
    if library == "TransformerLens":
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        def boot(name):
            return build_bridge_from_module(twin(hf), type(hf).__name__, hf_config=hf.config, tokenizer=None)

        monkeypatch.setattr(TransformerBridge, "boot_transformers", boot)
    elif library == "nnsight":
        import nnsight

        def open_model(name):
            return nnsight.TransformersModel(twin(hf), tokenizer=tiny_models.tiny_tokenizer(), task="text-generation")

        monkeypatch.setattr(nnsight, "LanguageModel", open_model)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("library", LIBRARIES)
def test_theirs_and_ours_are_equal(library, standing_in, tiny, monkeypatch):
    if find_spec(LIBRARIES[library]) is None:
        pytest.skip(f"{library} is not installed")
    opened_by(library, tiny("llama").hf, monkeypatch)
    before, pairs = parts(library)
    names = {}
    for n, code in enumerate(before):
        run(code, names, f"{library}-{n}")
    assert pairs
    for title, (theirs, ours) in pairs.items():
        answers = []
        for n, code in enumerate((theirs, ours)):
            own = dict(names)
            with torch.no_grad():
                run(code, own, f"{library}-{title}-{n}")
            (target,) = ast.parse(code).body[-1].targets
            answers.append((target.id, own[target.id]))
        (name, got), (same, want) = answers
        assert name == same, title
        assert torch.is_tensor(got)
        assert got.shape == want.shape, title
        assert (got - want).abs().max() <= 1e-5, title


def test_shows_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    assert len(text.splitlines()) < 100  # a page


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(name):
    """Those of the site's pages are checked as it is built."""
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text())
    assert links
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


def documented():
    return re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in DOCS.rglob("api/*.md")), re.MULTILINE)


def test_every_public_name_is_in_the_reference():
    def thing(path):
        found, (_, *rest) = {"engine": engine, "models": models}[path.split(".")[0]], path.split(".")
        for name in rest:
            found = getattr(found, name)
        return found

    names = documented()
    assert len(set(names)) == len(names)
    there = {id(thing(name)) for name in names}
    lacking = [name for name, known in PUBLIC.items() if id(known) not in there]
    assert not lacking, f"not on a page of docs/api: {lacking}"


def test_every_command_is_in_the_reference():
    text = (DOCS / "api" / "command-line.md").read_text()
    for command in app.registered_commands:
        assert f"headpatch {command.name or command.callback.__name__}" in text


def test_the_site_is_built(tmp_path):
    """Strictly: every link and anchor leads somewhere, every name of the reference is found. Nothing is fetched to
    look at it.
    """
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    fetched = re.compile(
        r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:|@import|url\(\"?https?:"
    )
    for file in (*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")):
        assert not fetched.search(file.read_text()), file.name
