"""An estimate in words, for ``--dry-run``: memory by stage, cards that hold it, operations, GPU hours."""

from __future__ import annotations

from gdro_cli.core.footprint import CARDS, SUSTAINED_TFLOPS, Weights, fits, gpu_hours, usable_bytes
from gdro_cli.rewards.mix import MixReward
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training.estimate import Estimate

Rows = list[tuple[str, str]]


def sampling_needs(estimate: Estimate) -> Rows:
    """Parameters, and memory of sampling."""
    recipe, model = estimate.recipe, estimate.model
    dtype = str(model.flow.dtype).removeprefix("torch.")
    stored = dtype if recipe.model.quantization == "none" else recipe.model.quantization
    offload = " (one at a time, model.offload)" if recipe.model.offload else ""
    parts = (
        f"text encoders {gigabytes(estimate.text_bytes)}, transformer {gigabytes(estimate.transformer_bytes)} in"
        f" {stored}, autoencoder {gigabytes(estimate.vae_bytes)}{offload}"
    )
    work = f"{gigabytes(estimate.at_work)} at work on {recipe.sample.batch_size} images"
    return [
        ("parameters", _parameters(model.transformer, model.text, model.vae)),
        (
            "memory, sampling",
            f"{gigabytes(estimate.sampling_bytes)} GB: {parts}, {work}; {cards(estimate.sampling_bytes)}",
        ),
    ]


def training_needs(estimate: Estimate, session: Session) -> Rows:
    """Adapter, memory of training, and operations and GPU hours of the whole job."""
    recipe, adapter = estimate.recipe, estimate.adapter
    train = recipe.train
    own = estimate.activation_bytes()
    share = float(train.gradient_checkpointing)
    other = estimate.activation_bytes(checkpointing=0 if share else 1)
    how = "with checkpointing" if share == 1 else f"with {share:g} of the blocks checkpointed"
    how = how if share else "without checkpointing"
    frozen = gigabytes(estimate.transformer_bytes)
    memory = (
        f"{gigabytes(estimate.training_bytes)} GB: transformer {frozen}, adapter {gigabytes(adapter.total)},"
        f" activations {gigabytes(own)} for {estimate.images_at_once} images {how}"
        f" ({gigabytes(other)} {'without' if share else 'with'}); {cards(estimate.training_bytes)}"
    )
    shared = "; with FSDP the transformer is shared by the processes" if recipe.model.sharding == "fsdp" else ""
    return [
        (
            "adapter",
            f"rank {train.lora.rank}, {estimate.adapter_values / 1e6:.2f} million parameters:"
            f" {adapter.weights / 1e6:.0f} MB, gradients as much, average as much, {train.optimizer}"
            f" {adapter.optimizer / 1e6:.0f} MB",
        ),
        ("memory, training", memory + shared),
        ("train.micro_batch=auto", automatic_micro_batches(estimate)),
        *_time(estimate, session),
    ]


def automatic_micro_batches(estimate: Estimate) -> str:
    """What ``train.micro_batch: auto`` would take on each card."""
    sizes = {card: estimate.largest_micro_batch(usable_bytes(card)) for card in CARDS}
    chosen = [f"{size} images on a card of {card} GB" for card, size in sizes.items() if size is not None]
    return f"would take {', '.join(chosen)}" if chosen else f"would not fit a card of {max(CARDS)} GB"


def scoring_needs(session: Session) -> Rows:
    """Which networks that score also take the GPU; their memory is not counted."""
    recipe = session.recipe
    rewards = session.reward.parts.values() if isinstance(session.reward, MixReward) else [session.reward]
    names = [f"reward {reward.name}" for reward in rewards if reward.resources == "device"]
    names += [f"judge {recipe.judge.kind}"] if recipe.judge.kind == "unified-reward-local" else []
    if not names:
        return []
    where = f"the networks of {' and '.join(names)} also take the GPU"
    when = "the transformer leaves it while a store is scored, not at evaluation points and in rounds of online methods"
    return [("memory, scoring", f"not counted: {where}; {when}")]


def _time(estimate: Estimate, session: Session) -> Rows:
    recipe = estimate.recipe
    if recipe.online_method is None:
        imported = recipe.prompts.train.imported is not None
        sampling = {} if imported else {"sampling": estimate.store_flops(len(session.prompts("train")))}
        parts = sampling | {"training": recipe.train.steps * estimate.step_flops}
    else:
        parts = dict(zip(("rollouts", "updates"), estimate.online_flops, strict=True))
    return [
        ("operations", ", ".join(f"{name} {value / 1e15:.3g} PFLOP" for name, value in parts.items())),
        ("GPU hours", f"{' + '.join(f'{name} {hours(value)}' for name, value in parts.items())} {_ASSUMED}"),
    ]


def evaluation_time(estimate: Estimate, session: Session) -> Rows:
    """GPU hours of sampling the held-out prompts with both models."""
    recipe = estimate.recipe
    images = 2 * len(session.prompts("eval")) * recipe.eval.images_per_prompt
    flops = estimate.drawing_flops(images, steps=recipe.eval_steps, passes=estimate.passes)
    return [("GPU hours", f"{hours(flops)} {_ASSUMED}")]


_ASSUMED = (
    f"at an assumed {SUSTAINED_TFLOPS:g} TFLOP/s (40 % of an A100's 312), without scoring, text encoding and loading"
)


def hours(flops: float) -> str:
    """GPU hours at the assumed speed, to two digits."""
    value = gpu_hours(flops)
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else "under 0.1"


def gigabytes(size: float) -> str:
    """Bytes in GB of 1e9: to a tenth, and finer below one."""
    value = size / 1e9
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def cards(needed: float) -> str:
    """Which cards have room for it, with a tenth of each to spare."""
    names = [str(card) for card in fits(needed)]
    return f"fits cards of {', '.join(names)} GB" if names else f"too much for a card of {max(CARDS)} GB"


def _count(values: int) -> str:
    return f"{values / 1e9:.2f} billion" if values >= 1e9 else f"{values / 1e6:.1f} million"


def _parameters(transformer: Weights, text: Weights | None, vae: Weights | None) -> str:
    counts = {"transformer": transformer, "text encoders": text, "autoencoder": vae}
    return ", ".join(
        f"{name} not known without its files" if weights is None else f"{name} {_count(weights.values)}"
        for name, weights in counts.items()
    )
