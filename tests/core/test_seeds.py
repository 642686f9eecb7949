"""Named random streams."""

from __future__ import annotations

import hashlib

import torch

from gdro_cli.core.seeds import generator, seed_for


def test_seed_is_the_digest_of_its_name() -> None:
    digest = hashlib.sha256(b'[7,"noise",["3fa9",2]]').hexdigest()
    assert seed_for(7, "noise", "3fa9", 2) == int(digest[:16], 16) // 2


def test_seed_is_stable_between_versions() -> None:
    """Frozen: a change here would silently change every store and every run."""
    assert seed_for(0, "noise", "3fa9c0d1e2b4", 7) == 7129100658229175376


def test_names_do_not_collide() -> None:
    purposes = [seed_for(0, "a"), seed_for(1, "a"), seed_for(-1, "a"), seed_for(0, "b"), seed_for(0, "ab")]
    keys = [("b",), ("b", 1), ("b", "1"), ("b1",), (1, "b"), ('","',), ("é",)]
    assert len({*purposes, *(seed_for(0, "a", *names) for names in keys)}) == len(purposes) + len(keys)


def test_seeds_have_63_bits() -> None:
    seeds = [seed_for(0, "test", i) for i in range(500)]
    assert len(set(seeds)) == 500
    assert 2**62 < max(seeds) < 2**63
    assert min(seeds) >= 0


def test_generator_depends_on_its_name_only() -> None:
    first = torch.randn(4, generator=generator(3, "noise", "p", 1))
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert torch.equal(first, torch.randn(4, generator=generator(3, "noise", "p", 1)))
    assert not torch.equal(first, torch.randn(4, generator=generator(3, "noise", "p", 2)))
    assert torch.equal(before, torch.random.get_rng_state())
