"""The wheel is whole: the README's fifteen lines run from it, in an environment without this checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "models", "bench")
CHECKS = """
from importlib.resources import files
from pathlib import Path
import sys

import bench, engine, models
from engine import tasks

for package in (bench, engine, models):
    assert Path(package.__file__).is_relative_to(sys.prefix), package.__file__
    assert (files(package) / "py.typed").is_file()
assert all(len(tasks.load(name).pairs) for name in tasks.SHIPPED)
assert engine.Effects.show
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy: setuptools leaves folders beside what it builds."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building needs setuptools >= 77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (made,) = folder.glob("*.whl")
    return made


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr


def test_has_all_that_is_no_module(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = [name for name in listed.stdout.split() if not name.endswith(".sh")]
    assert tracked
    assert not [name for name in tracked if name not in packed]


def test_fifteen_lines(wheel, tmp_path):
    """What the project depends on is lent by this environment; the project itself is not: it is installed there by a
    file that only the environment's own start-up reads.
    """
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=120)
    python = home / "bin" / "python"
    paths = [sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})["purelib"]]
    lent = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    Path(paths[0], "lent.pth").write_text("\n".join(lent))
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    for good, quick in {"count=100": "count=4", "steps=100": "steps=2", "train[:100]": "train[:9]"}.items():
        assert good in code
        code = code.replace(good, quick)
    script = tmp_path / "fifteen.py"
    script.write_text(CHECKS + code)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([python, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    command = home / "bin" / "headpatch"
    said = subprocess.run([command, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "extract" in said.stdout, said.stderr
