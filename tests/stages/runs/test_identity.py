"""What names a store and a run: what the images and the training depend on, and nothing else."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from gdro_cli.config.keys import describe_fields
from gdro_cli.config.load import load_recipe
from gdro_cli.stages.runs.identity import run_path
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import store_path, training_identity

SERVERS = ("reward.http.url=http://one", "reward.vlm.base_url=http://one/v1", "reward.vlm.model=m")
"""Of rewards that this recipe does not use; tests/stages/scoring/test_outage.py has one that does."""
JUDGE = ("judge.kind=unified-reward", "judge.base_url=http://one/v1", "judge.model=m")
SPEED = {
    **{f"prompts.{split}.skip_bad": "true" for split in ("train", "validation", "eval")},
    "model.sharding": "fsdp",
    "model.offload": "true",
    "model.vae_slicing": "true",
    "model.compile": "true",
    "model.attention": "native",
    "sample.batch_size": "3",
    "sample.prompts_per_shard": "3",
    "sample.image_format": "webp",
    "reward.workers": "3",
    "reward.timeout": "3",
    "reward.http.url": "http://other",
    "reward.http.api_key_env": "REWARD_API_KEY",
    "reward.http.images_per_request": "3",
    "reward.http.concurrency": "3",
    "reward.http.timeout": "3",
    "reward.http.scale": "[0, 3]",
    "reward.http.retries": "3",
    "reward.clip.model": "other/clip",
    "reward.pickscore.model": "other/pickscore",
    "reward.pickscore.processor": "other/clip",
    "reward.hpsv2.model": "other/hps",
    "reward.hpsv2.base": "other/clip",
    "reward.aesthetic.model": "other/clip",
    "reward.aesthetic.head": "other/head",
    "reward.vlm.base_url": "http://other/v1",
    "reward.vlm.api_key_env": "REWARD_API_KEY",
    "reward.vlm.template": "words.txt",
    "reward.vlm.concurrency": "3",
    "reward.vlm.timeout": "3",
    "reward.vlm.retries": "3",
    "judge.base_url": "http://other/v1",
    "judge.api_key_env": "JUDGE_API_KEY",
    "judge.concurrency": "3",
    "judge.timeout": "3",
    "judge.retries": "3",
    "train.micro_batch": "1",
    "train.group_gradient": "two_pass",
    "train.checkpoint_every": "3",
    "train.checkpoint_minutes": "30",
    "train.keep_checkpoints": "7",
    "train.log_every": "3",
    "train.trackers": "[wandb]",
    "train.cache_reference": "false",
    "train.prefetch": "false",
    "train.gradient_checkpointing": "true",
}
"""Every key that changes nothing but speed, memory, disk space and messages, with another value than its default."""


@cache
def names(*overrides: str) -> tuple[str, str]:
    """The names of the run and of the store of ``ocr`` with changes."""
    session = Session(load_recipe("ocr", overrides=["model.dtype=float32", *overrides]), Path())
    return run_path(session).name, store_path(session, Path(), training_identity(session)).name


def test_the_table_holds_every_key_of_speed() -> None:
    assert set(SPEED) == {doc.path for doc in describe_fields() if doc.affects == {"speed"}}


@pytest.mark.parametrize(("key", "value"), SPEED.items())
def test_what_changes_speed_alone_changes_no_name(key: str, value: str, tmp_path: Path) -> None:
    """Not even where the evaluation points decide when the training ends, and so the judge counts."""
    base: tuple[str, ...] = ("train.stop_on_collapse=true", *JUDGE, *SERVERS)
    if key.endswith(".skip_bad"):  # for files only
        (tmp_path / "prompts.txt").write_text('a sign "OPEN"')
        base += (f"{key.removesuffix('skip_bad')}file={tmp_path / 'prompts.txt'}",)
    assert names(*base, f"{key}={value}") == names(*base)


@pytest.mark.parametrize(
    ("override", "run", "store"),
    [
        ("model.vae_tiling=true", True, True),
        ("model.quantization=int8", True, True),
        ("sample.steps=3", True, True),
        ("prompts.train.count=7", True, True),
        ("reward.ocr.recognition_width=320", True, False),
        ("method.tau=0.06", True, False),
        ("train.optimizer=adamw8bit", True, False),
        ("train.seed=5", True, False),
        ("train.seed=0", False, False),  # it is the recipe's seed
        ("eval.seed=7", False, False),
        ("description=other", False, False),
    ],
)
def test_what_a_key_renames(override: str, run: bool, store: bool) -> None:
    plain, changed = names(), names(override)
    assert (plain[0] != changed[0], plain[1] != changed[1]) == (run, store)
