"""Rules between the keys of a recipe."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gdro_cli.config.methods import GroupMethod, OnlineMethod
from gdro_cli.config.prompt_sets import BUILTIN_SETS, GENEVAL_TAGS, OPTIONS, BuiltinSet, fitting_sets
from gdro_cli.config.rewards import reward_needs
from gdro_cli.config.sections import MOST, PromptSource, SampleSection, TrainSection
from gdro_cli.config.suggest import similar, similar_key

if TYPE_CHECKING:
    from gdro_cli.config.recipe import Recipe

#: Keys that only training on stored groups has a use for, and what online methods have in their place.
STORED_ONLY = {
    "sample.images_per_prompt": "method.group_size",
    "train.groups_per_step": "method.prompts_per_round",
    "train.group_gradient": None,
    "train.rounds": None,
    "train.cache_reference": None,
    "train.prefetch": None,
}
_VARIABLE = re.compile(r"(?!hf_)[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe: the dotted path of a key and the rest of the sentence about it.

    ``involves`` are other keys that the rule looked at.
    """

    path: str
    message: str
    involves: tuple[str, ...] = ()


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Every broken rule of a recipe whose single fields are all valid."""
    yield from _model(recipe)
    yield from _method(recipe)
    yield from _prompts(recipe)
    yield from _sizes(recipe)
    yield from _train(recipe)
    yield from _geneval(recipe)
    yield from _judge(recipe)
    yield from _ablation(recipe)


def _model(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    if model.sharding == "fsdp":
        for key, off in (("quantization", "none"), ("offload", False)):
            if getattr(model, key) != off:
                yield Problem(
                    f"model.{key}", "does not go with model.sharding 'fsdp': choose one of them", ("model.sharding",)
                )


def _method(recipe: Recipe) -> Iterator[Problem]:
    large = [key for key, value in recipe.method if isinstance(value, int) and value > MOST]
    if large:
        yield from (Problem(f"method.{key}", f"must be at most {MOST}") for key in large)
    elif isinstance(recipe.method, OnlineMethod):
        yield from _online(recipe, recipe.method)
    else:
        yield from _stored(recipe, recipe.method)


def _online(recipe: Recipe, method: OnlineMethod) -> Iterator[Problem]:
    for path, instead in STORED_ONLY.items():
        section, _, key = path.partition(".")
        model = SampleSection if section == "sample" else TrainSection
        if getattr(getattr(recipe, section), key) != model.model_fields[key].default:
            advice = "remove it" if instead is None else f"remove it; {instead} says how many"
            yield Problem(path, f"has no meaning for the online method {method.name!r}: {advice}", ("method.name",))
    images = method.prompts_per_round * method.group_size
    if method.updates_per_round > images:
        yield Problem(
            "method.updates_per_round",
            f"{method.updates_per_round} is more than the {images} images of a round",
            ("method.prompts_per_round", "method.group_size"),
        )


def _stored(recipe: Recipe, method: GroupMethod) -> Iterator[Problem]:
    images = recipe.sample.images_per_prompt
    if method.k > images:
        yield Problem(
            "method.k",
            f"{method.k} is more than sample.images_per_prompt ({images}): lower k or sample more images",
            ("sample.images_per_prompt",),
        )
    if method.sigma_min >= method.sigma_max:
        yield Problem(
            "method.sigma_min",
            f"{method.sigma_min:g} must be below method.sigma_max ({method.sigma_max:g})",
            ("method.sigma_max",),
        )


def _prompts(recipe: Recipe) -> Iterator[Problem]:
    task = recipe.prompts.task
    if recipe.reward.kind != task:
        yield Problem(
            "reward.kind",
            f"{recipe.reward.kind!r} does not score prompts of the task {task!r} (prompts.task)",
            ("prompts.task",),
        )
    known = fitting_sets(reward_needs(task))
    for split in ("train", "validation", "eval"):
        source: PromptSource = getattr(recipe.prompts, split)
        for problem in source_problems(source, known=known, path=f"prompts.{split}"):
            yield Problem(problem.path, problem.message, (f"prompts.{split}", "prompts.task"))


def source_problems(source: PromptSource, *, known: Collection[str], path: str) -> Iterator[Problem]:
    """Every broken rule of one prompt source.

    Args:
        source: the prompt source.
        known: the built-in sets that fit its reward.
        path: the dotted path of its section.
    """
    if source.file is None and source.builtin is None:
        yield Problem(path, "needs a `file` or a `builtin` set")
    elif source.file is not None and source.builtin is not None:
        yield Problem(path, "names both a `file` and a `builtin` set: keep one")
    elif source.builtin is not None:
        if source.builtin in known:
            yield from _builtin(source, source.builtin, BUILTIN_SETS[source.builtin], path=path)
        else:
            names = ", ".join(known) if known else "none for this reward, name a `file`"
            hint = similar(source.builtin, known)
            yield Problem(f"{path}.builtin", f"{source.builtin!r} is not a built-in set (they are: {names}){hint}")
    else:
        for key in _given(source, ("seed", *OPTIONS)):
            yield Problem(f"{path}.{key}", "only applies to a `builtin` set, not to a `file`: remove it")


def _builtin(source: PromptSource, name: str, facts: BuiltinSet, *, path: str) -> Iterator[Problem]:
    for key in _given(source, tuple(key for key in OPTIONS if key not in facts.options)):
        yield Problem(f"{path}.{key}", f"only applies to {OPTIONS[key]}, not to {name!r}: remove it")
    if "min_letters" in facts.options and source.min_letters > source.max_letters:
        yield Problem(f"{path}.min_letters", f"{source.min_letters} is more than max_letters ({source.max_letters})")
    if "tags" in facts.options:
        yield from _tags(source, path=path)


def _tags(source: PromptSource, *, path: str) -> Iterator[Problem]:
    for tag in source.tags or {}:
        if tag not in GENEVAL_TAGS:
            names = ", ".join(GENEVAL_TAGS)
            yield Problem(f"{path}.tags.{tag}", f"is not a tag (they are: {names}){similar(tag, GENEVAL_TAGS)}")
    if source.tags is not None and not any(source.tags.values()):
        yield Problem(f"{path}.tags", "gives no tag a weight above 0: give one, or remove it")


def _given(source: PromptSource, keys: tuple[str, ...]) -> Iterator[str]:
    """Those of the keys that do not have their default value."""
    return (key for key in keys if getattr(source, key) != PromptSource.model_fields[key].default)


def _sizes(recipe: Recipe) -> Iterator[Problem]:
    height, width = recipe.sample.height, recipe.sample.width
    if (height is None) != (width is None):
        missing = "sample.height" if height is None else "sample.width"
        yield Problem(missing, "is missing: set both height and width, or neither", ("sample.height", "sample.width"))


def _train(recipe: Recipe) -> Iterator[Problem]:
    train = recipe.train
    if train.warmup_steps > train.steps:
        yield Problem(
            "train.warmup_steps",
            f"{train.warmup_steps} is more than train.steps ({train.steps})",
            ("train.steps",),
        )
    if train.rounds > train.steps:
        yield Problem("train.rounds", f"{train.rounds} is more than train.steps ({train.steps})", ("train.steps",))
    if train.stop_on_collapse and not train.eval_every:
        yield Problem(
            "train.stop_on_collapse", "needs evaluation points: set train.eval_every above 0", ("train.eval_every",)
        )
    if isinstance(recipe.method, OnlineMethod) or train.group_gradient != "one_pass" or train.micro_batch is None:
        return
    if train.micro_batch < recipe.method.k:
        yield Problem(
            "train.group_gradient",
            "'one_pass' needs a whole group in one forward pass, but train.micro_batch "
            f"({train.micro_batch}) is less than method.k ({recipe.method.k}): use 'two_pass' or 'auto'",
            ("train.micro_batch", "method.k"),
        )


def _geneval(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.reward.geneval
    if not isinstance(settings.objective, str) and not sum(settings.objective.values()):
        yield Problem("reward.geneval.objective", "needs at least one weight above 0")
    if settings.detector_model is not None and settings.detector != "mask2former":
        yield Problem(
            "reward.geneval.detector_model",
            f"has no meaning for the detector {settings.detector!r}: remove it, or set the detector to 'mask2former'",
            ("reward.geneval.detector",),
        )
    clip = settings.colours == "clip" or (settings.colours == "auto" and settings.detector == "mask2former")
    if settings.colour_model is not None and not clip:
        yield Problem(
            "reward.geneval.colour_model",
            "has no meaning where the palette names colours: remove it, or set reward.geneval.colours to 'clip'",
            ("reward.geneval.colours", "reward.geneval.detector"),
        )


def _judge(recipe: Recipe) -> Iterator[Problem]:
    judge = recipe.judge
    for key in ("base_url", "api_key_env"):
        yield from _secret(f"judge.{key}", getattr(judge, key), path=f"judge.{key}")
    takes = {"unified-reward": ("base_url", "model"), "unified-reward-local": ("model",)}.get(judge.kind, ())
    for key in ("base_url", "model"):
        given = getattr(judge, key) is not None
        if key in takes and not given:
            yield Problem(f"judge.{key}", f"is needed for the judge {judge.kind!r}", ("judge.kind",))
        elif key not in takes and given:
            yield Problem(f"judge.{key}", f"has no meaning for the judge {judge.kind!r}: remove it", ("judge.kind",))


def _secret(key: str, value: Any, *, path: str) -> Iterator[Problem]:
    """What may be a secret in a value of the judge's; the sentence does not say it again."""
    if key not in ("judge.base_url", "judge.api_key_env") or value is None:
        return
    if not isinstance(value, str):
        yield Problem(path, "must be text")
    elif key == "judge.base_url" and re.search("[@?#;]", value):
        yield Problem(path, "must not hold a name, a key or a query: name the key's variable in judge.api_key_env")
    elif key == "judge.api_key_env" and not _VARIABLE.fullmatch(value):
        yield Problem(
            path,
            "must be the name of an environment variable (letters, digits and '_'), not the key itself: put the key"
            " into a variable such as JUDGE_API_KEY and name that",
        )


def _ablation(recipe: Recipe) -> Iterator[Problem]:
    from gdro_cli.config.keys import field_names
    from gdro_cli.config.sweep import full_key

    for name, values in recipe.ablation.items():
        path = f"ablation.{name}"
        key = full_key(name)
        if key is None:
            yield Problem(path, f"there is no recipe key {name!r}{similar_key(name, field_names())}")
        if not values:
            yield Problem(path, "needs at least one value")
        for value in values:
            yield from _secret(key or name, value, path=path)
