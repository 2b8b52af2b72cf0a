"""Tiny models beside copies that the engine never sees, made once."""

import pytest

from tests.sites import Family


@pytest.fixture(scope="session")
def families():
    """A function of the family's name."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = Family(name)
        return made[name]

    return make
