"""LoRA on a flow model's transformer, the reference model inside it, and the average of its weights.

The policy is the base with the adapter on; the reference is the same weights with the adapter off. So the transformer
is never in memory twice. Adapter weights are float32 whatever the dtype of the base. An initial adapter
(``initial_adapter``) belongs to the base: it stays on in the reference, and files of the trained adapter contain it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gdro_cli.errors import StoreError, UserError
from gdro_cli.files import write_tensors
from gdro_cli.models.base import FlowModel
from gdro_cli.models.initial_adapter import INITIAL
from gdro_cli.suggest import similar

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name under which ``pipe.load_lora_weights(folder)`` of diffusers looks for an adapter."""

_ADAPTER = "default"
_PREFIX = "transformer."


def attach_lora(
    model: FlowModel,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | Literal["auto", "all-linear"] = "auto",
    rslora: bool = False,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freeze the transformer and add a low-rank adapter, which changes nothing until it is trained.

    ``W x + s B A x`` with A normal (deviation 1 / rank), B zero and s = alpha / rank, or alpha / sqrt(rank) for
    rank-stabilised LoRA (LoRA: arXiv 2106.09685; rsLoRA: arXiv 2312.03732).

    Args:
        model: its transformer must not be wrapped yet (DDP, FSDP).
        rank: width of A and B.
        alpha: scale, see above.
        targets: "auto" = the family's published layers; "all-linear" = every linear layer, modulation, embedders and
            output included; or a list of names, or suffixes of names, of layers.
        rslora: use the rank-stabilised scale.
        seed: seed of A; the global random state is neither used nor changed.

    Returns:
        The adapter's parameters, float32, on the base's device, in the transformer's order.

    Raises:
        UserError: the transformer has an adapter already, or a target matches no linear layer.
    """
    from peft import LoraConfig

    from gdro_cli.models.lora_linear import use_own_class

    transformer: Any = model.transformer
    if any(_ADAPTER in layer.lora_A for layer in _lora_layers(transformer)):
        raise UserError("the transformer has an adapter already: load the model again to attach another")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number will do: peft only divides it
        target_modules=_target_names(model, targets),
        use_rslora=rslora,
        init_lora_weights="gaussian",
    )
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of the initial adapter
        torch.default_generator.manual_seed(seed)  # peft draws on the CPU
        transformer.add_adapter(config, adapter_name=_ADAPTER)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    for layer in _lora_layers(transformer):
        layer._active_adapter = [name for name in (INITIAL, _ADAPTER) if name in layer.lora_A]
        use_own_class(layer)
    return parameters


def check_targets(model: FlowModel, targets: Sequence[str] | Literal["auto", "all-linear"]) -> None:
    """Check targets as ``attach_lora`` does, but from the transformer's configuration alone: no weights are read.

    Raises:
        UserError: a target matches no linear layer.
        PrerequisiteError: the configuration is missing.
    """
    if not isinstance(targets, str):
        _refuse_unknown(targets, _linear_layers(model.folder.meta_component("transformer")))


@contextmanager
def reference(model: FlowModel) -> Iterator[None]:
    """Switch the adapter off inside the block: the model is then exactly the base, its initial adapter included."""
    layers = _lora_layers(model.transformer)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    # Only the switches: peft's own methods also change requires_grad, which DDP and FSDP forbid.
    for layer in layers:
        if INITIAL in layer.lora_A:
            layer._active_adapter = [INITIAL]
        else:
            layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, (is_off, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = is_off, active


@contextmanager
def merged(model: FlowModel) -> Iterator[None]:
    """Sample faster: inside the block W is W + s B A, in W's own dtype. The adapter must not change in the block.

    Passes differ from those with the adapter by rounding, so a policy whose likelihoods are compared must not be drawn
    in the block. W itself waits in host memory and returns unchanged. Nothing is merged where the adapter is off, or W
    is quantised or sharded.
    """
    modules = () if model.loaded_transformer is None else model.loaded_transformer.modules()
    layers: list[Any] = [layer for layer in modules if getattr(layer, "can_fold", False)]
    kept: list[Tensor] = []
    try:
        for layer in layers:
            kept.append(layer.fold())
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=False):
            layer.unfold(weight)


def lora_state(model: FlowModel) -> dict[str, Tensor]:
    """Copy the adapter's weights to the CPU, named as peft does: ``<layer>.lora_A.weight``, ``<layer>.lora_B.weight``.

    Raises:
        UserError: the transformer has no adapter.
    """
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in _lora_parameters(model).items()}


def load_lora_state(model: FlowModel, state: Mapping[str, Tensor]) -> None:
    """Copy weights of ``lora_state`` into the attached adapter.

    Raises:
        UserError: the transformer has no adapter.
        StoreError: names or shapes differ from the attached adapter's.
    """
    parameters = _lora_parameters(model)
    expected = {(name, parameter.shape) for name, parameter in parameters.items()}
    differing = sorted({name for name, _ in expected ^ {(name, tensor.shape) for name, tensor in state.items()}})
    if differing:
        raise StoreError(
            f"the stored adapter does not fit this recipe's ({len(differing)} layers differ, e.g. {differing[0]}): "
            "use the rank and targets it was trained with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def save_lora(model: FlowModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write the adapter in diffusers' format: ``pipe.load_lora_weights(folder)`` gives the trained model.

    The file's metadata has rank, alpha and the kind of scale; without them loaders assume alpha = rank. If the model
    has an initial adapter, the file holds both as one (``_joined``).

    Args:
        model: the model with the adapter, whose configuration is written.
        folder: made if missing; gets ``pytorch_lora_weights.safetensors``.
        state: weights of ``lora_state`` to write instead of the current ones.

    Returns:
        Path of the file.

    Raises:
        UserError: the transformer has no adapter.
        StoreError: the disk refuses.
    """
    weights = lora_state(model) if state is None else state
    config = _bare(model.transformer).peft_config[_ADAPTER]
    rank, alpha, rslora = config.r, config.lora_alpha, config.use_rslora
    if model.initial is not None:
        weights = _joined(weights, model.initial.pairs, scale=_scale(model))
        rank = alpha = max(len(value) for name, value in weights.items() if ".lora_A." in name)
        rslora = False
    # Only the keys that define the adapter: an older peft refuses a file with a key that it lacks.
    definition: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": sorted({name.rsplit(".lora_", 1)[0] for name in weights}),
    }
    path = folder / LORA_FILE
    write_lora(path, {_PREFIX + name: value for name, value in weights.items()}, definition)
    return path


def write_lora(path: Path, tensors: Mapping[str, Tensor], definition: Mapping[str, Any]) -> None:
    """Write tensors by diffusers' keys, with peft's configuration of the adapter as diffusers' metadata.

    Raises:
        StoreError: the disk refuses.
    """
    prefixed = {_PREFIX + key: value for key, value in definition.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(prefixed, sort_keys=True)}
    write_tensors(path, tensors, metadata=metadata)


def trained_part(model: FlowModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The attached adapter's weights, as of ``lora_state``, from the weights of a file of ``save_lora``."""
    if model.initial is None:
        return dict(weights)
    rank, scale = _bare(model.transformer).peft_config[_ADAPTER].r, _scale(model)
    parts: dict[str, Tensor] = {}
    for name in _lora_parameters(model).keys() & weights.keys():
        parts[name] = weights[name][:rank] if ".lora_A." in name else weights[name][:, :rank] / scale
    return parts


def _joined(
    weights: Mapping[str, Tensor], initial: Mapping[str, tuple[Tensor, Tensor]], *, scale: float
) -> dict[str, Tensor]:
    """One adapter of scale 1 that does what the trained and the initial one do together.

    ``A = [A_new; A_init; 0]`` and ``B = [s B_new, B_init, 0]``. The zeros give every layer the same rank, since not
    every loader takes different ones.

    Args:
        weights: of ``lora_state``, with the scale ``scale``.
        initial: layer -> (A [r, in], s B [out, r]).
        scale: of the trained adapter.
    """
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in weights} | initial.keys())
    stacks: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for layer in layers:
        down, up = weights.get(f"{layer}.lora_A.weight"), weights.get(f"{layer}.lora_B.weight")
        stacks[layer] = [] if down is None or up is None else [(down, scale * up)]
        stacks[layer] += [initial[layer]] if layer in initial else []
    rank = max(sum(len(down) for down, _ in pairs) for pairs in stacks.values())
    joined: dict[str, Tensor] = {}
    for layer, pairs in stacks.items():
        missing = rank - sum(len(down) for down, _ in pairs)
        down, up = torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1)
        joined[f"{layer}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, missing))
        joined[f"{layer}.lora_B.weight"] = nn.functional.pad(up, (0, missing))
    return joined


class Ema:
    """Exponential moving average of parameters, kept in float32.

    Before update i (i = 1, 2, ...) the decay is ``eta(i) = min(rate * i, max_decay)`` and then
    ``average = eta * average + (1 - eta) * parameter`` (GDRO, arXiv 2601.02036: rate 0.001, max_decay 0.5).

    Args:
        parameters: the parameters; the average starts as a copy of them.
        rate: growth of the decay per update, >= 0.
        max_decay: ceiling of the decay, in [0, 1].
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, max_decay: float) -> None:
        self.rate = rate
        self.max_decay = max_decay
        self.updates = 0
        self._parameters = list(parameters)
        self._average = [p.detach().float().clone() for p in self._parameters]

    def decay(self, update: int) -> float:
        """Return eta at update number ``update``, counted from 1."""
        return min(self.rate * update, self.max_decay)

    def update(self) -> None:
        """Add the parameters' current values to the average."""
        self.updates += 1
        new = 1.0 - self.decay(self.updates)
        with torch.no_grad():
            for average, parameter in zip(self._average, self._parameters, strict=True):
                average.lerp_(parameter.detach().float(), new)

    def state(self) -> dict[str, Tensor]:
        """Copy the average and the update count to CPU tensors."""
        tensors = {f"{i:05d}": a.to("cpu", copy=True) for i, a in enumerate(self._average)}
        return {**tensors, "updates": torch.tensor(self.updates)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a ``state``.

        Raises:
            StoreError: it belongs to other parameters.
        """
        if {name: tensor.shape for name, tensor in state.items()} != {n: t.shape for n, t in self.state().items()}:
            raise StoreError("the stored average does not fit the adapter: use the rank and targets it was made with")
        self.updates = int(state["updates"])
        for i, average in enumerate(self._average):
            average.copy_(state[f"{i:05d}"])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the average into the parameters inside the block; the trained values return after it."""
        trained = [p.detach().clone() for p in self._parameters]
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(trained)

    def _fill(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)


def _bare(module: Any) -> Any:
    """The module inside DDP's wrapper; FSDP and the compilation of blocks add no wrapper."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _lora_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _lora_parameters(model: FlowModel) -> dict[str, nn.Parameter]:
    """Parameters of the trained adapter by the name that peft gives them in files."""
    infix = f".{_ADAPTER}."
    named = _bare(model.transformer).named_parameters()
    parameters = {n.replace(infix, "."): p for n, p in named if ".lora_" in n and infix in n}
    if not parameters:
        raise UserError("the transformer has no adapter: attach one first")
    return parameters


def _scale(model: FlowModel) -> float:
    """The trained adapter's s, the same in every layer."""
    scales = (layer.scaling.get(_ADAPTER) for layer in _lora_layers(model.transformer))
    return float(next(scale for scale in scales if scale is not None))


def _target_names(model: FlowModel, targets: Sequence[str] | str) -> list[str]:
    """Resolve targets to what peft matches: full layer names or suffixes."""
    linear = _linear_layers(model.transformer)
    if targets == "all-linear":
        return linear
    names = list(model.lora_targets if targets == "auto" else targets)
    _refuse_unknown(names, linear)
    return names


def _linear_layers(module: nn.Module) -> list[str]:
    """Names of the linear layers, also of those that an initial adapter has wrapped."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and ".lora_" not in name]
    return [name.removesuffix(".base_layer") for name in names]


def _refuse_unknown(targets: Sequence[str], linear: Sequence[str]) -> None:
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            suffixes = sorted({name.split(".", 2)[-1] for name in linear})
            raise UserError(
                f"train.lora.targets names {target}, but no linear layer of the transformer ends like that"
                f"{similar(target, suffixes)}"
            )
