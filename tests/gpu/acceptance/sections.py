"""The sections by number, and running those that are left within a budget of time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from gdro_cli.runtime.environment import environment
from tests.gpu.acceptance import arithmetic, commands, memory, sampling, sd35, training
from tests.gpu.acceptance.bench import Bench, free
from tests.gpu.acceptance.rows import WHOLE, Journal, Section, exit_code

SECTIONS: dict[int, Callable[[Bench, Section], None]] = {
    0: arithmetic.machine,
    1: arithmetic.tiny_models,
    2: commands.main_job,
    3: sampling.sampling,
    4: sampling.attention,
    5: training.memory,
    6: training.passes,
    7: training.resume,
    8: memory.text_encoders,
    9: memory.quantised,
    10: sd35.speed,
    11: sd35.online,
    12: commands.stop_and_resume,
    13: commands.ablation,
    14: commands.process_group,
    15: sampling.compilation,
}
"""In the order in which they run: what is worth most comes first."""


def run(given: argparse.Namespace, *, began: float) -> int:
    """Run the requested sections that are not done; returns the exit code.

    Args:
        given: the command line.
        began: ``time.monotonic()`` when the clock of the budget started.
    """
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: use --pretend LIB --tiny to try the script without one")
    numbers = list(SECTIONS) if given.sections is None else [int(number) for number in given.sections.split(",")]
    if unknown := set(numbers) - SECTIONS.keys():
        raise SystemExit(f"--sections names {sorted(unknown)}: there are 0 to {max(SECTIONS)}")
    commit = given.commit or environment()["commit"]
    journal = Journal(given.out, commit=commit, device=torch.cuda.get_device_name(0))
    work = given.out / f"work-{(commit or 'unknown')[:12]}"  # nothing of another commit is used again
    bench, done = Bench(work, pretended=given.pretend is not None, tiny=given.tiny), journal.done()
    for number in numbers:
        if number in done:
            continue
        section = Section(number, journal)
        if time.monotonic() - began >= given.budget:
            section.skip(WHOLE, f"the clock passed {given.budget:g} s")
            continue
        try:
            SECTIONS[number](bench, section)
        except Exception as error:
            section.raised(error)
            if isinstance(error, torch.AcceleratorError):  # this process cannot use the device any more
                raise SystemExit("the device failed: run the same command again for the other sections") from error
        else:
            section.end()
        free()
    return exit_code(row for row in journal.rows() if row["section"] in numbers)
