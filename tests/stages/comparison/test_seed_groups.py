"""Runs of several training seeds as one method, and what the methods cost, by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.core.costs import Batch, Costs
from gdro_cli.core.scores import Interval
from gdro_cli.core.sweeps import Spread
from gdro_cli.data.shard_times import add_time, total_time
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.comparison.matched_reward import EvaluatedRun, Gain, Matching, match
from gdro_cli.stages.comparison.result import Comparison
from gdro_cli.stages.comparison.seed_groups import SeedGroup, group_seeds
from gdro_cli.stages.reporting.charts import MANY, time_chart
from gdro_cli.stages.runs.store_times import note_batch, read_batches
from tests.support.rows import point, read, results, step

STORE = (Batch(0, 30.0, 10.0),)


def run(name: str, recipe: str, rewards: list[float], *, seed: int | None = None, **changes: Any) -> EvaluatedRun:
    """Points every 2 steps from step 0 on; a step takes 3 seconds."""
    fields: dict[str, Any] = {
        "name": name,
        "path": Path(name),
        "results": read(results(recipe=recipe, base=[], trained=[])),
        "points": tuple(
            point(2 * n, reward, u=4.0, corrected=reward / 2, verdict="healthy") for n, reward in enumerate(rewards)
        ),
        "steps": tuple(step(n, seconds=3.0) for n in range(1, 2 * len(rewards) - 1)),
        "batches": STORE,
        "settings": {"name": recipe, "train": {"lr": 1} | ({} if seed is None else {"seed": seed})},
    }
    return EvaluatedRun(**{**fields, **changes})


def gains(means: dict[str, float]) -> list[Gain]:
    return [Gain("reward", name, Interval(mean, 0, 1, 2, 4, 0.95), None) for name, mean in means.items()]


def compared(
    runs: list[EvaluatedRun], means: dict[str, float], *, at_reward: float | None = None
) -> tuple[SeedGroup, ...]:
    return group_seeds(runs, gains(means), match(runs, at_reward=at_reward))


def tables(groups: tuple[SeedGroup, ...], means: dict[str, float]) -> Comparison:
    return Comparison(("a",), tuple(gains(means)), Matching(None, None, ()), groups, Path("x"), ())


def test_seeds_are_one_method_with_its_costs_and_its_time_to_the_reward() -> None:
    runs = [run("a", "gdro", [0.5, 0.7, 0.9]), run("b", "gdro", [0.5, 0.9, 0.7], seed=1), run("c", "dpo", [0.5, 0.6])]
    first, second = compared(runs, {"a": 0.8, "b": 0.6, "c": 0.5}, at_reward=0.85)
    assert (first.name, first.runs, first.verdicts) == ("gdro", ("a", "b"), ("healthy", "healthy"))
    assert first.trained["reward"] == Spread(pytest.approx(0.7), 0.6, 0.8, 2)  # type: ignore[arg-type]
    assert first.matched["corrected"] == Spread(pytest.approx(0.45), 0.45, 0.45, 2)  # type: ignore[arg-type]
    assert first.costs == Costs(30.0, 10.0, 12.0)
    assert first.reached == 2
    assert first.to_reward == Spread(49.0, 46.0, 52.0, 2)  # the store's 40, and 4 or 2 steps
    assert first.costs_to_reward == Costs(30.0, 10.0, 9.0)
    assert [point.at * 60 for point in first.curves["reward"]] == pytest.approx([40.0, 46.0, 52.0])
    assert [point.over_seeds.mean for point in first.curves["reward"]] == pytest.approx([0.5, 0.8, 0.8])
    assert (second.name, second.reached, second.to_reward, second.costs_to_reward) == ("dpo", 0, None, None)
    comparison = tables((first, second), {"a": 0.8})
    _, rows = comparison.times_table
    assert rows[0] == ["gdro", "0.50", "0.17", "0.20", "0.87", "0.82 (0.77 to 0.87)", "2 of 2"]
    assert rows[1][-2:] == ["-", "0 of 1"]
    columns, (row, _) = comparison.seed_group_table
    shown = dict(zip(columns, row, strict=True))
    assert row[:3] == ["gdro", "2", "0.700 (0.600 to 0.800)"]
    # At the matched reward of 0.85 both have a reward of 0.9 and u of 4.
    assert (shown["corrected, matched"], shown["corrected of the means, matched"]) == (
        "0.450 (0.450 to 0.450)",
        "1.100 (1.100 to 1.100)",
    )


def test_another_setting_is_another_method_even_under_the_same_name() -> None:
    other = run("b", "gdro", [0.5, 0.9], settings={"name": "gdro", "train": {"lr": 2}})
    found = compared([run("a", "gdro", [0.5, 0.9]), other], {"a": 1, "b": 1})
    assert [group.name for group in found] == ["a", "b"]


def test_unknown_times_are_missing_and_not_nothing() -> None:
    (group,) = compared([run("a", "g", [0.5, 0.9]), run("b", "g", [0.5, 0.9], seed=1, batches=None)], {"a": 1, "b": 1})
    assert group.costs is None and group.costs_to_reward is None
    assert group.reached == 2 and group.to_reward == Spread(46.0, 46.0, 46.0, 1)
    assert tables((group,), {"a": 1}).times_table[1] == [["g", "-", "-", "-", "-", "0.77", "2 of 2"]]


def test_the_chart_has_a_line_per_method_against_minutes() -> None:
    found = compared([run("a", "gdro", [0.5, 0.7]), run("b", "dpo", [0.5, 0.6])], {"a": 1, "b": 1})
    drawn = time_chart({group.name: group.curves for group in found}, level=0.6)
    assert drawn is not None
    for text in (">gdro<", ">dpo<", ">minutes<", ">validation reward<", ">corrected score<"):
        assert text in drawn
    assert time_chart({"gdro": {"reward": (), "corrected": ()}}) is None


@pytest.mark.parametrize(("methods", "named"), [(MANY + 1, True), (2 * MANY + 1, False)])
def test_a_chart_of_very_many_methods_names_none(methods: int, named: bool) -> None:
    group, _ = compared([run("a", "gdro", [0.5, 0.7]), run("b", "dpo", [0.5, 0.6])], {"a": 1, "b": 1})
    drawn = time_chart({f"method {number}": group.curves for number in range(methods)})
    assert drawn is not None and (">method 0<" in drawn) == named


def test_the_names_of_many_methods_leave_the_panels_their_width() -> None:
    """A legend that is too wide is cut off, and its panel shrinks."""
    group, _ = compared([run("a", "gdro", [0.5, 0.7]), run("b", "dpo", [0.5, 0.6])], {"a": 1, "b": 1})
    drawn = time_chart({f"geneval-dance-{number:04}": group.curves for number in range(2 * MANY)})
    assert drawn is not None
    *_, panel, figure = sorted({float(x) for x in re.findall(r"L (\d+\.?\d*) ", drawn)})
    assert panel > 0.95 * figure


def test_times_of_shards_are_those_of_the_last_try_and_shared_by_processes(tmp_path: Path) -> None:
    add_time(tmp_path, 0, 5.0)
    add_time(tmp_path, 0, 4.0)
    assert total_time(tmp_path, shards=2) is None
    add_time(tmp_path, 1, 6.0, processes=2)
    assert total_time(tmp_path, shards=2) == 7.0
    (tmp_path / "times.jsonl").write_text('{"shard": 0, "sec')
    assert total_time(tmp_path, shards=1) is None


@pytest.mark.parametrize("row", [{"seconds": None}, {"seconds": "x"}, {"processes": "1"}, {"shard": "x"}], ids=str)
def test_a_time_that_is_no_number_makes_the_total_unknown(row: dict[str, Any], tmp_path: Path) -> None:
    add_time(tmp_path, 0, 5.0)
    assert total_time(tmp_path, shards=1) == 5.0
    with (tmp_path / "times.jsonl").open("a") as file:
        file.write(json.dumps({"shard": 0, "seconds": 5.0, "processes": 1} | row) + "\n")
    assert total_time(tmp_path, shards=1) is None


def test_a_run_keeps_the_times_of_its_stores(tmp_path: Path, open_folder: Callable[[], RunFolder]) -> None:
    folder = open_folder()
    assert read_batches(folder) is None
    note_batch(folder, None, step=0)
    assert read_batches(folder) is None
    note_batch(folder, STORE[0], step=0)
    note_batch(folder, Batch(2, 3.0, 1.0), step=2)
    assert read_batches(folder) == (*STORE, Batch(2, 3.0, 1.0))
    note_batch(folder, Batch(2, 4.0, 1.0), step=2)  # made again
    assert read_batches(folder) == (*STORE, Batch(2, 4.0, 1.0))


def test_an_online_run_has_its_times_in_its_rows(open_folder: Callable[[], RunFolder]) -> None:
    folder = open_folder()
    folder.append_metrics(step(1, seconds=2.0, seconds_sampling=1.0))
    assert read_batches(folder) == ()


@pytest.fixture
def open_folder(tmp_path: Path) -> Callable[[], RunFolder]:
    return lambda: RunFolder.create_or_open(tmp_path / "run", recipe={}, inputs={}, environment={})
