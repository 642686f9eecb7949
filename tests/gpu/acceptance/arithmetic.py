"""What it ran on, and whether the device computes what the CPU does."""

from __future__ import annotations

from itertools import product

import torch

from gdro_cli.runtime.environment import environment
from tests.gpu.acceptance.bench import Bench, end
from tests.gpu.acceptance.rows import ENVIRONMENT, Section
from tests.gpu.passes import difference, engine_pass, flat

DATA_SHEET = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bfloat16 products of a card, 1e12 operations per second."""
LOUDNESS = 0.3
"""With their own weights the tiny models amplify rounding: the CPU's bfloat16 has a cosine of 0.74 with its float32."""


def machine(bench: Bench, section: Section) -> None:
    """Versions, ``gdro env`` and the speed of one large product."""
    section.check(ENVIRONMENT, True, environment(), "for the report")
    section.exit_code("gdro env", end(bench.gdro("env")))
    side = 64 if bench.tiny else 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    cost = bench.measure(lambda: [a @ b for _ in range(20)])
    speed, name = cost.rate(20 * 2 * side**3 / 1e12), torch.cuda.get_device_name(0)
    sheet = next((value for card, value in DATA_SHEET.items() if card in name), None)
    if sheet is None:
        section.figure(f"bfloat16 product of {side} cubed, TFLOP/s", speed)
    else:
        section.at_least(f"bfloat16 product of {side} cubed, TFLOP/s", speed, 0.6 * sheet)


def tiny_models(bench: Bench, section: Section) -> None:
    """Sampling and the gradient of tiny random models in float32 and bfloat16, against the CPU in float32."""
    for family in ("flux-dev", "sd3"):
        folder = bench.tiny_folder(family)
        latents, gradients = engine_pass(folder, "cpu", loudness=LOUDNESS)
        wanted = flat(gradients)
        for one_pass, checkpointing in product((False, True), repeat=2):
            found, found_gradients = engine_pass(
                folder, "cuda", one_pass=one_pass, checkpointing=checkpointing, loudness=LOUDNESS
            )
            passes = f"{'one pass' if one_pass else 'two passes'}, {'' if checkpointing else 'not '}checkpointed"
            error = difference(flat(found_gradients), wanted)
            section.at_most(f"{family}, float32 gradient, {passes}: difference from the CPU", error, 1e-3)
        section.at_most(f"{family}, float32 latents: difference from the CPU", difference(found, latents), 1e-4)
        _, rounded = engine_pass(folder, "cuda", "bfloat16", loudness=LOUDNESS)
        cosine = torch.nn.functional.cosine_similarity(flat(rounded), wanted, dim=0)
        section.at_least(f"{family}, bfloat16 gradient: cosine with float32", float(cosine), 0.98)
