"""A sum and a gather in a process group on GPUs; a launcher starts it."""

from __future__ import annotations

import torch
import torch.distributed

from gdro_cli.runtime.distributed import make_engine

if __name__ == "__main__":
    engine = make_engine()
    backend = torch.distributed.get_backend()
    assert "nccl" in backend, backend
    ones = torch.ones(1000, device=engine.device)
    torch.distributed.all_reduce(ones)
    assert ones.sum() == 1000 * engine.world
    assert engine.gather_objects([engine.rank]) == list(range(engine.world))
    assert engine.gather_rows(ones[None]).shape == (engine.world, 1000)
    engine.end()
