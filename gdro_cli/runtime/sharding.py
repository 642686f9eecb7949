"""A frozen transformer in parts, one in each process, for models that do not fit one GPU (torch's FSDP2).

Only the frozen base is sharded. Every process has the whole adapter, which is added later: it is small, its gradient is
summed as with a replicated base, and checkpoints, averages and exports are the same files. Frozen weights have no
gradient, so FSDP only gathers each layer's weights for its passes and frees them again.

This uses torch's ``fully_shard`` itself, not accelerate's ``prepare``, which wraps it: that shards on GPUs only, so it
could not be tested on a CPU, and it also wants the optimizer's parameters to be sharded.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

# The blocks of diffusers return views; torch warns of writing into them, which nothing does.
_VIEWS = "FSDP2-wrapped module .* returned a view tensor"


def shard_frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """Shard a frozen module over all processes, block by block, and return it. All processes must call it.

    Args:
        module: on the CPU, so that a device never has more than its share and one block. Its blocks are the members of
            the module lists among its direct children, as in the transformers of diffusers.
        device: where this process's part goes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard  # takes half a second

    warnings.filterwarnings("ignore", message=_VIEWS)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for child in module.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    # The first gathering makes the tensors that later ones fill. If that happened in the inference mode of sampling, no
    # gradient could ever pass through them.
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
            part.reshard()
    return module
