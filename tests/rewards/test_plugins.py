"""Rewards of other installed packages: found when a recipe names them, described, and refused in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gdro_cli.config.keys import describe_fields, values_that_affect
from gdro_cli.config.load import build_recipe, load_recipe
from gdro_cli.config.rewards import REWARDS
from gdro_cli.errors import GdroError, PrerequisiteError, UserError
from gdro_cli.rewards.registry import open_reward, provenance, reward_class
from tests.support.plugins import BRIGHTNESS, install

HEAD = "from gdro_cli.rewards import *\n"
GOOD = """
class Good(Reward):
    name, purpose, version = "{name}", "to be good", {{}}
    {extra}
    def score_image(self, image, prompt):
        return 1
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in set(sys.modules) - before:
        if module.endswith("_reward"):
            del sys.modules[module]


@pytest.fixture
def brightness(site: Path) -> Path:
    install(site, "brightness", BRIGHTNESS, target="Brightness")
    return site


def refused(*overrides: str) -> GdroError:
    with pytest.raises(GdroError) as caught:
        load_recipe("ocr", overrides=overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_recipe_names_it_and_its_settings(brightness: Path) -> None:
    plain = load_recipe("ocr", overrides=["reward.kind=brightness"])
    recipe = load_recipe("ocr", overrides=["reward.kind=brightness", "reward.brightness.power=2"])
    assert plain.resolved()["reward"]["brightness"] == {"power": 1.0, "threads": 1}
    assert open_reward(recipe.reward).settings.power == 2  # type: ignore[attr-defined]
    assert build_recipe(recipe.resolved()) == recipe
    assert recipe.digest() != plain.digest()


def test_its_settings_are_checked_as_those_of_built_in_rewards_are(brightness: Path) -> None:
    kind = "reward.kind=brightness"
    assert "unknown key; did you mean `reward.brightness.power`?" in str(refused(kind, "reward.brightness.powr=2"))
    assert "reward.brightness.power: must be a number, not 'x'" in str(refused(kind, "reward.brightness.power=x"))
    assert "there is no recipe key 'reward.brightness.x'" in str(refused(kind, "ablation={reward.brightness.x: [1]}"))
    load_recipe("ocr", overrides=[kind, "ablation={reward.brightness.power: [1, 2]}"])
    assert "did you mean `brightness`?" in str(refused("reward.kind=brihtness"))


def test_its_settings_belong_to_the_identity_of_runs_and_scores(brightness: Path) -> None:
    def names(*overrides: str) -> tuple[object, object]:
        recipe = load_recipe("ocr", overrides=["reward.kind=brightness", *overrides])
        return values_that_affect(recipe, "scores"), provenance(open_reward(recipe.reward))

    settings, version = names()
    assert settings == {"reward": {"kind": "brightness", "brightness": {"power": 1.0}}}
    assert version == {
        "reward": "brightness",
        "rule": "grey-1",
        "settings": {"power": 1.0},
        "package": "gdro-reward-brightness 0.1.0",
    }
    assert names("reward.brightness.power=2") != (settings, version)
    assert names("reward.brightness.threads=2") == (settings, version)


def test_it_is_imported_when_a_recipe_names_it_and_never_otherwise(site: Path) -> None:
    install(site, "broken", "raise RuntimeError('boom')", target="Broken")
    load_recipe("ocr")
    assert "broken_reward" not in sys.modules
    error = refused("reward.kind=broken")
    assert isinstance(error, PrerequisiteError)
    assert str(error) == (
        "the reward broken of the package gdro-reward-broken 0.1.0 cannot be imported (RuntimeError: boom): correct or"
        " uninstall it"
    )


ADDRESSED = """
class AddressedSettings(StrictModel):
    "Where it is."

    site: str
    "Its address."
    mirrors: list[str] = []
    "Other addresses."

class Addressed(Reward):
    name, purpose, version = "addressed", "to be found", {"reward": "addressed"}
    Settings = AddressedSettings
    def score_image(self, image, prompt):
        return 1
"""


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("reward.addressed.site=ftp://me:hidden@host/x", "reward.addressed.site"),
        ("reward.addressed.mirrors=['http://a', 'at http://hidden@b']", "reward.addressed.mirrors"),
        ("ablation={reward.addressed.site: ['http://me:hidden@host']}", "ablation.reward.addressed.site"),
        ("reward.clip={model: 'http://me:hidden@host'}", "reward.clip.model"),
    ],
)
def test_no_setting_holds_an_address_with_a_password(site: Path, override: str, key: str) -> None:
    install(site, "addressed", HEAD + ADDRESSED, target="Addressed")
    kind = ("reward.kind=addressed", "reward.addressed.site=http://h")
    error = str(refused(*kind, override))
    assert f"{key}: must not hold an address with a user name or a password" in error and "hidden" not in error
    load_recipe("ocr", overrides=[*kind, "reward.addressed.mirrors=['http://h/@x', 'a@b', 'http://h?to=a@b']"])


def test_its_addresses_leave_with_no_export(site: Path) -> None:
    from gdro_cli.stages.reporting.redaction import changed_keys, public_recipe

    install(site, "addressed", HEAD + ADDRESSED, target="Addressed")
    reward = "reward={kind: addressed, addressed: {site: 'http://in.house', mirrors: ['s3://in.house/x', plain]}}"
    recipe = load_recipe("ocr", overrides=[reward, "ablation={reward.addressed.site: ['http://in.house/y', here]}"])
    public = public_recipe(recipe)
    assert "in.house" not in repr((public, changed_keys(recipe)))
    assert public["reward"]["addressed"]["mirrors"] == ["https://reward.invalid", "plain"]
    assert public["ablation"]["reward.addressed.site"] == ["https://reward.invalid", "here"]


def test_its_keys_are_listed(brightness: Path) -> None:
    from gdro_cli.config.schema import schema_with

    docs = {doc.path: doc for doc in describe_fields(schema_with(["brightness"]))}
    assert docs["reward.kind"].type == " | ".join([*REWARDS, "brightness"])
    assert docs["reward.brightness"].text == "What counts as bright."
    assert docs["reward.brightness.power"].reward == "brightness"
    assert docs["reward.brightness.power"].affects == {"scores", "measurement"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(3)", "cannot be imported (SystemExit: 3)"),
        ("import no_such_library", "cannot be imported (ModuleNotFoundError: No module named 'no_such_library')"),
        ("def Good(): pass", "names no subclass of gdro_cli.rewards.Reward"),
        ("x = 1", "cannot be imported (AttributeError: "),
        (GOOD.format(name="good", extra="version = property(len)").replace("version = ", "v = "), "implement version"),
        (GOOD.format(name="other", extra=""), "its class has the name 'other', and its entry point another one"),
        (GOOD.format(name="good", extra="purpose = None"), "its class has no text `purpose`"),
        (GOOD.format(name="good", extra="").replace("score_image", "scores"), "neither score_image nor score"),
        (
            GOOD.format(name="good", extra="Settings = dict"),
            "its Settings is not a subclass of gdro_cli.rewards.",
        ),
        (
            "class S(StrictModel):\n    a: int = 1\n" + GOOD.format(name="good", extra="Settings = S"),
            "the key a of its Settings has no docstring",
        ),
        (
            "from pathlib import Path\nclass S(StrictModel):\n    a: Path = Path('x')\n    'A.'\n"
            + GOOD.format(name="good", extra="Settings = S"),
            "the defaults of its Settings cannot be written into a recipe and read back (1 validation error",
        ),
        (
            "class S(StrictModel):\n    a: int = 'x'\n    'A.'\n" + GOOD.format(name="good", extra="Settings = S"),
            "the defaults of its Settings cannot be written into a recipe and read back (1 validation error",
        ),
        (GOOD.format(name="good", extra="needs = {'target'}"), "`needs` is not a frozenset"),
        (GOOD.format(name="good", extra="measures = ()"), "`measures` is not a tuple of at least one Measure"),
        (GOOD.format(name="good", extra="judge_axes = ('taste',)"), "`judge_axes` is not a tuple of at least one of"),
        (GOOD.format(name="good", extra="scale = 1"), "`scale` is not a pair of numbers"),
        (GOOD.format(name="good", extra="scale = (0, '1')"), "`scale` is not a pair of numbers"),
        (GOOD.format(name="good", extra="scale = (1, 1)"), "the first number of `scale` is not below the second"),
    ],
)
def test_a_bad_plug_in_is_one_sentence_with_its_package(site: Path, code: str, words: str) -> None:
    install(site, "good", HEAD + code, target="Good")
    error = refused("reward.kind=good")
    assert isinstance(error, PrerequisiteError)
    assert words in str(error) and "gdro-reward-good 0.1.0" in str(error)


@pytest.mark.parametrize("name", ["workers", "json", "settings", "u", "corrected", "edge_density", "a.b", "9"])
def test_a_name_that_a_section_cannot_have(site: Path, name: str) -> None:
    install(site, name, HEAD + GOOD.format(name=name, extra=""), target="Good", package="gdro-reward-odd")
    assert "a reward cannot have this name" in str(refused(f"reward.kind='{name}'"))


def test_a_built_in_name_wins(site: Path) -> None:
    install(site, "ocr", "raise RuntimeError('boom')", target="Ocr", package="gdro-reward-fake")
    assert load_recipe("ocr").reward.kind == "ocr"
    assert reward_class("ocr").__module__ == "gdro_cli.rewards.ocr.reward"


def test_two_packages_with_one_name(site: Path) -> None:
    for package in ("gdro-reward-one", "gdro-reward-two"):
        install(site, "twice", HEAD + GOOD.format(name="twice", extra=""), target="Good", package=package)
    text = str(refused("reward.kind=twice"))
    assert text == (
        "the packages gdro-reward-one 0.1.0 and gdro-reward-two 0.1.0 both have a reward twice: uninstall all but one"
    )


def test_a_package_that_is_not_installed_any_more() -> None:
    with pytest.raises(UserError, match="there is no reward 'brightness' .* install the package that has it"):
        reward_class("brightness")
    assert "unknown key" in str(refused("reward.brightness.power=2"))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("version = property(lambda self: 1 / 0)", "the reward good cannot state its version (ZeroDivisionError"),
        ("version = {'a': float('nan')}", "the reward good cannot state its version (ValueError: Out of range"),
        ("version = {'a': object}", "the reward good cannot state its version (TypeError"),
    ],
)
def test_a_version_that_cannot_be_stated(site: Path, extra: str, words: str) -> None:
    install(site, "good", HEAD + GOOD.format(name="good", extra=extra), target="Good")
    recipe = load_recipe("ocr", overrides=["reward.kind=good"])
    with pytest.raises(PrerequisiteError) as caught:
        provenance(open_reward(recipe.reward))
    assert words in str(caught.value)


def test_a_constructor_that_raises(site: Path) -> None:
    install(site, "good", HEAD + GOOD.format(name="good", extra="def __init__(self, s): 1 / 0"), target="Good")
    with pytest.raises(PrerequisiteError, match=r"the reward good cannot be made \(ZeroDivisionError"):
        open_reward(load_recipe("ocr", overrides=["reward.kind=good"]).reward)


def test_a_rule_between_settings(site: Path) -> None:
    code = '''
from pydantic import model_validator
class S(StrictModel):
    """Bounds."""
    low: int = 1
    """The lower bound."""
    high: int = 2
    """The upper bound."""
    @model_validator(mode="after")
    def check(self):
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self
'''
    install(site, "good", HEAD + code + GOOD.format(name="good", extra="Settings = S"), target="Good")
    assert "reward.good: low must not be above high" in str(refused("reward.kind=good", "reward.good.low=3"))


def test_required_settings_are_named(site: Path) -> None:
    code = 'class S(StrictModel):\n    """Where."""\n    url: str\n    """The address."""\n'
    install(site, "good", HEAD + code + GOOD.format(name="good", extra="Settings = S"), target="Good")
    assert str(refused("reward.kind=good")).endswith("reward.good.url: is missing")
