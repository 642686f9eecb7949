"""The tables of docs/results.md, "Head to head", as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from gdro_cli.core.sweeps import Spread
from gdro_cli.rewards.judge.base import AXES
from gdro_cli.stages.comparison.result import Comparison
from gdro_cli.stages.comparison.seed_groups import SeedGroup
from gdro_cli.stages.evaluation.measures import CORRECTED, CORRECTED_OF_MEANS

METHOD_NAMES = {
    "fast": "GDRO",
    "dpo": "DPO",
    "dpo-stabilised": "DPO, stabilised",
    "dpo-plain": "DPO, plain",
    "top1": "top-1",
    "sft": "fine-tuning",
    "regression": "LAIR",
    "crd": "CRD",
    "dgpo": "DGPO",
    "nft": "DiffusionNFT",
    "flow-grpo": "Flow-GRPO",
    "dance-grpo": "DanceGRPO",
}
"""By the last part of a recipe's name, where the two differ."""
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
    names = {group.name: METHOD_NAMES.get(last := group.name.removeprefix(f"{task}-"), last) for group in groups}

    measures = MEASURES[task]
    yield from _header("method", *measures, ", ".join(AXES), "u", CORRECTED, "verdicts")
    for group in groups:
        axes = ", ".join(f"{group.trained[axis].mean:.2f}" for axis in AXES)  # type: ignore[union-attr]
        cells = [*(_spread(group.trained[name]) for name in measures), axes]
        cells += [_spread(group.trained[name]) for name in ("u", CORRECTED)]
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
        split = [] if costs is None else [costs.sampling, costs.scoring, costs.updates, costs.total]
        matched = {reward: comparison.seed_groups[index] for reward, comparison in at_rewards.items()}
        yield _row(
            names[group.name],
            *(f"{seconds / 60:.2f}" for seconds in split),
            *map(_to_reward, matched.values()),
            *(
                _spread(matched[reward].matched[CORRECTED if name == "corrected" else CORRECTED_OF_MEANS])
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
            _spread(corrected[-1].over_seeds),
            _spread(reward[-1].over_seeds),
            _counted(unhealthy) or "none",
        )


def _header(*columns: str) -> Iterator[str]:
    yield ""
    yield _row(*columns)
    yield "|" + "---|" * len(columns)


def _row(*cells: str) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _spread(value: Spread | None) -> str:
    return "" if value is None else f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def _counted(words: Sequence[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())


def _to_reward(group: SeedGroup) -> str:
    """Minutes, and how many runs have got there if not all."""
    value = group.to_reward
    if value is None:
        return ""
    minutes = f"{value.mean / 60:.2f} ({value.low / 60:.2f} to {value.high / 60:.2f})"
    return minutes if group.reached == len(group.runs) else f"{minutes}, {group.reached} of {len(group.runs)}"
