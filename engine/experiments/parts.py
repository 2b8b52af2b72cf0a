"""What a long run made, kept in files, so that it is not made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.artifacts import write_whole


def part(path: Path, setting: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A JSON object from its file, if it was made in this setting; else made, and written there whole."""
    setting = json.loads(json.dumps(setting))
    if path.is_file():
        try:
            kept: dict[str, Any] = json.loads(path.read_text())
            if kept.pop("setting") == setting:
                return kept
        except (ValueError, KeyError, AttributeError):
            pass  # not a part: it is made anew
    found = make()
    write_whole(path, json.dumps({"setting": setting, **found}, indent=1) + "\n")
    return found
