"""The description of the environment, and that its light form needs no torch."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata

import pytest

from gdro_cli.runtime.environment import environment


def test_environment_names_versions_and_devices() -> None:
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["devices"] and found["threads"] >= 1 and found["cpu"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_light_form_loads_no_torch() -> None:
    code = (
        "import sys; from gdro_cli.runtime.environment import environment\n"
        "found = environment(devices=False); assert 'devices' not in found; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
