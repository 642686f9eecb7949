"""The tables of docs/results.md, "Head to head", as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from gdro_cli.rewards.judge.base import AXES
from gdro_cli.stages.comparison.result import Comparison, minutes_over_seeds, over_seeds
from gdro_cli.stages.comparison.seed_groups import SeedGroup
from gdro_cli.stages.evaluation.measures import CORRECTED, CORRECTED_OF_MEANS

METHOD_NAMES = {
    "fast": "GDRO",
    "dpo": "DPO",
    "dpo-stabilised": "DPO, stabilised",
    "dpo-plain": "DPO, plain",
    "rank": "rank",
    "top1": "top-1",
    "sft": "fine-tuning",
    "regression": "LAIR",
    "crd": "CRD",
    "dgpo": "DGPO",
    "nft": "DiffusionNFT",
    "flow-grpo": "Flow-GRPO",
    "dance-grpo": "DanceGRPO",
}
"""By the last part of a recipe's name."""
MEASURES = {"ocr": ("reward", "exact match"), "geneval": ("overall", "strict reward")}


def head_to_head_tables(
    task: str, at_rewards: Mapping[float, Comparison], last_verdicts: Mapping[str, Sequence[str | None]]
) -> Iterator[str]:
    """The lines of the three tables: held-out results, times and matched points, ends of the trainings.

    Args:
        task: ``ocr`` or ``geneval``.
        at_rewards: the same runs, compared at one or more rewards.
        last_verdicts: of each group of seeds, by its name, the verdicts at its runs' last evaluation points.
    """
    groups = next(iter(at_rewards.values())).seed_groups
    names = {group.name: METHOD_NAMES[group.name.removeprefix(f"{task}-")] for group in groups}

    measures = MEASURES[task]
    yield from _header("method", *measures, ", ".join(AXES), "u", CORRECTED, "verdicts")
    for group in groups:
        axes = ", ".join(f"{group.trained[axis].mean:.2f}" for axis in AXES)  # type: ignore[union-attr]
        cells = [*(over_seeds(group.trained[name]) for name in measures), axes]
        cells += [over_seeds(group.trained[name]) for name in ("u", CORRECTED)]
        yield _row(names[group.name], *cells, _counted(group.verdicts))

    readings = {
        f"{name} at {reward:.2f}": (name, reward) for reward in at_rewards for name in ("corrected", "of the means")
    }
    yield from _header(
        *("method", "sampling", "scoring", "updates", "whole training"),
        *(f"to reward {reward:.2f}" for reward in at_rewards),
        *readings,
    )
    for index, group in enumerate(groups):
        costs = group.costs
        split = [None] * 4 if costs is None else [costs.sampling, costs.scoring, costs.updates, costs.total]
        matched = {reward: comparison.seed_groups[index] for reward, comparison in at_rewards.items()}
        yield _row(
            names[group.name],
            *("" if seconds is None else f"{seconds / 60:.2f}" for seconds in split),
            *map(_to_reward, matched.values()),
            *(
                over_seeds(matched[reward].matched[CORRECTED if name == "corrected" else CORRECTED_OF_MEANS])
                if matched[reward].reached
                else ""
                for name, reward in readings.values()
            ),
        )

    yield from _header(
        *("method", "highest corrected score", "at the last step", "reward at the last step"),
        "not *healthy* at the last step",
    )
    for group in groups:
        corrected, reward = group.curves["corrected"], group.curves["reward"]
        unhealthy = [verdict or "unknown" for verdict in last_verdicts[group.name] if verdict != "healthy"]
        yield _row(
            names[group.name],
            f"{max(point.over_seeds.mean for point in corrected[1:]):.3f}",
            over_seeds(corrected[-1].over_seeds),
            over_seeds(reward[-1].over_seeds),
            _counted(unhealthy) or "none",
        )


def _header(*columns: str) -> Iterator[str]:
    yield ""
    yield _row(*columns)
    yield "|" + "---|" * len(columns)


def _row(*cells: str) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _counted(words: Sequence[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())


def _to_reward(group: SeedGroup) -> str:
    """Minutes, and how many runs have got there if not all."""
    if not group.reached:
        return ""
    minutes, runs = minutes_over_seeds(group.to_reward), len(group.runs)
    return minutes if group.reached == runs else f"{minutes}, {group.reached} of {runs}"
