"""Rules between the keys of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gdro_cli.config.base import StrictModel
from gdro_cli.config.keys import field_doc, field_names, foreign_keys, full_key
from gdro_cli.config.methods import GroupMethod, OnlineMethod
from gdro_cli.config.prompt_sets import BUILTIN_SETS, GENEVAL_TAGS, OPTIONS, fitting_sets
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rewards import MIX, reward_needs
from gdro_cli.config.sections import SOURCE_KINDS, PromptSource, RewardSection
from gdro_cli.suggest import similar, similar_key

_DOTTED = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
_ADDRESSES = {
    "judge.base_url": "judge.api_key_env",
    "reward.http.url": "reward.http.api_key_env",
    "reward.vlm.base_url": "reward.vlm.api_key_env",
}
"""Keys with the address of a server, and those that name the variable with its API key."""
_USER = re.compile(r"://[^/?#\s]*@")
"""The end of a user name or password in an address."""
_VARIABLE = re.compile(r"(?!hf_)[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe."""

    path: str
    """The key."""
    message: str
    """The rest of the sentence. It names in full the other keys that the problem depends on."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The key and those that the message names."""
        return self.path, *_DOTTED.findall(self.message)


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Every rule between keys that a recipe breaks. Each key by itself is valid."""
    for rule in (
        _model,
        _method,
        _prompts,
        _sizes,
        _train,
        _objectives,
        _geneval,
        _servers,
        _other_rewards,
        _judge,
        _ablation,
    ):
        yield from rule(recipe)


def _model(recipe: Recipe) -> Iterator[Problem]:
    for key in ("quantization", "offload") if recipe.model.sharding == "fsdp" else ():
        if _is_set(recipe.model, key):
            yield Problem(f"model.{key}", "cannot be combined with model.sharding 'fsdp': choose one of them")


def _method(recipe: Recipe) -> Iterator[Problem]:
    method = recipe.method
    yield from _online(recipe, method) if isinstance(method, OnlineMethod) else _stored(recipe, method)


def _online(recipe: Recipe, method: OnlineMethod) -> Iterator[Problem]:
    for path, doc in foreign_keys(method.name).items():
        section, key = path.split(".")
        if section != "method" and _is_set(getattr(recipe, section), key):
            advice = "remove it" if doc.instead is None else f"remove it and set {doc.instead}"
            yield Problem(path, f"has no meaning for method.name {method.name!r}: {advice}")
    if recipe.model.compile:
        yield Problem(
            "model.compile",
            f"cannot be combined with method.name {method.name!r}: compiled passes with and without gradient round"
            " differently, by more than method.clip_range; set it to false",
        )
    if recipe.prompts.train.imported is not None:
        message = (
            f"has no meaning for method.name {method.name!r}, which makes its images: name a `file` or a `builtin` set"
        )
        yield Problem("prompts.train.imported", message)
    images = method.prompts_per_round * method.group_size
    if method.updates_per_round > images:
        message = f"is more than the {images} images of a round (method.prompts_per_round * method.group_size)"
        yield Problem("method.updates_per_round", f"{method.updates_per_round} {message}")


def _stored(recipe: Recipe, method: GroupMethod) -> Iterator[Problem]:
    images, imported = recipe.sample.images_per_prompt, recipe.prompts.train.imported is not None
    if method.k > images and not imported:
        message = f"{method.k} is more than sample.images_per_prompt ({images}): lower k or sample more images"
        yield Problem("method.k", message)
    if method.sigma_min >= method.sigma_max:
        message = f"{method.sigma_min:g} must be below method.sigma_max ({method.sigma_max:g})"
        yield Problem("method.sigma_min", message)
    if method.sigma_by_round is not None:
        if len(method.sigma_by_round) != recipe.train.rounds:
            message = f"has levels for {len(method.sigma_by_round)} rounds, but train.rounds is {recipe.train.rounds}"
            yield Problem("method.sigma_by_round", message)
        for number, (lowest, highest) in enumerate(method.sigma_by_round):
            if lowest >= highest:
                message = f"the lowest level, {lowest:g}, must be below the highest, {highest:g}"
                yield Problem(f"method.sigma_by_round[{number}]", message)


def _prompts(recipe: Recipe) -> Iterator[Problem]:
    for split in ("train", "validation", "eval"):
        yield from source_problems(getattr(recipe.prompts, split), path=f"prompts.{split}", reward=recipe.reward)


def source_problems(source: PromptSource, *, path: str, reward: RewardSection | None = None) -> Iterator[Problem]:
    """Every rule that a prompt source breaks.

    Args:
        source: the prompt source.
        path: the dotted path of its section in messages.
        reward: the reward that a built-in set must fit. Default: any set will do.
    """
    kinds = [kind for kind in SOURCE_KINDS if getattr(source, kind, None) is not None]
    if source.skip_bad and len(kinds) == 1 and kinds != ["file"]:
        message = f"only applies to {SOURCE_KINDS['file']}, not to {SOURCE_KINDS[kinds[0]]}: remove it"
        yield Problem(f"{path}.skip_bad", message)
    if not kinds:
        yield Problem(path, "needs a `file` or a `builtin` set")
    elif len(kinds) > 1:
        yield Problem(path, f"names both {SOURCE_KINDS[kinds[0]]} and {SOURCE_KINDS[kinds[1]]}: keep one")
    elif source.builtin is not None:
        yield from _builtin(source, source.builtin, path=path, reward=reward)
    else:
        for key in ("seed", *OPTIONS, *(("count",) if kinds == ["imported"] else ())):
            if _is_set(source, key):
                applies = "does not apply" if key == "count" else f"only applies to {SOURCE_KINDS['builtin']}, not"
                yield Problem(f"{path}.{key}", f"{applies} to {SOURCE_KINDS[kinds[0]]}: remove it")


def _builtin(source: PromptSource, name: str, *, path: str, reward: RewardSection | None) -> Iterator[Problem]:
    needs = frozenset().union(*map(reward_needs, () if reward is None else reward.parts))
    sets = fitting_sets(needs)
    names = ", ".join(sets) or "none, name a `file`"
    facts = BUILTIN_SETS.get(name)
    if facts is None:
        message = f"{name!r} is not a built-in set (they are: {names}){similar(name, sets)}"
        yield Problem(f"{path}.builtin", message)
        return
    if name not in sets:
        lacking = " and ".join(sorted(needs - facts.carries))
        who = " and ".join(map(repr, () if reward is None else reward.parts))
        message = f"the prompts of {name!r} have no {lacking}, which reward.kind {who} needs (that have: {names})"
        yield Problem(f"{path}.builtin", message)
        return
    for key, owners in OPTIONS.items():
        if key not in facts.options and _is_set(source, key):
            yield Problem(f"{path}.{key}", f"only applies to {owners}, not to {name!r}: remove it")
    if "min_letters" in facts.options and source.min_letters > source.max_letters:
        message = f"{source.min_letters} is more than {path}.max_letters ({source.max_letters})"
        yield Problem(f"{path}.min_letters", message)
    if "tags" in facts.options:
        yield from _tags(source, path=path)


def _tags(source: PromptSource, *, path: str) -> Iterator[Problem]:
    for tag in source.tags or {}:
        if tag not in GENEVAL_TAGS:
            names = ", ".join(GENEVAL_TAGS)
            yield Problem(f"{path}.tags.{tag}", f"is not a tag (they are: {names}){similar(tag, GENEVAL_TAGS)}")
    if source.tags is not None and not any(source.tags.values()):
        yield Problem(f"{path}.tags", "gives no tag a weight above 0: give one, or remove it")


def _is_set(section: StrictModel, key: str) -> bool:
    """Whether a key has a value other than its default."""
    return bool(getattr(section, key) != type(section).model_fields[key].default)


def _sizes(recipe: Recipe) -> Iterator[Problem]:
    height, width = recipe.sample.height, recipe.sample.width
    if (height is None) != (width is None):
        missing = "sample.height" if height is None else "sample.width"
        yield Problem(missing, "is missing: set both height and width, or neither")


def _train(recipe: Recipe) -> Iterator[Problem]:
    train = recipe.train
    for key in ("warmup_steps", "rounds"):
        if getattr(train, key) > train.steps:
            yield Problem(f"train.{key}", f"{getattr(train, key)} is more than train.steps ({train.steps})")
    stored = {"prompts.train.imported": recipe.prompts.train.imported, "train.scores": train.scores}
    for key, name in stored.items():
        if name is not None and train.rounds > 1:
            yield Problem(key, "cannot be combined with train.rounds above 1, which samples and scores new images")
    if train.stop_on_collapse and not train.eval_every:
        yield Problem("train.stop_on_collapse", "needs evaluation points: set train.eval_every above 0")
    if isinstance(recipe.method, OnlineMethod) or train.group_gradient != "one_pass":
        return
    if isinstance(train.micro_batch, int) and train.micro_batch < recipe.method.k:
        yield Problem(
            "train.group_gradient",
            "'one_pass' needs a whole group in one forward pass, but train.micro_batch "
            f"({train.micro_batch}) is less than method.k ({recipe.method.k}): use 'two_pass' or 'auto'",
        )


def _objectives(recipe: Recipe) -> Iterator[Problem]:
    for name, settings in (("ocr", recipe.reward.ocr), ("geneval", recipe.reward.geneval)):
        if not isinstance(settings.objective, str) and not sum(settings.objective.values()):
            yield Problem(f"reward.{name}.objective", "needs at least one weight above 0")


def _geneval(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.reward.geneval
    if settings.detector_model is not None and settings.detector != "mask2former":
        yield Problem(
            "reward.geneval.detector_model",
            f"has no meaning for reward.geneval.detector {settings.detector!r}: remove it, or use 'mask2former'",
        )
    clip = settings.colours == "clip" or (settings.colours == "auto" and settings.detector == "mask2former")
    if settings.colour_model is not None and not clip:
        yield Problem(
            "reward.geneval.colour_model",
            f"has no meaning for reward.geneval.colours {settings.colours!r} with reward.geneval.detector"
            f" {settings.detector!r}: remove it, or let 'clip' name the colours",
        )


def _other_rewards(recipe: Recipe) -> Iterator[Problem]:
    rewards = recipe.eval.rewards
    for name in dict.fromkeys(rewards):
        if name in (recipe.reward.kind, *recipe.reward.parts, MIX):
            trained = "is trained on and reported anyway" if name != MIX else "is not a single reward"
            yield Problem("eval.rewards", f"names {name!r}, which {trained}: remove it")
        elif rewards.count(name) > 1:
            yield Problem("eval.rewards", f"names {name!r} twice: remove one")


def _servers(recipe: Recipe) -> Iterator[Problem]:
    for address, variable in _ADDRESSES.items():
        _, *sections, _ = address.split(".")
        settings = getattr(recipe.reward, sections[0], None) if sections else None
        for key in (address, variable) if settings is not None else ():
            yield from _secret(key, getattr(settings, key.rpartition(".")[2]), path=key)
    yield from _passwords(recipe.reward.model_dump(mode="json"), "reward")


def _passwords(value: Any, path: str) -> Iterator[Problem]:
    """Refuse addresses with a user name or a password anywhere in the settings of rewards, which runs publish."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _passwords(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _passwords(inner, path)
    elif isinstance(value, str) and path not in _ADDRESSES and _USER.search(value):
        yield Problem(path, "must not hold an address with a user name or a password: runs publish their settings")


def _judge(recipe: Recipe) -> Iterator[Problem]:
    judge = recipe.judge
    for key in ("base_url", "api_key_env"):
        yield from _secret(f"judge.{key}", getattr(judge, key), path=f"judge.{key}")
    needed = {"unified-reward": ("base_url", "model"), "unified-reward-local": ("model",)}.get(judge.kind, ())
    for key in ("base_url", "model"):
        is_set = getattr(judge, key) is not None
        if key in needed and not is_set:
            yield Problem(f"judge.{key}", f"is needed for judge.kind {judge.kind!r}")
        elif key not in needed and is_set:
            yield Problem(f"judge.{key}", f"has no meaning for judge.kind {judge.kind!r}: remove it")
    if judge.template is not None and not needed:
        yield Problem("judge.template", f"has no meaning for judge.kind {judge.kind!r}: remove it")


def _secret(key: str, value: Any, *, path: str) -> Iterator[Problem]:
    """Refuse a value of the keys of a server that may be a secret, in a sentence that does not repeat it."""
    if key not in (*_ADDRESSES, *_ADDRESSES.values()) or value is None:
        return
    if not isinstance(value, str):
        yield Problem(path, "must be text")
    elif key in _ADDRESSES and re.search("[@?#;]", value):
        yield Problem(
            path, f"must not hold a user name, a key or a query: name the key's variable in {_ADDRESSES[key]}"
        )
    elif key not in _ADDRESSES and (problem := variable_problem(value, example=f"{key.split('.')[0].upper()}_API_KEY")):
        yield Problem(path, problem)


def variable_problem(name: str, *, example: str) -> str | None:
    """What is wrong with the name of an environment variable that holds a key; it may be the key itself.

    ``example``: the name of such a variable.
    """
    if _VARIABLE.fullmatch(name):
        return None
    return (
        "must be the name of an environment variable (letters, digits and '_'), not the key itself: put the key into a"
        f" variable such as {example} and give its name"
    )


def _ablation(recipe: Recipe) -> Iterator[Problem]:
    schema, names = type(recipe), dict[str, str]()
    for name, entry in recipe.ablation.items():
        path = f"ablation.{name}"
        key = full_key(name, schema)
        if key is None:
            yield Problem(path, _no_key(name, schema))
        elif (first := names.setdefault(key, name)) != name:
            yield Problem(path, f"is the same key as ablation.{first}: give it once, by that name")
        if not entry.values:
            yield Problem(path, "needs at least one value")
        yield from _published(key or name, entry.values, path=path)
        yield from _fixed(entry.set, path=f"{path}.set", swept=key, schema=schema)


def _fixed(settings: Mapping[str, Any], *, path: str, swept: str | None, schema: type[Recipe]) -> Iterator[Problem]:
    """The settings that a sweep of ``swept`` fixes, each by itself."""
    names: dict[str, str] = {}
    for name, value in settings.items():
        key = full_key(name, schema)
        if name in field_names(schema, sections=True) and isinstance(value, Mapping) and key != name:
            yield Problem(path, f"{name} is a section: name its keys in full, as in {name}.{next(iter(value), 'key')}")
        elif key is None:
            yield Problem(path, _no_key(name, schema))
        elif key == swept:
            yield Problem(path, f"{name} is the swept key itself: remove it")
        elif key in names:
            yield Problem(path, f"{name} and {names[key]} are the same key: keep one")
        elif "label" in field_doc(key, schema).affects:
            yield Problem(path, f"{name} says something about the recipe and not about the training: remove it")
        else:
            names[key] = name
        yield from _published(key or name, [value], path=path)


def _no_key(name: str, schema: type[Recipe]) -> str:
    return f"there is no recipe key {name!r}{similar_key(name, field_names(schema))}"


def _published(key: str, values: Iterable[Any], *, path: str) -> Iterator[Problem]:
    """Refuse values in ``ablation`` that the key itself must not have, since runs publish them."""
    for value in values:
        yield from _secret(key, value, path=path)
        if key.startswith("reward.") and key not in _ADDRESSES:
            yield from _passwords(value, path)
