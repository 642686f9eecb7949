"""Tiny random models of the real pipeline classes, built once per session, and the tests' common inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.shared import shared
from tests.support.tiny_families import BUILDERS, build_flux

SIZE = {"height": 32, "width": 48}
"""Image size of the tests: 4 x 6 latent pixels, 2 x 3 tokens; not square, so swapped axes show."""
TOKENS = 12
"""Text tokens of the tiny FLUX (its T5 tokenizer's own length)."""
PROMPTS = ("a red sign", "two blue stars on a brick wall", "a green heart")


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX without a guidance input (as schnell), schedule shifted by image size."""
    return shared(tmp_path_factory, "flux", build_flux)


@pytest.fixture(scope="session")
def guided_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX with a guidance input (as dev), schedule with a fixed shift."""
    return shared(
        tmp_path_factory, "guided-flux", lambda path: build_flux(path, guidance_embeds=True, dynamic_shift=False)
    )


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family in ``tiny_families.BUILDERS``, built at its first use."""

    @functools.cache
    def folder(name: str) -> Path:
        return shared(tmp_path_factory, name, BUILDERS[name])

    return folder
