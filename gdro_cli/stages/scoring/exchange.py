"""Scores from elsewhere: list a store's images for another program, and bring its scores back by image id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdro_cli.data.imported_scores import write_imported_scores
from gdro_cli.data.own_data import read_score_file
from gdro_cli.data.store import StoredImage
from gdro_cli.errors import UserError
from gdro_cli.files import json_lines, write_bytes
from gdro_cli.stages.scoring.score import fill_training_store
from gdro_cli.stages.setup.imported import check_name
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import open_training_store


def export_images(session: Session, path: Path) -> dict[str, str]:
    """Write a line per image of the training store: id, path, prompt, target, metadata. Samples what is missing.

    Returns:
        What the command line shows.

    Raises:
        UserError: the recipe has no store.
        StoreError: the store is damaged or keeps no images, or the file cannot be written.
        Interrupted: stopped by the user; finished shards are kept.
    """
    session.require_store("score")
    with session:
        store = open_training_store(session)
        fill_training_store(session, store)
        images = [image for number in range(len(store.shards)) for image in store.images(number)]
        write_bytes(path, json_lines(map(_line, images)))
    return {"images": str(len(images)), "file": str(path), "to bring scores": "gdro score --import FILE --name NAME"}


def import_scores(session: Session, path: Path, name: str) -> dict[str, str]:
    """Keep the scores of a file as ``name``, for ``train.scores``.

    Args:
        session: its recipe names the store.
        path: JSONL; each line has an ``id`` of ``export_images`` and a ``score``, or an ``error`` that says why it has
            none.
        name: what recipes call the scores.

    Returns:
        What the command line shows.

    Raises:
        UserError: the file cannot be used, or more images lack a score than ``reward.max_failed_share`` allows.
        StoreError: the store has other scores of that name, is damaged or is not complete.
    """
    session.require_store("score")
    with session:
        check_name(name, "scores")
        store, given = open_training_store(session), read_score_file(path)
        ids = {_id(p.id, i): (p.id, i) for p in store.prompts for i in range(store.sizes[p.id])}
        failed = sum(isinstance(score, str) for id_, score in given.items() if id_ in ids)
        unknown, absent = len(given.keys() - ids.keys()), len(ids.keys() - given.keys())
        allowed = session.recipe.reward.max_failed_share
        rows = {"scored": f"{len(ids) - absent - failed} of {len(ids)} images"}
        rows |= {"with an error": str(failed)} if failed else {}
        rows |= {"not in the file": str(absent)} if absent else {}
        rows |= {"ids of no image": str(unknown)} if unknown else {}
        if failed + absent > allowed * len(ids):
            counts = ", ".join(f"{what}: {count}" for what, count in rows.items())
            raise UserError(
                f"{path} leaves more images of {store.path} without a score than reward.max_failed_share ({allowed:g})"
                f" allows ({counts}): complete the file, or raise the key"
            )
        table = write_imported_scores(store, name, {ids[id_]: score for id_, score in given.items() if id_ in ids})
    return {"scores": str(table.path), **rows, "to train on them": f"--set train.scores={name}"}


def _id(prompt_id: str, index: int) -> str:
    return f"{prompt_id}-{index:03d}"


def _line(image: StoredImage) -> dict[str, Any]:
    prompt = image.prompt
    about = {"prompt": prompt.prompt, "target": prompt.target, "metadata": dict(prompt.metadata)}
    edited = {} if prompt.image is None else {"source": str(prompt.image.path.resolve())}
    return {"id": _id(prompt.id, image.index), "path": str(image.path.resolve()), **edited, **about}
