"""Tiny models that see, made once, and a small setting."""

import pytest

from bench.families import wrapped
from engine.experiments.setting import Setting
from tests.experiments import SMALL, picture_task, without_image_answers


@pytest.fixture(scope="module")
def seeing():
    """A function of the family: a tiny image-text model, made once."""
    made = {}

    def make(family="llava"):
        if family not in made:
            made[family] = wrapped(family)
            without_image_answers(made[family].hf)
        return made[family]

    return make


@pytest.fixture
def setting(seeing, tmp_path):
    return Setting(seeing(), picture_task(), 0, SMALL, tmp_path, progress=False)
