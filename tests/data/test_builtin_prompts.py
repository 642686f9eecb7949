"""Built-in OCR prompts: the words, their splits, and the order of a set."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from gdro_cli.data.builtin import BACKGROUNDS, COLOURS, OCR_SETS, SCENES, all_words, ocr_prompts, split_of, words
from gdro_cli.errors import UserError
from gdro_cli.tiny import world

GRAMMAR = re.compile(
    f"a ({'|'.join(COLOURS)}) sign that says "
    '"([A-Z]{1,6}(?: [A-Z]{1,6})?)"'
    f" on a ({'|'.join(BACKGROUNDS)}) background"
)


def texts(prompts: list[str]) -> list[str]:
    matches = [GRAMMAR.fullmatch(prompt) for prompt in prompts]
    assert all(matches)
    return [match.group(2) for match in matches if match]


def test_word_list_is_clean() -> None:
    listed = all_words()
    assert len(listed) >= 700
    assert list(listed) == sorted(set(listed))
    assert all(re.fullmatch(r"[A-Z]{3,6}", word) for word in listed)


def test_splits_are_disjoint_and_complete_and_have_the_planned_sizes() -> None:
    splits = [set(words(split)) for split in OCR_SETS.values()]
    assert set.union(*splits) == set(all_words())
    assert sum(map(len, splits)) == len(all_words())
    shares = [len(split) / len(all_words()) for split in splits]
    # Standard deviation of a share of 1,800 words is about 0.01.
    assert shares == pytest.approx([0.70, 0.12, 0.18], abs=0.03)


def test_a_word_never_changes_its_split() -> None:
    """Frozen: a change would put words that published models were trained on into the test set."""
    expected = dict.fromkeys(("HELLO", "OCEAN", "ZEBRA"), "train") | dict.fromkeys(
        ("DOG", "DRAGON", "GLASS"), "validation"
    )
    expected |= dict.fromkeys(("WINTER", "GARDEN", "HARBOR"), "test")
    assert {word: split_of(word) for word in expected} == expected


def test_a_set_depends_only_on_its_options_and_a_longer_one_begins_with_it() -> None:
    short, long = (ocr_prompts("ocr-train", count=count, seed=3, two_line_share=0.3) for count in (50, 3000))
    assert long[:50] == short
    assert ocr_prompts("ocr-train", count=50, seed=3, two_line_share=0.3) == short
    assert ocr_prompts("ocr-train", count=50, seed=4, two_line_share=0.3) != short


def test_no_prompt_appears_twice_in_the_longest_set() -> None:
    capacity = len(words("validation", min_letters=6)) * len(SCENES)
    prompts = ocr_prompts("ocr-validation", count=capacity, min_letters=6, two_line_share=0.5)
    assert len(set(prompts)) == capacity
    with pytest.raises(UserError, match="lower count"):
        ocr_prompts("ocr-validation", count=capacity + 1, min_letters=6)


def test_words_and_scenes_are_used_evenly() -> None:
    pool = words("test", min_letters=4)
    prompts = ocr_prompts("ocr-test", count=2 * len(pool))
    assert set(Counter(texts(prompts)).values()) == {2}
    colours = Counter(prompt.split()[1] for prompt in prompts)
    assert set(colours) == set(COLOURS)
    # Eight colours: 1/8 each, standard deviation sqrt(n/8 * 7/8).
    n = len(prompts)
    assert all(abs(count - n / 8) < 4.5 * (n * 7 / 64) ** 0.5 for count in colours.values())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_two_line_texts(share: float) -> None:
    signs = texts(ocr_prompts("ocr-train", count=200, two_line_share=share))
    two_lines = [text.split() for text in signs if " " in text]
    assert len(two_lines) == 200 * share
    assert all(first != second for first, second in two_lines)


def test_training_validation_and_test_prompts_share_no_word() -> None:
    used = [
        {word for text in texts(ocr_prompts(name, count=400, two_line_share=0.5)) for word in text.split()}
        for name in OCR_SETS
    ]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]


def test_the_range_of_letters_applies_to_each_word() -> None:
    signs = texts(ocr_prompts("ocr-train", count=100, two_line_share=0.5, min_letters=3, max_letters=4))
    assert {len(word) for text in signs for word in text.split()} == {3, 4}


def test_default_count_is_one_prompt_per_word() -> None:
    assert sorted(texts(ocr_prompts("ocr-test"))) == sorted(words("test", min_letters=4))


def test_impossible_letters_are_refused() -> None:
    with pytest.raises(UserError, match="too few words of 1 to 2 letters"):
        ocr_prompts("ocr-train", count=1, min_letters=1, max_letters=2)


def test_the_embedded_world_has_the_same_colours_and_backgrounds() -> None:
    assert set(COLOURS) == set(world.COLOURS)
    assert set(BACKGROUNDS) == set(world.BACKGROUNDS)
