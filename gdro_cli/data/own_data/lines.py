"""The keys of one line of a table: which form it has, and its prompt, images and scores.

Scored groups      prompt, images, scores        scores: a list, or lists by name
                   prompt, image, score          one image; or scores: numbers by name
Rankings           prompt, images, ranks         1 is best, equal ranks are ties
                   prompt, image_path, rank      HPDv2's test.json
Pairs              prompt, chosen, rejected
                   prompt, file_path, human_preference      HPDv2's train.json
                   caption, jpg_0, jpg_1, label_0, label_1  Pick-a-Pic
                   schema_version, input, supervision       Flow-Factory's offline records
Demonstrations     prompt, image                 or images

In every form: ``caption`` or ``text`` for ``prompt``, ``file_name`` for ``image`` (HF's imagefolder), and the optional
``target``, ``metadata`` and ``weight``. For a model that edits images each line also has ``source``, the image that was
edited; where the form has no ``image`` of its own, that is another name for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from gdro_cli.config.sections import NAME
from gdro_cli.data.own_data.jsonl import finite_number
from gdro_cli.data.promptfile import check_prompt, refuse_several
from gdro_cli.data.records import PromptRecord
from gdro_cli.suggest import similar

SCORED, RANKINGS, PAIRS, DEMONSTRATIONS = "scored groups", "rankings", "pairs", "demonstrations"
SCORE, RANK_SCORE, PREFERENCE = "score", "rank_score", "preference"
"""Names of scores that the data does not name."""

Scored = list[tuple[Any, dict[str, float]]]
"""Images of a line, as the table has them, with their scores."""

_PROMPT = ("prompt", "caption", "text")
_IMAGE = ("image", "file_name")
_LISTED = ("images", "image_path", "file_path")
_OPTIONAL = ("target", "metadata", "weight")
_SOURCE = ("source", "image")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that make a form, and how they are read."""

    form: str
    names: tuple[tuple[str, ...], ...]
    """Beside the prompt; each entry has the names of one key."""
    read: Callable[..., Scored]
    """Takes the values in the order of ``names``. Raises ValueError."""
    one_image: bool = False
    """Whether lines with the same prompt make one group."""
    unused: tuple[str, ...] = ()
    """Other keys of a public data set."""

    @property
    def text(self) -> str:
        """The form with its keys, for messages."""
        return f"{self.form} ({', '.join([_PROMPT[0], *(names[0] for names in self.names)])})"

    def used(self, line: Mapping[str, Any]) -> list[str]:
        """The keys of a line that this form reads, the prompt's first; empty if the line has another form."""
        found = [next((key for key in names if key in line), "") for names in (_PROMPT, *self.names)]
        return found if all(found) else []


@dataclass(frozen=True, slots=True)
class Line:
    """What one line says."""

    record: PromptRecord
    images: Scored
    weight: float


def find_keys(line: Mapping[str, Any]) -> Keys:
    """The form of a line. Raises ValueError with the line's keys and the forms that exist."""
    for keys in KEYS:
        if keys.used(line):
            return keys
    guesses = "".join(guess(key, line) for key in line if key not in READ)
    forms = f"the forms are {', '.join(keys.text for keys in KEYS)}; see docs/own-data.md"
    raise ValueError(f"its keys ({', '.join(line)}) fit no form{guesses or ';'} {forms}")


def source_key(line: Mapping[str, Any], keys: Keys) -> str:
    """The key of the image that was edited. Raises ValueError if the line has none, or several."""
    key = next((key for key in _SOURCE if line.get(key) is not None and key not in keys.used(line)), None)
    if key is None:
        raise ValueError("it has no `source`, the image that was edited, and the model edits images; add it")
    refuse_several(line[key], key)
    return key


def ignored_keys(line: Mapping[str, Any], keys: Keys, *, edits: bool = False) -> list[str]:
    """The keys of a line that nothing reads; ``edits``: whether the images are edited ones."""
    read = {*keys.used(line), *_OPTIONAL, *keys.unused, *(_SOURCE if edits else ())}
    return [key for key in line if key not in read]


def guess(key: str, line: Mapping[str, Any]) -> str:
    """``; did you mean `x`?`` for an ignored key, or an empty text; a source has another reason."""
    if key == _SOURCE[0]:
        return ", which only a model that edits images reads"
    return similar(key, [name for name in _KNOWN if name not in line])


def read_line(line: Mapping[str, Any], keys: Keys) -> Line:
    """Read a line of a known form. Raises ValueError, which says what is wrong with it."""
    prompt_key, *others = keys.used(line)
    prompt, target, metadata = line[prompt_key], line.get("target"), line.get("metadata")
    if not isinstance(prompt, str):
        raise ValueError(f"{prompt_key} must be a text, not {_kind(prompt)}")
    if not isinstance(target, str | None):
        raise ValueError(f"target must be a text, not {_kind(target)}")
    if not isinstance(metadata, dict | None):
        raise ValueError(f"metadata must be an object, not {_kind(metadata)}")
    prompt = prompt.strip()
    check_prompt(prompt, target)
    weight = 1.0 if line.get("weight") is None else finite_number(line["weight"], "weight")
    if weight <= 0:
        raise ValueError(f"weight must be above 0, not {weight:g}")
    images = keys.read(*((key, line[key]) for key in others))
    try:
        record = PromptRecord.of(prompt, target=target or None, metadata=metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must have only values that JSON has ({error})") from error
    return Line(record, images, weight)


# -- Flow-Factory -----------------------------------------------------------------------------------------------------


def without_nesting(line: Mapping[str, Any], *, edits: bool = False) -> Mapping[str, Any]:
    """A record of Flow-Factory (``"schema_version": 2``) with the keys of pairs or demonstrations; else the line.

    Its metadata is provenance and is left out. If the model ``edits``, the input's image is the ``source``.

    Raises:
        ValueError: the record has another version, images that the model does not take, or other media than one image.
    """
    if not {"schema_version", "input", "supervision"} <= line.keys():
        return line
    if line["schema_version"] != 2:
        raise ValueError(f"its schema_version is {shown(line['schema_version'])}; 2 is the one that can be read")
    given, supervision = _object(line["input"], "input"), _object(line["supervision"], "supervision")
    if (given.get("media") and not edits) or set(given) - {"prompt", "media"}:
        raise ValueError("its input has more than a prompt; only text-to-image data can be used")
    source = {"source": _only_image(given, "input")} if given.get("media") else {}
    rest = {key: value for key, value in line.items() if key not in {"schema_version", "input", "supervision"}}
    rest.pop("metadata", None)
    parts = {"preference": {"chosen": "chosen", "rejected": "rejected"}, "demonstration": {"target": "image"}}
    kind = supervision.get("type")
    if not isinstance(kind, str) or kind not in parts:
        raise ValueError(f"its supervision.type is {shown(kind)}; it must be preference or demonstration")
    outputs = {ours: (f"supervision.{theirs}", supervision.get(theirs)) for theirs, ours in parts[kind].items()}
    images = {ours: _only_image(value, name) for ours, (name, value) in outputs.items()}
    return {"prompt": given.get("prompt"), **images, **source, **rest}


def _only_image(value: Any, name: str) -> Any:
    media = _object(value, name).get("media")
    if not isinstance(media, list) or len(media) != 1 or _object(media[0], "media[0]").get("type") != "image":
        raise ValueError(f"{name}.media must have one entry, of the type image")
    return media[0].get("path")


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {_kind(value)}")
    return value


# -- scores -----------------------------------------------------------------------------------------------------------

Field = tuple[str, Any]
"""A key of the line with its value."""


def _scored_group(images: Field, scores: Field) -> Scored:
    listed = _several(images)
    columns = scores[1] if isinstance(scores[1], dict) else {SCORE: scores[1]}
    if not columns:
        raise ValueError(f"{scores[0]} is empty")
    result: Scored = [(image, {}) for image in listed]
    for name, values in columns.items():
        _check_name(name)
        label = scores[0] if columns is not scores[1] else f"{scores[0]}.{name}"
        if values is None:
            continue
        for (_, found), value in zip(result, _as_many(listed, images[0], (label, values)), strict=True):
            if value is not None:
                found[name] = finite_number(value, label)
    return result


def _scored_image(image: Field, score: Field) -> Scored:
    named = score[1] if isinstance(score[1], dict) else {SCORE: score[1]}
    for name in named:
        _check_name(name)
    found = {name: finite_number(value, name) for name, value in named.items() if value is not None}
    return [(_single(image), found)]


def _ranking(images: Field, ranks: Field) -> Scored:
    """Scores (K - rank) / (K - 1), where ties share the mean of their places: 1 is best, 0 last, 0.5 the mean.

    HPDv2's ``rank`` may count from 0.
    """
    listed = _several(images)
    values = [finite_number(value, ranks[0]) for value in _as_many(listed, images[0], ranks)]
    most = len(listed)
    if most < 2:
        raise ValueError("a ranking needs two images or more")
    starts = {0, 1} if ranks[0] == "rank" else {1}
    start = min(values)
    if start not in starts or any(value != int(value) or value - start >= most for value in values):
        raise ValueError(f"{ranks[0]} must be whole numbers from 1 (the best) to {most}, not {shown(ranks[1])}")
    places = [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]
    return [(image, {RANK_SCORE: 1 - place / (most - 1)}) for image, place in zip(listed, places, strict=True)]


def _pair(chosen: Field, rejected: Field) -> Scored:
    return [(_single(chosen), {PREFERENCE: 1.0}), (_single(rejected), {PREFERENCE: 0.0})]


def _labelled_pair(image_0: Field, image_1: Field, label_0: Field, label_1: Field) -> Scored:
    labels = [finite_number(value, name) for name, value in (label_0, label_1)]
    if sorted(labels) not in ([0, 1], [0.5, 0.5]):
        raise ValueError(f"{label_0[0]} and {label_1[0]} must be 1 and 0, 0 and 1, or 0.5 and 0.5, not {labels}")
    return [(_single(image), {PREFERENCE: label}) for image, label in zip((image_0, image_1), labels, strict=True)]


def _preferred(images: Field, preference: Field) -> Scored:
    listed = _several(images)
    labels = _as_many(listed, images[0], preference)
    if len(listed) != 2:
        raise ValueError(f"{images[0]} must have two images, not {len(listed)}")
    names = [f"{preference[0]}[{index}]" for index in range(2)]
    pair = [(images[0], image) for image in listed]
    return _labelled_pair(*pair, *zip(names, labels, strict=True))


def _demonstration(image: Field) -> Scored:
    return [(_single(image), {})]


def _demonstrations(images: Field) -> Scored:
    return [(image, {}) for image in _several(images)]


def _single(image: Field) -> Any:
    name, value = image
    if value is None or isinstance(value, list | dict):
        raise ValueError(f"{name} must be one image, not {_kind(value)}")
    return value


def _several(images: Field) -> list[Any]:
    name, value = images
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of images, not {'an empty one' if value == [] else _kind(value)}")
    return value


def _as_many(images: Sequence[Any], name: str, values: Field) -> list[Any]:
    if not isinstance(values[1], list):
        raise ValueError(f"{values[0]} must be a list with a number for each image, not {_kind(values[1])}")
    if len(values[1]) != len(images):
        raise ValueError(f"{name} has {len(images)} entries and {values[0]} has {len(values[1])}; they must be as many")
    return values[1]


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"{name!r} is not a name for a score; use letters, digits, dots, dashes and underscores")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


HAS_LABEL = "has_label"
"""Pick-a-Pic's column that is false where nobody has chosen."""

_PICK_A_PIC = (
    *(HAS_LABEL, "are_different", "best_image_uid", "created_at", "num_example_per_prompt", "ranking_id", "user_id"),
    *("image_0_uid", "image_0_url", "image_1_uid", "image_1_url", "model_0", "model_1", "__index_level_0__"),
)

KEYS = (
    Keys(SCORED, (("images",), ("scores", "score")), _scored_group),
    Keys(SCORED, (_IMAGE, ("score", "scores")), _scored_image, one_image=True),
    Keys(RANKINGS, (_LISTED, ("ranks", "rank")), _ranking, unused=("raw_annotations", "raw_annotation")),
    Keys(PAIRS, (("chosen",), ("rejected",)), _pair),
    Keys(PAIRS, (("jpg_0",), ("jpg_1",), ("label_0",), ("label_1",)), _labelled_pair, unused=_PICK_A_PIC),
    Keys(PAIRS, (("file_path", *_LISTED), ("human_preference",)), _preferred, unused=("user_hash",)),
    Keys(DEMONSTRATIONS, (_IMAGE,), _demonstration, one_image=True),
    Keys(DEMONSTRATIONS, (("images",),), _demonstrations),
)
"""In the order in which they are tried."""

_KNOWN = [*_PROMPT, *_OPTIONAL, *dict.fromkeys(name for keys in KEYS for names in keys.names for name in names)]
READ = frozenset([*_KNOWN, *_SOURCE, HAS_LABEL])
"""Keys whose values are looked at."""
