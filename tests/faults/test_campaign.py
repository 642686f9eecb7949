"""The fault campaign in short: a few kills of a job that samples, scores and trains. The long form is a script."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from campaign import Campaign, broken_parts, ends, left_behind

KILLS = 3


@pytest.mark.timeout(900)
def test_a_few_kills_lose_and_change_nothing(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, seed=2, stages=["train"], deadline=time.monotonic() + 600)
    campaign.undisturbed()
    campaign.run(KILLS)
    assert campaign.violations == [], campaign.table()
    assert campaign.kills == KILLS and campaign.tallies["train"].ends >= 1


def test_the_campaign_sees_damage(store: Path, tmp_path: Path) -> None:
    """What it looks for, it finds: a changed file, a torn one, something left behind."""
    assert list(broken_parts(store)) == [] and left_behind(store) == []
    before = ends(store)
    scores = next(store.glob("scores/*/00000.jsonl"))
    scores.write_bytes(scores.read_bytes().replace(b"0.5", b"0.6"))
    assert [Path(each).name for each in broken_parts(store)] == ["00000.json"]
    tensors = store / "shards" / "00001" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    (store / "torn.json").write_text("{")
    assert len(list(broken_parts(store))) == 3
    manifest = store / "shards" / "00000" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    assert ends(store) != before
    (store / "lock").touch()
    assert left_behind(store) == ["lock"]
