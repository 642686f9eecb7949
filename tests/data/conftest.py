"""A small store, made the way sampling makes one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from gdro_cli.data.prompts import PromptRecord, PromptSet
from gdro_cli.data.store import Group, GroupStore

IMAGES = 4


def _record(word: str) -> PromptRecord:
    return PromptRecord.of(f'a red sign that says "{word}" on a brick background', target=word)


@pytest.fixture(scope="session")
def prompts() -> PromptSet:
    return PromptSet.of(_record(word) for word in ("ONE", "TWO", "THREE", "FOUR", "FIVE"))


@pytest.fixture(scope="session")
def make_group() -> Callable[..., Group]:
    """Makes a group whose numbers depend only on its prompt, like the sampler's."""

    def make(prompt: PromptRecord, *, images: int = IMAGES, dtype: torch.dtype = torch.bfloat16) -> Group:
        stream = torch.Generator().manual_seed(int(prompt.id, 16))
        latents = torch.randn(images, 3, 2, generator=stream).to(dtype)
        conditioning = {
            "prompt_embeds": torch.randn(5, 8, generator=stream).to(dtype),
            "mask": torch.tensor([True, True, False]),
        }
        noise = [torch.randint(256, (192,), generator=stream).to(torch.uint8).numpy() for _ in range(images)]
        decoded = [Image.frombytes("RGB", (8, 8), pixels) for pixels in noise]
        return Group(prompt, latents, conditioning, decoded, [{"seed": 10 * index} for index in range(images)])

    return make


def _open(path: Path, prompts: PromptSet, **changes: object) -> GroupStore:
    options: dict[str, object] = {
        "identity": {"model": {"path": "tiny"}, "sample": {"steps": 8, "guidance": 1.0}},
        "prompts": prompts,
        "images_per_prompt": IMAGES,
        "prompts_per_shard": 2,
    }
    return GroupStore.create_or_open(path, **(options | changes))  # type: ignore[arg-type]


@pytest.fixture
def open_store(tmp_path: Path, prompts: PromptSet) -> Callable[..., GroupStore]:
    """Create or open the store of the five prompts, two to a shard."""

    def open_it(path: Path = tmp_path / "store", **changes: object) -> GroupStore:
        return _open(path, **({"prompts": prompts} | changes))  # type: ignore[arg-type]

    return open_it


@pytest.fixture(scope="session")
def finished_store(
    tmp_path_factory: pytest.TempPathFactory, prompts: PromptSet, make_group: Callable[..., Group]
) -> GroupStore:
    """The store with every shard written, made once; tests must not change it."""
    store = _open(tmp_path_factory.mktemp("finished") / "store", prompts)
    for number in store.missing_shards():
        store.write_shard(number, [make_group(prompt) for prompt in store.shards[number]])
    return store


@pytest.fixture
def store(finished_store: GroupStore, tmp_path: Path) -> GroupStore:
    """A copy of the finished store, which a test may damage."""
    shutil.copytree(finished_store.path, tmp_path / "store")
    return GroupStore.open(tmp_path / "store")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter (pytest's own are closed to others)."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def unprivileged() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Runs a block without the administrator's right to ignore permissions."""

    @contextlib.contextmanager
    def drop() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return drop
