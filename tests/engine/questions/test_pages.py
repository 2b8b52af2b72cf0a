"""Pages of effects: their numbers are the summary's, any text is shown as it is; in a browser they sort and switch."""

import html
import json
import re
import shutil
import subprocess
import time

import pytest
import torch

import engine
from engine.questions import effects as made_of
from engine.questions import pages, showing
from engine.questions.effects import Effects

HOSTILE = [
    "</script><script>boom()</script>",
    "<b>",
    "&lt;",
    '"',
    "'",
    "$data",
    "\n\t ",
    "\u6771\U0001f600",
    "\ud800",
    "\u2028",
]
OPTIONS = dict(level=0.8, correction="holm", resamples=99, seed=4)
NUMBERS = {"mean": "mean", "error": "standard_error", "low": "low", "high": "high", "p": "p"}
N = 7


def made(*sizes, n=N, **fields):
    random = torch.Generator().manual_seed(1)
    return Effects(torch.randn(n, *sizes, generator=random), torch.randn(n, generator=random), **fields)


KINDS = {
    "heads": made(3, 4, metric="logit_difference"),
    "heads at positions": made(2, 3, 4, positions=[-2, -1], tokens=[" a", "\n"]),
    "layers": made(5, site="resid_post"),
    "layers at names": made(2, 5, site="resid_post", positions=["subject", "last"]),
    "layers at repeated tokens": made(3, 5, site="mlp_out", positions=[4, 4, 0], tokens=["x", "x", "y"]),
    "neurons": made(2, 9, site="mlp_act"),
    "groups": made(4, groups=["m0", "a1.h1<q>", "m3", "m2"]),
    "groups at positions": made(2, 3, groups=["early", "late", "all"], positions=[0, 9]),
}


@pytest.fixture(params=KINDS)
def effects(request):
    return KINDS[request.param]


def data_of(page):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html)
    return json.loads(found)


def test_numbers_are_the_summarys(effects):
    data = data_of(effects.show(**OPTIONS))
    frame = effects.summary(**OPTIONS)
    assert set(data["numbers"]) == set(NUMBERS)
    for name, column in NUMBERS.items():
        assert data["numbers"][name] == pytest.approx(frame[column].tolist(), rel=1e-5, abs=1e-12)
    for part in data["parts"]:
        named = [part["names"][i] for i in part["at"]]
        assert [name.split(" ")[0] for name in named] == [str(name) for name in frame[part["name"]]]
    assert [effects._units[u] for u in data["ranked"]] == effects.top(len(effects._units))
    assert data["prompts"] == N


def test_maps_are_those_of_the_heat_map(effects, tmp_path, monkeypatch):
    data = data_of(effects.show(resamples=9))
    if effects.groups is not None and effects.positions is None:
        assert data["maps"] is None
        return
    drawn = []
    monkeypatch.setattr(engine.plots, "_save", lambda figure, path: drawn.extend(a for a in figure.axes if a.images))
    effects.heatmap(tmp_path / "map.png", top=0)
    means = torch.tensor(data["numbers"]["mean"])
    shown = torch.stack([torch.tensor(axes.images[0].get_array().filled()) for axes in drawn])
    assert torch.allclose(means[torch.tensor(data["maps"]["units"])], shown.float(), rtol=1e-5)
    assert sorted(torch.tensor(data["maps"]["units"]).flatten().tolist()) == list(range(len(means)))
    assert data["maps"]["titles"] == [axes.get_title() for axes in drawn if axes.get_title()]
    assert (data["maps"]["y"], data["maps"]["x"]) == (drawn[0].get_ylabel(), drawn[-1].get_xlabel())


def test_tokens_are_named():
    data = data_of(KINDS["heads at positions"].show(resamples=9))
    assert data["parts"][0]["names"] == ["-2 ·a", "-1 ↵"]
    assert data["maps"]["titles"] == ["position -2: ·a", "position -1: ↵"]
    repeated = data_of(KINDS["layers at repeated tokens"].show(resamples=9))
    assert repeated["parts"][0]["names"] == ["4 x", "4 x", "0 y"]
    assert repeated["maps"]["rows"] == ["x", "x", "y"]


def test_the_largest_of_many():
    """Groups: only these are on the page, with the numbers that they have among all. Maps have all."""
    many = made(50, groups=[f"g{i}" for i in range(50)])
    page = many.show(top=7, resamples=99)
    data, frame = data_of(page), many.summary(resamples=99)
    named = [data["parts"][0]["names"][data["parts"][0]["at"][u]] for u in data["ranked"]]
    assert named == many.top(7)
    for name, column in NUMBERS.items():
        want = [frame[column][int(group[1:])] for group in named]
        assert [data["numbers"][name][u] for u in data["ranked"]] == pytest.approx(want, rel=1e-5)
    assert "The 7 of 50 units" in data["notes"][0]
    mapped = data_of(KINDS["heads"].show(top=5, resamples=9))
    assert (len(mapped["ranked"]), len(mapped["numbers"]["p"])) == (5, 12)
    assert "in the table; the map has all" in mapped["notes"][0]


def test_too_many_for_a_map(monkeypatch):
    """Layers and neurons keep their numbers."""
    monkeypatch.setattr(showing, "MAPPED", 17)
    effects = KINDS["neurons"]
    data = data_of(effects.show(top=4, resamples=9))
    assert data["maps"] is None
    layer, neuron = data["parts"]
    named = [(int(layer["names"][layer["at"][u]]), int(neuron["names"][neuron["at"][u]])) for u in data["ranked"]]
    assert named == effects.top(4)
    assert "on this page" in data["notes"][0]


def test_one_prompt():
    """There is nothing to resample."""
    one = made(3, 4, n=1)
    data = data_of(one.show())
    assert data["numbers"] == {"mean": pytest.approx(one.mean.flatten().tolist(), rel=1e-5)}
    assert "no p-values" in data["notes"][0]
    assert "standard error" not in one._repr_html_()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scipy's
@pytest.mark.filterwarnings("ignore:intervals of 4 units are NaN")
def test_numbers_that_overflow():
    patched = torch.full((3, 2, 2), 1e200, dtype=torch.float64)
    patched[0] = -1e200
    data = data_of(Effects(patched, torch.zeros(3, dtype=torch.float64)).show(resamples=9))
    assert data["numbers"]["error"] == [None] * 4


def hostile():
    return made(len(HOSTILE), 3, site="resid_post", positions=range(len(HOSTILE)), tokens=HOSTILE, metric="</script>")


def test_texts_are_not_markup():
    """Titles, tokens, names of groups and metrics: in a page, in the table of a notebook."""
    for text in HOSTILE:
        page = made(2, groups=[text, "b"]).show(title=text, resamples=9)
        assert page.html.isascii()
        assert page.html.count("</script>") == 2  # of the page's own
        assert "<b>" not in page.html
        assert data_of(page)["parts"][0]["names"][0] == text
    assert data_of(hostile().show(resamples=9))["said"].startswith("Effects on </script>")
    tables = [hostile()._repr_html_(), made(10, groups=HOSTILE)._repr_html_()]
    for table in tables:
        assert table.isascii()
        assert set(re.findall(r"</?(\w+)", table)) == {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert "&lt;b&gt;" in tables[1]


def test_one_file_without_a_network():
    page = KINDS["heads"].show(resamples=9)
    assert not re.search(r"https?:|src=|href=|url\(|@import|fetch\(|XMLHttp", page.html)
    assert "default-src 'none'" in page.html


def test_size():
    """Small enough for a notebook under version control: SmolLM2's heads."""
    effects = made(30, 9, n=20)
    assert len(effects.show(resamples=99).html) < 40_000


def test_saved_whole(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "page.html"
    page = KINDS["heads"].show(path, resamples=9)
    assert path.read_text() == page.html
    other = KINDS["groups"].show(resamples=9)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        other.save(path)
    assert path.read_text() == page.html
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_in_a_notebook():
    """A frame that holds the page, and lets it run its script and nothing more; no page as long as it is printed."""
    page = made(len(HOSTILE), groups=HOSTILE).show(resamples=9)
    (held,) = re.findall(r'srcdoc="([^"]*)"', page._repr_html_())
    assert html.unescape(held) == page.html
    assert 'sandbox="allow-scripts"' in page._repr_html_()
    assert len(repr(page)) < 100


def test_effects_in_a_notebook(effects, monkeypatch):
    """The largest, by name; nothing is resampled, and most of the time there is nothing to wait for."""
    for name in ("bootstrap", "sign_flips"):
        monkeypatch.setattr(made_of, name, lambda *_: pytest.fail("resampled"))
    shown = effects._repr_html_()
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", shown)][1:]
    best = effects.top(min(10, len(effects._units)))
    assert [row[: len(row) - 2 - (effects.tokens is not None)] for row in rows] == [
        [html.escape(str(part)) for part in (unit if isinstance(unit, tuple) else (unit,))] for unit in best
    ]
    assert float(rows[0][-2]) == pytest.approx(effects.mean.flatten()[effects._best(1, "absolute")].item(), rel=1e-3)
    large = made(30, 9, n=20)
    start = time.perf_counter()
    large._repr_html_()
    assert time.perf_counter() - start < 1


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ERRORS = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
</script>"""
READ = """<script>
const rows = () => [...document.querySelectorAll("#table tbody tr")];
const cells = (column = 0) => rows().map(row => row.cells[column].textContent.trim());
const colours = () => [...document.querySelectorAll(".map td")].map(td => td.style.backgroundColor);
const press = name => [...document.querySelectorAll("#table button")].find(b => b.textContent === name).click();
const found = { errors };
%s
document.body.replaceChildren(Object.assign(document.createElement("pre"), { textContent: JSON.stringify(found) }));
</script>"""


def in_a_browser(page, folder, script):
    """What a script finds on the page, in Chromium; and no errors."""
    if CHROMIUM is None:
        pytest.skip("no Chromium (chromium, chromium-browser, google-chrome) on this machine")
    path = folder / "page.html"
    whole = page.html.replace("<title>", ERRORS + "<title>").replace("</body>", READ % script + "</body>")
    pages.Page(whole).save(path)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    run = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, timeout=120, check=True)
    (text,) = re.findall(r"<pre>(.*?)</pre>", run.stdout.decode(), re.DOTALL)
    found = json.loads(html.unescape(text))
    assert found.pop("errors") == []
    return found


def test_sorts_and_switches(tmp_path):
    effects = made(3, 4, positions=None)
    effects.patched[:, 1, 2] += 9
    page = effects.show(resamples=99)
    script = """
    found.first = cells(3);
    found.effect = colours();
    press("mean effect"); found.falling = cells(3);
    press("mean effect"); found.rising = cells(3);
    press("p"); found.p = cells(7);
    press("layer"); found.layers = cells(1);
    press("#"); found.ranks = cells();
    document.querySelector("[value=p-value]").click(); found.pvalue = colours();
    document.querySelector("[value=interval]").click(); found.interval = colours();
    document.querySelector("[value=effect]").click(); found.again = colours();
    rows()[0].dispatchEvent(new MouseEvent("mousemove", { bubbles: true, clientX: 5, clientY: 5 }));
    found.tip = [...document.getElementById("tip").children].map(line => line.textContent);
    found.here = [...document.querySelectorAll(".map td.here")].map(td => td.style.backgroundColor);
    """
    found = in_a_browser(page, tmp_path, script)

    def numbers(name):
        return [float(text.replace("\u2212", "-")) for text in found[name]]

    frame = effects.summary(resamples=99)
    order = frame["mean"].abs().sort_values(ascending=False, kind="stable").index
    assert numbers("first") == pytest.approx(frame["mean"][order].tolist(), rel=6e-3)
    assert numbers("falling") == pytest.approx(sorted(frame["mean"], reverse=True), rel=6e-3)
    assert numbers("rising") == pytest.approx(sorted(frame["mean"]), rel=6e-3)
    assert numbers("p") == pytest.approx(sorted(frame["p"]), rel=6e-3)
    assert numbers("layers") == [0] * 4 + [1] * 4 + [2] * 4
    assert numbers("ranks") == list(range(1, 13))

    bound = effects.mean.abs().max()
    low, high = effects.interval(resamples=99)
    nearest = torch.where(low > 0, low, torch.where(high < 0, high, 0))
    assert 1 < (nearest == 0).sum() < 11
    units = [(layer, head) for head in range(4) for layer in range(3)]  # heads down, layers across
    for name, values in {"effect": effects.mean, "again": effects.mean, "interval": nearest}.items():
        for unit, colour in zip(units, found[name], strict=True):
            share = (values[unit] / bound).item()
            assert side(colour) == (share > 0) - (share < 0) or 0 < abs(share) < 0.01, (name, unit)
    strongest = units.index((1, 2))
    assert found["effect"][strongest] == "rgb(178, 24, 43)"
    p = effects.p_values(resamples=99)
    for unit, colour in zip(units, found["pvalue"], strict=True):  # green falls from 255 at 1 to 39 at 0.001 and below
        green, share = int(colour.split(",")[1]), (p[unit].log() / torch.tensor(0.001).log()).item()
        assert green == pytest.approx(255 - 216 * share, abs=45), unit
    assert found["pvalue"][strongest] == min(found["pvalue"], key=lambda colour: int(colour.split(",")[1]))
    assert found["here"] == ["rgb(178, 24, 43)"]
    where, mean, error, interval, test = found["tip"]
    assert (where, test.split()[0]) == ("layer 1, head 2", "p")
    assert mean.endswith("over 7 prompts")
    assert error.startswith("standard error 0.")
    assert interval.startswith("95% interval ")


def side(colour):
    """Of zero: 1 for red, -1 for blue, 0 for white."""
    red, _, blue = (int(channel) for channel in re.findall(r"\d+", colour))
    return (red > blue) - (red < blue)


def test_any_text_in_a_browser(tmp_path):
    """Shown letter by letter; none of it runs."""
    script = """
    found.title = document.title;
    found.scripts = document.querySelectorAll("script").length;
    found.tokens = [...document.querySelectorAll(".map tbody th")].map(th => th.textContent);
    found.bold = document.querySelectorAll("#maps b, #table b").length;
    """
    found = in_a_browser(hostile().show(title=HOSTILE[0] + "é", resamples=9), tmp_path, script)
    assert found["title"] == HOSTILE[0] + "é"
    assert found["scripts"] == 4  # two of the page, two of this test
    assert found["bold"] == 0
    assert found["tokens"][:2] == ["</script><script>boom()…", "<b>"]
    assert found["tokens"][6] == "↵→·"


def test_one_prompt_and_groups_in_a_browser(tmp_path):
    script = """
    found.views = [...document.querySelectorAll("[name=view]")].map(input => input.value);
    found.heads = [...document.querySelectorAll("#table button")].map(button => button.textContent);
    press("group"); found.groups = cells(1);
    found.swatches = document.querySelectorAll(".swatch").length;
    """
    groups = ["m3", "a0.h1<q>", "b"]
    found = in_a_browser(made(3, n=1, groups=groups).show(), tmp_path, script)
    assert found == {"views": ["effect"], "heads": ["#", "group", "mean effect"], "groups": groups, "swatches": 3}
