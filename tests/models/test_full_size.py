"""Published configurations at full size, without their weights: built on the meta device, which has shapes only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from gdro_cli.models.adapters import attach_lora
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model

PUBLISHED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published.json").read_text())


def open_on_meta(name: str, folder: Path) -> FlowModel:
    """The family on a folder with the published configurations alone; the transformer has shapes and no numbers."""
    known = PUBLISHED[name]
    for part in ("transformer", "vae"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(known[part]))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": known["pipeline"]}))
    model = load_flow_model(folder, dtype="bfloat16", device="meta")
    with torch.device("meta"):
        transformer = getattr(diffusers, known["class"])(**known["transformer"])
    model.transformer = transformer.to(torch.bfloat16).requires_grad_(False)
    return model


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_model_at_full_size(name: str, tmp_path: Path) -> None:
    """Size on disk as published, one velocity at 512 and 1024 pixels, and an adapter of the expected size.

    Gigabytes are those of the published weights at two bytes each (position tables included), to the digits given. The
    adapter has rank x (inputs + outputs) parameters per layer; with rank 32, in thousands of inputs and outputs:

    - FLUX.1-dev: 19 x (8 x 6.144 + 4 x 15.360) + 38 x 3 x 6.144; SD3.5: (24 x 8 - 1) x 3.072 and (38 x 8 - 1) x 4.864,
      for the last block has no text output; Qwen-Image: 60 x 4 x 6.144; Z-Image: 34 x 4 x 7.680;
      FLUX.2-klein-4B: 5 x 4 x 6.144 + 20 x (30.720 + 15.360).
    """
    known = PUBLISHED[name]
    model = open_on_meta(name, tmp_path)
    size = 2 * sum(tensor.numel() for tensor in model.transformer.state_dict().values())
    digits = len(known["gigabytes"].split(".")[1])
    assert f"{size / 1e9:.{digits}f}" == known["gigabytes"]

    text = {key: torch.empty(1, *shape, device="meta") for key, shape in known["text"].items()}
    with torch.no_grad():
        for side in (512, 1024):
            pixels = {"height": side, "width": side}
            latents = torch.empty(1, *model.latent_shape(**pixels), device="meta")
            assert latents.numel() == side * side // 64 * known["channels"]
            sigma = torch.empty(1, device="meta")
            velocity = model.velocity(latents, sigma, text, guidance=3.5, **pixels)
            assert velocity.shape == latents.shape and velocity.dtype == torch.bfloat16

    parameters = attach_lora(model, rank=32, alpha=32)
    assert sum(parameter.numel() for parameter in parameters) == known["lora_32"]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
