"""The description of the environment."""

from __future__ import annotations

import json
import platform
import re
from importlib import metadata

from gdro_cli.runtime.environment import environment


def test_environment_names_versions_and_devices() -> None:
    described = environment()
    assert described["python"] == platform.python_version()
    assert described["packages"]["torch"] == metadata.version("torch")
    assert (described["cuda"] is None) == (described["devices"] == ["cpu"])
    assert described["devices"] and described["threads"] >= 1 and described["cpu"]
    assert described["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", described["commit"])
    assert json.loads(json.dumps(described)) == described
