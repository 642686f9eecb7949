"""A frozen transformer in parts, one in each process, for models that do not fit one GPU (FSDP2 of torch).

What is sharded is the frozen base alone. The adapter is added later and is whole in every process: it is small, its
gradient is summed like that of a replicated base, and checkpoints, averages and exports are the same files. Nothing
frozen has a gradient, so FSDP only gathers each layer's weights for its passes and lets them go again.

It is torch's ``fully_shard`` itself, not accelerate's ``prepare``, which wraps it: that one shards on GPUs only, so
that nothing of it could be checked on a CPU, and also wants the optimizer's parameters to be sharded.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

# diffusers' blocks return views, which nothing writes into; torch warns of what would happen if something did.
_VIEWS = "FSDP2-wrapped module .* returned a view tensor"


def shard_frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """Shard a frozen module over all processes, block by block, and return it; collective.

    Args:
        module: on the CPU, so that no device ever holds more than its share and one block. Its blocks are the
            members of the module lists that are its direct children, as diffusers' transformers have them.
        device: where the parts go.
    """
    from torch.distributed.device_mesh import init_device_mesh

    warnings.filterwarnings("ignore", message=_VIEWS)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for child in module.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    # The first gathering makes the tensors that later ones fill. In a sampling's inference mode they would become
    # tensors that can never be trained through.
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
            part.reshard()
    return module
