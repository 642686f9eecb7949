"""The fault campaign, which is a script: it must detect lost and changed files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults import campaign as script
from tests.faults.campaign import Campaign, broken_parts, contents, left_behind

pytestmark = pytest.mark.slow

CARELESS = """
import json, sys, time
from pathlib import Path
for number in range(6):
    folder = Path(sys.argv[1]) / "stores/s/shards" / f"{number:05d}"
    if (folder / "manifest.json").exists():
        continue
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"files": {"a": {"bytes": 1000, "sha256": "0"}}}))
    time.sleep(0.2)
    (folder / "a").write_bytes(bytes(1000))
"""
"""A job without a model, which declares a shard complete too early."""


def test_the_campaign_detects_damage(store: Path, tmp_path: Path) -> None:
    """It detects a changed file, a torn one and an unfinished one."""
    assert list(broken_parts(store)) == [] and left_behind(store) == []
    before = contents(store)
    scores = next(store.glob("scores/*/00000.jsonl"))
    scores.write_bytes(scores.read_bytes().replace(b"0.5", b"0.6"))
    assert [Path(part).name for part in broken_parts(store)] == ["00000.jsonl"]
    tensors = store / "shards" / "00001" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    (store / "torn.json").write_text("{")
    assert len(list(broken_parts(store))) == 3
    manifest = store / "shards" / "00000" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    assert contents(store) != before
    (store / "shards" / ".00001.7.partial").mkdir()
    assert left_behind(store) == ["shards/.00001.7.partial"]


@pytest.mark.timeout(300)
def test_the_campaign_detects_a_careless_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(arguments: Any, *, recipe: Path, workspace: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CARELESS, str(workspace)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(script, "start", start)
    campaign = Campaign(tmp_path, seed=1, stages=["sample"], deadline=time.monotonic() + 200)
    campaign.undisturbed()
    campaign.run(3)
    assert campaign.kills == 3 and "violations" in campaign.table()
    assert any("counted as complete" in violation for violation in campaign.violations)
