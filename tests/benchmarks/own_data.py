"""What training on imported data does, and how fast images are imported; docs/own-data.md has the results.

    python -m tests.benchmarks.own_data roundtrip OUT      the images of `ocr-fast`, exported, imported and trained on
    python -m tests.benchmarks.own_data foreign OUT        images that the model did not make, with scores
    python -m tests.benchmarks.own_data speed OUT [N]      N images (10,000) against a bare loop of the same work

The first two print the held-out results of each training, base and trained, with the 95 % interval of the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gdro_cli.config.load import load_recipe
from gdro_cli.core.seeds import seed_for
from gdro_cli.data.own_data import read_own_data
from gdro_cli.data.scores import ScoreTable
from gdro_cli.images import fit, open_image
from gdro_cli.models.base import FlowModel
from gdro_cli.models.latents import to_pixels
from gdro_cli.rewards.ocr.rules import ocr_reward
from gdro_cli.stages.importing import import_data
from gdro_cli.stages.scoring.score import make_scored_store
from gdro_cli.stages.setup.model import open_model
from gdro_cli.stages.setup.session import Session
from gdro_cli.tiny.backgrounds import BACKGROUNDS
from gdro_cli.tiny.world import ALPHABET, COLOURS, draw_sign

SIGNS = 8
"""Foreign images of each prompt."""
PROMPTS = 96
"""Twice as many as `ocr-fast` has."""


def gdro(out: Path, *arguments: str) -> None:
    """Run a `gdro` command."""
    command = [sys.executable, "-P", "-m", "gdro_cli", *arguments, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def train(out: Path, name: str, recipe: str, **keys: str) -> dict[str, Any]:
    """Train and evaluate; returns the held-out reward and corrected score."""
    changes = [part for key, value in keys.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    gdro(out, "train", "--recipe", recipe, *changes)
    gdro(out, "eval", "--recipe", recipe, *changes)
    newest = max((out / "runs").glob(f"{recipe}-*/results.json"), key=lambda path: path.stat().st_mtime)
    rows = json.loads(newest.read_text())["measures"]
    return {"training": name, **{measure: rows[measure] for measure in ("reward", "corrected") if measure in rows}}


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def groups_of(table: ScoreTable, folder: Path) -> list[dict[str, Any]]:
    """The images of a store as files in ``folder``, and a row per group."""
    store, rows = table.store, []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    values = {(row.prompt_id, row.index): row.value for row in table.rows()}
    for number in range(len(store.shards)):
        for image in store.images(number):
            (folder / "images" / image.path.name).write_bytes(image.path.read_bytes())
    for prompt in store.prompts:
        names = [f"images/{prompt.id}-{index:03d}.png" for index in range(store.sizes[prompt.id])]
        scores = [values[prompt.id, index] for index in range(len(names))]
        rows.append({"prompt": prompt.prompt, "target": prompt.target, "images": names, "scores": scores})
    return rows


def pairs_of(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The best and the worst image of each group that has different scores."""
    rows = []
    for group in groups:
        order = sorted(range(len(group["scores"])), key=group["scores"].__getitem__)
        if group["scores"][order[0]] < group["scores"][order[-1]]:
            names = group["images"]
            rows.append({"prompt": group["prompt"], "chosen": names[order[-1]], "rejected": names[order[0]]})
    return rows


def rankings_of(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each group with ranks instead of scores; equal scores have equal ranks."""
    return [
        {
            "prompt": group["prompt"],
            "images": group["images"],
            "ranks": [1 + sum(other > score for other in group["scores"]) for score in group["scores"]],
        }
        for group in groups
    ]


def roundtrip(out: Path) -> list[dict[str, Any]]:
    """Train on the images of a store, and on the same images after export and import."""
    count = f"prompts.train.count={PROMPTS}"
    gdro(out, "score", "--recipe", "ocr-fast", "--set", count)
    table, _ = make_scored_store(Session(load_recipe("ocr-fast", overrides=[count]), out))
    groups = groups_of(table, out / "data")
    scores = write_table(out / "data" / "scores.jsonl", groups)
    pairs = write_table(out / "data" / "pairs.jsonl", pairs_of(groups))
    rankings = write_table(out / "data" / "rankings.jsonl", rankings_of(groups))
    gdro(out, "import", str(scores), "--recipe", "own-scores")
    gdro(out, "import", str(pairs), "--recipe", "own-pairs")
    gdro(out, "import", str(rankings), "--recipe", "ocr-rank", "--name", "rankings")
    original = {"prompts__train__count": str(PROMPTS)}
    gentle = {**original, "method__beta": "12", "method__gamma": "1"}  # as own-scores and own-pairs
    ranked = {"prompts__train__imported": "rankings", "train__scores": "rank_score"}
    return [
        train(out, "GDRO, original store", "ocr-fast", **gentle),
        train(out, "GDRO, imported scores", "own-scores"),
        train(out, "DPO, original store", "ocr-dpo", **gentle, train__lr="6e-4"),
        train(out, "DPO, imported pairs", "own-pairs"),
        train(out, "rank, original store", "ocr-rank", **original),
        train(out, "rank, imported rankings", "ocr-rank", **ranked),
    ]


def foreign_groups(folder: Path) -> list[dict[str, Any]]:
    """Signs of the embedded world, drawn and not sampled: for each prompt some with right and some with wrong letters.

    The score is the OCR reward of the letters that were drawn.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    recipe = load_recipe("ocr-fast", overrides=[f"prompts.train.count={PROMPTS}"])
    for prompt in Session(recipe, folder).prompts("train").records:
        target = prompt.target or ""
        rng = np.random.default_rng(seed_for(0, "foreign", prompt.id))
        colour = next(name for name in COLOURS if f" {name} " in prompt.prompt)
        background = next(name for name in BACKGROUNDS if f" {name} " in prompt.prompt)
        names, scores = [], []
        for index in range(SIGNS):
            letters = list(target)
            for place in rng.choice(len(letters), size=index % 4, replace=False):  # 0 to 3 wrong letters
                letters[place] = str(rng.choice([letter for letter in ALPHABET if letter != letters[place]]))
            text = "".join(letters)
            drawing = draw_sign(text, colour=colour, background=background, rng=rng)
            name = f"images/{prompt.id}-{index}.png"
            drawing.image.save(folder / name)
            names.append(name)
            scores.append(ocr_reward(target, text))
        rows.append({"prompt": prompt.prompt, "target": target, "images": names, "scores": scores})
    return rows


def foreign(out: Path) -> list[dict[str, Any]]:
    """Train on images that the model did not make."""
    groups = foreign_groups(out / "drawn")
    scores = write_table(out / "drawn" / "scores.jsonl", groups)
    best = [{"prompt": row["prompt"], "image": row["images"][0]} for row in groups]  # the first has no wrong letter
    demonstrations = write_table(out / "drawn" / "demonstrations.jsonl", best)
    gdro(out, "import", str(scores), "--recipe", "own-scores", "--name", "drawn")
    gdro(out, "import", str(demonstrations), "--recipe", "own-demonstrations")
    drawn = {"prompts__train__imported": "drawn"}
    return [
        train(out, "GDRO", "own-scores", **drawn),
        train(out, "GDRO, rewards shuffled", "own-scores", **drawn, train__shuffle_rewards="true"),
        train(out, "sft on the best of each group", "own-scores", **drawn, method__name="sft", method__k="6"),
        train(out, "sft on demonstrations", "own-demonstrations"),
    ]


def show(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print a row per training."""
    for row in rows:
        print(row["training"])
        for name in ("reward", "corrected"):
            if name in row:
                base, trained, gain = (row[name][part] for part in ("base", "trained", "difference"))
                interval = f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"
                print(f"  {name}: {base['mean']:.3f} -> {trained['mean']:.3f}, {gain['mean']:+.3f} {interval}")


def bare_loop(folder: Path, model: FlowModel, size: tuple[int, int], batch: int) -> float:
    """Seconds to read, fit and encode all images in one thread and to encode all prompts, and nothing else."""
    (height, width), data = size, read_own_data(folder)
    images = [image for group in data.groups for image in group.images]
    start, kept = time.perf_counter(), []
    for first in range(0, len(images), batch):
        pictures = [open_image(image.source.read()) for image in images[first : first + batch]]
        fitted = [fit(picture, height=height, width=width, how="crop") for picture in pictures]
        kept.append(model.encode_images(to_pixels(fitted)))
    for first in range(0, len(data.groups), batch):
        model.encode([group.record.prompt for group in data.groups[first : first + batch]])
    return time.perf_counter() - start


def photos(out: Path, count: int, size: tuple[int, int] = (96, 80)) -> Path:
    """``count`` JPEG files of this width and height, in pairs."""
    folder = out / f"photos-{count}-{size[0]}x{size[1]}"
    if not folder.exists():
        (folder / "images").mkdir(parents=True)
        rng, rows = np.random.default_rng(0), []
        for number in range(count // 2):
            names = [f"images/{number:06d}-{side}.jpg" for side in "ab"]
            drawing = draw_sign("SIGN", colour="red", background=sorted(BACKGROUNDS)[0], rng=rng)
            for name in names:
                drawing.image.resize(size).save(folder / name, quality=90)
            rows.append({"prompt": f"photo {number}", "chosen": names[0], "rejected": names[1]})
        write_table(folder / "data.jsonl", rows)
    return folder


def speed(out: Path, count: int) -> None:
    """Import pairs, and do the same work in a bare loop, alternating; then the peak memory of a fifth and of all.

    Small files, for which everything beside decoding and encoding counts most, and a fifth as many larger ones.
    """
    recipe = load_recipe("own-pairs")
    model = open_model(recipe)
    bare_loop(photos(out, 64), model, Session(recipe, out, model=model).image_size, 32)  # loads the encoders
    for folder in (photos(out, count), photos(out, count // 5, (640, 480))):
        for attempt in range(3):
            session = Session(recipe, out, model=model)
            bare = bare_loop(folder, model, session.image_size, recipe.sample.batch_size)
            start = time.perf_counter()
            import_data.run(session, import_data.Import(folder, f"{folder.name}-{attempt}-{os.getpid()}"))
            whole = time.perf_counter() - start
            print(f"{folder.name}: bare loop {bare:.1f} s, import {whole:.1f} s, ratio {bare / whole:.2f}", flush=True)
    for part in (count // 5, count):
        name = f"memory-{part}-{os.getpid()}"
        gdro(out, "import", str(photos(out, part)), "--recipe", "own-pairs", "--name", name)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        print(f"{part} images: peak memory {peak:.2f} GB", flush=True)


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["roundtrip", "foreign", "speed"])
    parser.add_argument("out", type=Path)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    options = parser.parse_args()
    if options.what == "speed":
        speed(options.out, options.count)
    else:
        show(roundtrip(options.out) if options.what == "roundtrip" else foreign(options.out))


if __name__ == "__main__":
    main()
