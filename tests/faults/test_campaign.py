"""The fault campaign, which is a script: whether it finds what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults import campaign as script
from tests.faults.campaign import Campaign, broken_parts, ends, left_behind

JOB = """
import hashlib, json, sys, time
from pathlib import Path
from gdro_cli.files import new_folder
for number in range(6):
    folder = Path(sys.argv[1]) / "stores/s/shards" / f"{number:05d}"
    if (folder / "manifest.json").exists():
        continue
    data = bytes([number]) * 1000
    about = {"files": {"a": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}}
    if sys.argv[2] == "careful":
        with new_folder(folder) as unfinished:
            (unfinished / "a").write_bytes(data)
            (unfinished / "manifest.json").write_text(json.dumps(about))
    else:
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(about))
        time.sleep(0.2)
        (folder / "a").write_bytes(data)
    time.sleep(0.05)
"""
"""A job that takes no model; the careless one says that a shard is there before it is."""


def test_the_campaign_sees_damage(store: Path, tmp_path: Path) -> None:
    """What it looks for, it finds: a changed file, a torn one, something left behind."""
    assert list(broken_parts(store)) == [] and left_behind(store) == []
    before = ends(store)
    scores = next(store.glob("scores/*/00000.jsonl"))
    scores.write_bytes(scores.read_bytes().replace(b"0.5", b"0.6"))
    assert [Path(each).name for each in broken_parts(store)] == ["00000.jsonl"]
    tensors = store / "shards" / "00001" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    (store / "torn.json").write_text("{")
    assert len(list(broken_parts(store))) == 3
    manifest = store / "shards" / "00000" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    assert ends(store) != before
    (store / "shards" / ".00001.7.partial").mkdir()
    assert left_behind(store) == ["shards/.00001.7.partial"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ["careful", "careless"])
def test_the_campaign_tells_a_careful_job_from_a_careless_one(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(arguments: Any, *, recipe: Path, workspace: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", JOB, str(workspace), way]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(script, "start", start)
    campaign = Campaign(tmp_path, seed=1, stages=["sample"], deadline=time.monotonic() + 200)
    campaign.undisturbed()
    campaign.run(3)
    assert campaign.kills == 3
    said = "nothing lost, nothing changed" if way == "careful" else "violations"
    assert said in campaign.table(), campaign.violations
    assert any("taken as whole" in each for each in campaign.violations) == (way == "careless")
