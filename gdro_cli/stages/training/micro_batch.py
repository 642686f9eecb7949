"""``train.micro_batch: auto``: the most images that fit the GPU, and half of them where that was too much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from gdro_cli.core.footprint import USABLE
from gdro_cli.errors import is_out_of_memory
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training.batch_sizes import images_at_once, micro_batches, with_micro_batch
from gdro_cli.stages.training.estimate import Estimate

_TRIALS = 3
"""First steps of a start that may be tried again. Later ones need no more memory."""


class NotEnoughMemory(Exception):
    """Memory ran out in a step that a smaller micro-batch can try again. All processes raise it."""


class MicroBatch:
    """The micro-batch of a training. ``auto`` becomes a number in ``session.recipe`` here and in ``halve``.

    Every start chooses again. All processes must make it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._auto = session.recipe.train.micro_batch == "auto"
        self._trials = _TRIALS if self._auto and session.recipe.model.sharding == "none" else 0
        if self._auto:
            session.recipe = with_micro_batch(session.recipe, _fitting(session))

    @property
    def size(self) -> int:
        """Images per forward pass."""
        return images_at_once(self._session.recipe, self._session.engine.world)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The size, where the recipe leaves it open."""
        return {"micro_batch": self.size} if self._auto else {}

    @property
    def on_trial(self) -> bool:
        """Whether the next step can be tried again; the same answer in all processes."""
        return self._trials > 0 and self.size > self._sizes[0]

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Around the passes of a step, in which the processes must not send to each other while ``on_trial``.

        Raises:
            NotEnoughMemory: memory ran out in one of the processes.
        """
        if not self.on_trial:
            yield
            return
        short = False
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            short = True
        if self._session.engine.any(short):
            raise NotEnoughMemory
        self._trials -= 1

    def halve(self) -> None:
        """Continue with half the size, or the next smaller one that differs. All processes must call it."""
        session, size = self._session, self.size
        smaller = max(one for one in self._sizes if one <= max(size // 2, self._sizes[0]))
        session.recipe = with_micro_batch(session.recipe, smaller)
        if session.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        session.reporter.say(f"not enough memory for {size} images at once: the step is tried again with {smaller}")

    @property
    def _sizes(self) -> list[int]:
        return micro_batches(self._session.recipe, self._session.engine.world)


def _fitting(session: Session) -> int | None:
    """The most images that fit the GPU of every process, by the estimate; None on the CPU."""
    engine, recipe = session.engine, session.recipe
    rooms = engine.gather_objects([engine.room(USABLE)])
    if None in rooms:
        return None
    smallest = micro_batches(recipe, engine.world)[0]
    size = engine.from_main(
        lambda: Estimate(recipe, world=engine.world).largest_micro_batch(min(rooms)) or smallest  # it may fit after all
    )
    session.reporter.say(f"micro-batches of {size} images, for {min(rooms) / 1e9:.1f} GB of GPU memory")
    return size
