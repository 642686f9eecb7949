"""What a reward server and its client say to each other; docs/reward-servers.md is the description for others.

``GET`` on the server's address returns ``Info``. ``POST`` of ``{"prompts", "targets", "metadata", "images"}``, four
lists of one length, returns ``{"version", "scores"}``: for each image ``{"value", "details"}`` or ``{"error"}``. If
prompts edit images, a fifth list, ``sources``, has these images.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gdro_cli.rewards.address import without_key
from gdro_cli.rewards.base import PromptLike, Score, one_line

if TYPE_CHECKING:
    from PIL import Image

PROTOCOL = 1
"""The number of this protocol. A server may state it, and a client refuses another one."""
MOST_IMAGES = 256
"""Images of one request."""
LARGEST_REQUEST = 2**28
"""Bytes of a request's body that a server reads."""
LARGEST_ANSWER = 2**23
"""Bytes of an answer that a client reads."""
_SHOWN = 60


class BadAnswerError(ValueError):
    """An answer that does not follow the protocol; the message completes "the reward server's answer ..."."""


@dataclass(frozen=True, slots=True)
class Info:
    """What a server says about its reward."""

    version: Mapping[str, Any]
    """Equal versions give equal scores; it names the score table."""
    needs: frozenset[str] = frozenset()
    """What a prompt must carry: ``target``, ``image``, keys of its metadata, or nothing."""
    scale: tuple[float, float] | None = None
    """The range of the values, two finite numbers, if the server states it."""


@dataclass(frozen=True, slots=True)
class RemotePrompt:
    """A prompt as a request carries it."""

    prompt: str
    target: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: Image.Image | None = None
    """The image that the prompt edits."""


def request_body(
    images: Sequence[str], prompts: Sequence[PromptLike], sources: Sequence[str | None] | None = None
) -> bytes:
    """The body of a request; ``images`` and the prompts' ``sources`` are PNG in base64."""
    content: dict[str, Any] = {
        "prompts": [prompt.prompt for prompt in prompts],
        "targets": [prompt.target for prompt in prompts],
        "metadata": [dict(prompt.metadata) for prompt in prompts],
        "images": list(images),
    }
    if sources is not None and any(source is not None for source in sources):
        content["sources"] = list(sources)
    return json.dumps(content).encode("ascii")


def read_request(body: bytes) -> tuple[list[str], list[RemotePrompt], list[str | None]]:
    """The images, prompts and source images of a request, which are still texts.

    Raises ``ValueError`` with a sentence for the sender.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the body is not JSON") from error
    keys = ("images", "prompts", "targets", "metadata")
    lists: list[Any] = [content.get(key) if isinstance(content, dict) else None for key in keys]
    if not all(isinstance(value, list) and len(value) == len(lists[0]) for value in lists):
        raise ValueError("the body must have the keys prompts, targets, metadata and images, lists of one length")
    images, prompts, targets, metadata = lists
    if len(images) > MOST_IMAGES:
        raise ValueError(f"a request has at most {MOST_IMAGES} images, not {len(images)}")
    types = ((images, str), (prompts, str), (targets, str | None), (metadata, dict))
    if not all(isinstance(value, kind) for values, kind in types for value in values):
        raise ValueError("images and prompts are texts, targets texts or null, and metadata objects")
    sources = content.get("sources", [None] * len(images))
    if not isinstance(sources, list) or len(sources) != len(images) or not all(_is(s, str | None) for s in sources):
        raise ValueError("sources must be a list of texts or nulls, one for each image")
    return images, [RemotePrompt(*parts) for parts in zip(prompts, targets, metadata, strict=True)], sources


def answer_content(version: Mapping[str, Any], scores: Sequence[Score]) -> dict[str, Any]:
    """The answer to a request."""
    rows = [
        {"error": score.reason} if score.value is None else {"value": score.value, "details": dict(score.details)}
        for score in scores
    ]
    return {"version": dict(version), "scores": rows}


def read_info(body: bytes, *, key: str | None = None) -> Info:
    """The answer to ``GET``, without the key that it may repeat. Raises ``BadAnswerError``."""
    content = _json(body, key)
    if content.get("protocol", PROTOCOL) != PROTOCOL:
        raise BadAnswerError(f"has the protocol {_short(content['protocol'])}, and this gdro_cli speaks {PROTOCOL}")
    version, needs, scale = content.get("version"), content.get("needs", []), content.get("scale")
    if not isinstance(version, dict) or not version:
        raise BadAnswerError("has no object `version`")
    if not (isinstance(needs, list) and all(isinstance(key, str) for key in needs)):
        raise BadAnswerError("has `needs` that are not a list of texts")
    if scale is None:
        return Info(version, frozenset(needs))
    return Info(version, frozenset(needs), _scale(scale))


def _scale(scale: Any) -> tuple[float, float]:
    if isinstance(scale, list) and len(scale) == 2 and all(_is(end, int | float) for end in scale):
        with contextlib.suppress(OverflowError):
            low, high = map(float, scale)
            if math.isfinite(low) and math.isfinite(high) and low < high:
                return low, high
    raise BadAnswerError("has a `scale` that is not a list of two finite numbers, the lower one first")


def read_answer(body: bytes, *, count: int, key: str | None = None) -> tuple[Any, list[Score]]:
    """The version in an answer and its ``count`` scores; a wrong one is missing with a reason.

    The key, which an answer may repeat, is removed from every text.

    Raises ``BadAnswerError`` if the whole answer is unusable.
    """
    content = _json(body, key)
    rows = content.get("scores")
    if not isinstance(rows, list):
        raise BadAnswerError("has no list `scores`")
    if len(rows) != count:
        raise BadAnswerError(f"has {len(rows)} scores for {count} images")
    return content.get("version"), [_score(row) for row in rows]


def _score(row: Any) -> Score:
    if not isinstance(row, dict):
        return Score(None, f"the reward server gave {_short(row)} instead of an object with a `value` or an `error`")
    if "error" in row:
        return Score(None, f"the reward server failed on this image: {_short(row['error'])}")
    value, details = row.get("value"), row.get("details", {})
    if not _is(value, int | float):
        return Score(None, f"the reward server gave the value {_short(value)}, which is not a number")
    if not isinstance(details, dict):
        return Score(None, f"the reward server gave the details {_short(details)}, which are not an object")
    try:
        return Score(value, None, details)
    except (ValueError, OverflowError) as error:
        return Score(None, f"the reward server gave a wrong score ({one_line(error)})")


def _json(body: bytes, key: str | None) -> dict[str, Any]:
    try:
        content = _cleaned(json.loads(body), key)
    except (ValueError, RecursionError) as error:
        raise BadAnswerError("is not JSON") from error
    if not isinstance(content, dict):
        raise BadAnswerError("is not a JSON object")
    return content


def _cleaned(value: Any, key: str | None) -> Any:
    """JSON values without the key in their texts."""
    if isinstance(value, str):
        return without_key(value, key)
    if isinstance(value, list):
        return [_cleaned(inner, key) for inner in value]
    if isinstance(value, dict):
        return {without_key(name, key): _cleaned(inner, key) for name, inner in value.items()}
    return value


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split())[:_SHOWN] or "an empty text"
