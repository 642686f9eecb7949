"""The layers' names in the models' original code, which ComfyUI and kohya's tools use, and diffusers' names for them.

An original layer may be several of diffusers' stacked by rows (q, k and v). As facts, the names come from the models'
published weights; diffusers' and ComfyUI's loaders have the same pairs (docs/export.md).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gdro_cli.errors import UserError

Pair = tuple[Tensor, Tensor]
"""(A [r, in], B [out, r])."""

_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_OUTSIDE = ("", "")
_FLUX_ATTENTION = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED_QKV,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_FLUX_DOUBLE = {
    **_FLUX_ATTENTION,
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_FLUX_SINGLE = {"linear1": f"{_QKV} proj_mlp", "linear2": "proj_out"}
_APPROXIMATOR = "distilled_guidance_layer"
"""Chroma's layer that computes all modulations."""
_Z_IMAGE_BLOCK = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0",
)  # fmt: skip
_Z_IMAGE_BLOCKS = ("layers", "noise_refiner", "context_refiner")
_QWEN_BLOCK = (
    *_QKV.split(), *_ADDED_QKV.split(), "attn.to_out.0", "attn.to_add_out", "img_mod.1", "txt_mod.1",
    "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
)  # fmt: skip
_HIDREAM_ATTENTION = tuple(f"block.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out"))
_HIDREAM_EXPERTS = ("ff_i.shared_experts", *(f"ff_i.experts.{number}" for number in range(4)))
_HIDREAM_SINGLE = (
    "block.adaLN_modulation.1", *_HIDREAM_ATTENTION,
    *(f"block.{expert}.w{number}" for expert in _HIDREAM_EXPERTS for number in (1, 2, 3)),
)  # fmt: skip
_HIDREAM_DOUBLE = (
    *_HIDREAM_SINGLE, *(f"{name}_t" for name in _HIDREAM_ATTENTION), *(f"block.ff_t.w{number}" for number in (1, 2, 3))
)  # fmt: skip


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


_TABLES: dict[str, dict[tuple[str, str], dict[str, str]]] = {
    "flux": {
        ("double_blocks", "transformer_blocks"): {
            **_FLUX_DOUBLE,
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
        ("single_blocks", "single_transformer_blocks"): {**_FLUX_SINGLE, "modulation.lin": "norm.linear"},
        _OUTSIDE: {
            **_FLUX_ENDS,
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        },
    },
    "chroma": {
        ("double_blocks", "transformer_blocks"): _FLUX_DOUBLE,
        ("single_blocks", "single_transformer_blocks"): _FLUX_SINGLE,
        (f"{_APPROXIMATOR}.layers", f"{_APPROXIMATOR}.layers"): {"in_layer": "linear_1", "out_layer": "linear_2"},
        _OUTSIDE: {
            **{name: own for name, own in _FLUX_ENDS.items() if own != "norm_out.linear"},
            **_same((f"{_APPROXIMATOR}.in_proj", f"{_APPROXIMATOR}.out_proj")),
        },
    },
    "flux2-klein": {
        ("double_blocks", "transformer_blocks"): {
            **_FLUX_ATTENTION,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        ("single_blocks", "single_transformer_blocks"): {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
        _OUTSIDE: {
            **_FLUX_ENDS,
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
        },
    },
    "sd3": {
        ("joint_blocks", "transformer_blocks"): {
            "x_block.attn.qkv": _QKV,
            "x_block.attn2.qkv": _QKV.replace("attn.", "attn2."),
            "context_block.attn.qkv": _ADDED_QKV,
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.proj": "attn2.to_out.0",
            "context_block.attn.proj": "attn.to_add_out",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        },
        _OUTSIDE: {
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
    },
    "qwen-image": {
        ("transformer_blocks", "transformer_blocks"): _same(_QWEN_BLOCK),
        _OUTSIDE: _same(
            (
                "img_in", "txt_in", "norm_out.linear", "proj_out",
                "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
            )
        ),
    },
    "z-image": {
        **{
            (block, block): {
                "attention.qkv": "attention.to_q attention.to_k attention.to_v",
                "attention.out": "attention.to_out.0",
                **_same(_Z_IMAGE_BLOCK),  # last, so these are written: musubi-tuner has diffusers' names
            }
            for block in _Z_IMAGE_BLOCKS
        },
        _OUTSIDE: {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            **_same(("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")),
        },
    },
    "hidream": {
        ("double_stream_blocks", "double_stream_blocks"): _same(_HIDREAM_DOUBLE),
        ("single_stream_blocks", "single_stream_blocks"): _same(_HIDREAM_SINGLE),
        ("caption_projection", "caption_projection"): _same(("linear",)),
        _OUTSIDE: _same(
            (
                "x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1",
                "t_embedder.timestep_embedder.linear_1", "t_embedder.timestep_embedder.linear_2",
                "p_embedder.pooled_embedder.linear_1", "p_embedder.pooled_embedder.linear_2",
            )
        ),
    },
}  # fmt: skip
_TABLES["flux2"] = _TABLES["flux2-klein"]
_TABLES["flux-kontext"] = _TABLES["flux"]
_TABLES["qwen-image-edit"] = _TABLES["qwen-image-edit-plus"] = _TABLES["qwen-image"]
_TAKE_ALL = "export with --format diffusers or peft, which take every layer"
_BLOCKS = sorted({name for table in _TABLES.values() for pair in table for name in pair if name})
_IN_BLOCK = re.compile(rf"({'|'.join(_BLOCKS)})[._](\d+)[._](.+)", re.ASCII)
_HIDREAM_FLAT = ("double_stream_blocks_", "single_stream_blocks_")
_FLUX2_RATIOS = {"linear1": 9, "linear2": 4, "mlp_0": 6, "mlp_2": 3}
"""Wide side over narrow side of FLUX.2's matrices; in FLUX.1, whose layers have the same names: 7, 5, 4 and 4."""


def recognise(layers: Mapping[str, Pair]) -> str | None:
    """The family that a file's layers belong to, from their names and shapes; None if all names can be diffusers'.

    FLUX.1, Chroma and FLUX.2 share names. Layers of their attention alone do not tell which it is, and need not: those
    have the same names in diffusers.
    """
    starts = {found[1] for found in map(_IN_BLOCK.match, layers) if found}
    if starts & {"double_blocks", "single_blocks"}:
        if any(name.startswith(_APPROXIMATOR) for name in layers):
            return "chroma"
        return "flux2-klein" if any(_is_flux2(*item) for item in layers.items()) else "flux"
    if "joint_blocks" in starts:
        return "sd3"
    if starts & set(_Z_IMAGE_BLOCKS):
        return "z-image"
    if any(name.startswith(_HIDREAM_FLAT) for name in layers):
        return "hidream"
    return "qwen-image" if any(name.startswith("transformer_blocks_") for name in layers) else None


def _is_flux2(name: str, pair: Pair) -> bool:
    narrow, wide = sorted((pair[0].shape[1], len(pair[1])))
    flat = name.replace(".", "_")
    return "stream_modulation" in flat or any(
        flat.endswith(end) and wide == ratio * narrow for end, ratio in _FLUX2_RATIOS.items()
    )


def from_original(name: str, pair: Pair, family: str) -> dict[str, Pair] | None:
    """Split an original layer, its name with dots or with underscores, into diffusers' layers.

    Returns:
        diffusers' name -> (A, B) without the parts and ranks that nothing adapts; None if the name is unknown.

    Raises:
        ValueError: the matrix has not the rows of its parts.
    """
    pattern, block = _pattern(name)
    original, parts = _flat_names(family).get(pattern.replace(".", "_"), ("", ()))
    if not parts:
        return None
    names, (down, up) = [part.format(block) for part in parts], pair
    if len(names) == 1:
        return {names[0]: (down, _reordered(original, names[0], pair))}
    rows = _rows(names, down)
    if len(up) != sum(rows):
        raise ValueError(f"{name} has {len(up)} rows")
    split = dict(zip(names, up.split(rows), strict=True))
    used = {part: own.any(0) for part, own in split.items() if own.any()}
    if not used:
        return {part: (down.clone(), own) for part, own in split.items()}  # files hold no tensor twice
    return {part: (down[columns], split[part][:, columns]) for part, columns in used.items()}


def to_original(pairs: Mapping[str, Pair], family: str, *, blocks_only: bool = False) -> dict[str, Pair]:
    """Join diffusers' layers into original ones; where a part of one is not adapted, its rows of B are zero.

    Args:
        pairs: diffusers' name -> (A, B), with s = 1.
        family: the model's family.
        blocks_only: refuse layers outside the repeated blocks.

    Returns:
        original name, with dots -> (A, B); the rank of a joined layer is the sum of its parts' ranks.

    Raises:
        UserError: a layer has no original name, is outside the blocks, or has not the shape of the published models'.
    """
    known = {part: (original, parts) for original, parts in _names(family).items() for part in parts}
    joined: dict[str, Pair] = {}
    unknown: list[str] = []
    for layer in pairs:
        pattern, block = _pattern(layer)
        original, parts = known.get(pattern, ("", ()))
        if not parts or (blocks_only and not block):
            unknown.append(layer)
        elif original.format(block) not in joined:
            joined[original.format(block)] = _joined(original, [part.format(block) for part in parts], pairs)
    if unknown:
        raise UserError(
            f"the format has no place for {len(unknown)} of the adapter's {len(pairs)} layers, such as {unknown[0]}:"
            f" {_TAKE_ALL}"
        )
    return joined


def _joined(original: str, parts: list[str], pairs: Mapping[str, Pair]) -> Pair:
    """Stack parts: A one below the other, B along the diagonal."""
    if len(parts) == 1:
        return pairs[parts[0]][0], _reordered(original, parts[0], pairs[parts[0]])
    downs = [pairs[part][0] for part in parts if part in pairs]
    rows = _rows(parts, downs[0])
    unused = [(None, torch.zeros(height, 0)) for height in rows]
    ups = [pairs.get(part, none)[1] for part, none in zip(parts, unused, strict=True)]
    if [len(up) for up in ups] != rows:
        raise UserError(f"the format joins {', '.join(parts)}, which have other shapes in this model: {_TAKE_ALL}")
    return torch.cat(downs), torch.block_diag(*ups)


def _rows(parts: Iterable[str], down: Tensor) -> list[int]:
    """Rows of each part of a joined layer: q, k and v are square, FLUX.1's proj_mlp is 4 times as high."""
    return [(4 if part.endswith("proj_mlp") else 1) * down.shape[1] for part in parts]


def _reordered(original: str, own: str, pair: Pair) -> Tensor:
    """B; its halves swapped for a last norm that diffusers renames: shift and scale become scale and shift."""
    down, up = pair
    swapped = original.endswith("adaLN_modulation.1") and own != original and len(up) == 2 * down.shape[1]
    return up.roll(down.shape[1], 0) if swapped else up


def _pattern(name: str) -> tuple[str, str]:
    """A layer's name with {} for its block's number, and the number."""
    found = _IN_BLOCK.fullmatch(name)
    return (name, "") if found is None else (f"{found[1]}.{{}}.{found[3]}", found[2])


@functools.cache
def _names(family: str) -> dict[str, tuple[str, ...]]:
    """Original name -> diffusers' names, with {} for the block's number."""
    return {
        _in_block(original, name): tuple(_in_block(own, part) for part in parts.split())
        for (original, own), layers in _TABLES.get(family, {}).items()
        for name, parts in layers.items()
    }


@functools.cache
def _flat_names(family: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Original name with underscores for dots -> the name with dots, and diffusers' names."""
    return {original.replace(".", "_"): (original, parts) for original, parts in _names(family).items()}


def _in_block(block: str, name: str) -> str:
    return f"{block}.{{}}.{name}" if block else name
