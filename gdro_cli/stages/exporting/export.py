"""``gdro export``: a run's adapter, or the model with it merged in, as a folder that others can load, or on the Hub.

An adapter folder is the run's adapter, in the format of one tool, with its card and recipe. A merged folder is the base
pipeline with the adapter in its transformer. Both appear whole or not at all.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gdro_cli.data.imagefolder import refuse_used
from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import Interrupted, PrerequisiteError, UserError
from gdro_cli.files import new_folder, storage_errors
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.lora_files import AdapterFile, Format, adapter_file, read_adapter
from gdro_cli.models.merge import Merged, merge_into
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.exporting import hub
from gdro_cli.stages.reporting.model_card import CARD, EXPORTED_GRID, EXPORTED_RECIPE, CardFolder, card
from gdro_cli.stages.reporting.redaction import recipe_yaml
from gdro_cli.stages.runs.finished_run import FinishedRun, open_finished
from gdro_cli.stages.runs.identity import run_named
from gdro_cli.stages.setup.model import EMBEDDED


@dataclass(frozen=True, slots=True)
class Export:
    """What to export."""

    run: str
    """A run's folder, or its name in the workspace."""
    adapter: Path | None = None
    merge: Path | None = None
    push: str | None = None
    """Repository of the Hub."""
    public: bool = False
    format: Format = "diffusers"
    """Of the adapter."""

    def check(self) -> None:
        """Raise UserError for options that contradict each other, before any work."""
        if self.adapter is None and self.merge is None and self.push is None:
            raise UserError("say what to export: --adapter DIR, --merge DIR or --push OWNER/NAME")
        if self.adapter is not None and self.merge is not None and self.push is not None:
            raise UserError("--push uploads one folder: give --adapter or --merge with it, not both")
        if self.public and self.push is None:
            raise UserError("--public says who may see what is pushed: it goes with --push OWNER/NAME")
        if self.format != "diffusers" and self.adapter is None and self.merge is not None:
            raise UserError("--format is that of an adapter: it goes with --adapter DIR, not with --merge")
        for folder in (self.adapter, self.merge):
            if folder is not None:
                refuse_used(folder, what="export")
                if folder.resolve() == Path.cwd():
                    raise UserError(f"{folder} is the folder that you are in, which cannot be replaced: name a new one")
        if self.adapter is not None and self.merge is not None:
            one, other = self.adapter.resolve(), self.merge.resolve()
            if one == other:
                raise UserError("--adapter and --merge name the same folder: name two")
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise UserError("--adapter and --merge name one folder inside the other: name two beside each other")
        if self.push is not None:
            hub.check_name(self.push)


def describe(export: Export, workspace: Path) -> list[tuple[str, str]]:
    """What would be written and uploaded, as (what, how much). Makes, fetches and sends nothing.

    Raises:
        UserError, PrerequisiteError, StoreError: as ``run``, except for errors of the upload.
    """
    export.check()
    run = open_finished(run_named(export.run, workspace))
    rows = [("run", run.name), ("adapter", str(run.weights)), ("base model", str(run.model["path"]))]
    beside = [CARD, EXPORTED_RECIPE, *([EXPORTED_GRID] if _grid(run) else [])]
    if export.merge is not None:
        base = _base(run)
        what = "all files of the base model, its transformer changed" if base.on_hub else _size_text(base.files())
        rows.append((f"into {export.merge}", f"{what}; {', '.join(beside)}"))
    pushed = "the merged model"
    if export.adapter is not None or export.merge is None:
        file = _converted(run, export.format)
        size = f"{file.size / 1e6:.1f} MB"
        pushed = f"{file.name}, {', '.join(beside)}"
    if export.adapter is not None:
        rows.append((f"into {export.adapter}", f"{file.name} for {export.format}, {size}; {', '.join(beside)}"))
    if export.push is not None:
        rows.append((f"to {export.push}", f"{pushed}; {'public' if export.public else 'private'}"))
        rows.append(("token", "found" if hub.has_token() else "none: `hf auth login`, or HF_TOKEN"))
    return rows


def _size_text(files: dict[str, Path]) -> str:
    size = sum(path.stat().st_size for path in files.values())
    return f"{len(files)} file{'s' if len(files) > 1 else ''}, {size / 1e6:.1f} MB"


def run(export: Export, workspace: Path, reporter: Reporter) -> dict[str, str]:
    """Export a finished run; returns what the command line shows.

    Raises:
        UserError: options contradict each other, a folder is not empty, or the format cannot hold the adapter.
        PrerequisiteError: the run is not finished, the base model is missing or has changed, or the Hub cannot be used.
        StoreError: a file is damaged, or the disk refuses.
        Interrupted: stopped by the user; an unfinished folder is removed.
    """
    export.check()
    with StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        return _run(export, workspace, reporter, stop)


def _run(export: Export, workspace: Path, reporter: Reporter, stop: StopFlag) -> dict[str, str]:
    finished = open_finished(run_named(export.run, workspace))
    nothing = "stopped before anything was exported: run the command again"
    with_adapter = export.adapter is not None or export.merge is None
    file = _converted(finished, export.format) if with_adapter else None  # may refuse, so before anything is made
    if export.push is not None:
        with _ending_at_once(stop, nothing):
            hub.check_login()
            is_public = hub.make_repository(export.push, public=export.public)
    rows = {"run": finished.name, "adapter": str(finished.weights)}
    with _folder_to_push(export) as pushed:
        if file is not None:
            stop.check(nothing)
            _write_adapter(finished, file, export.adapter or pushed, name=export.push)
        if export.merge is not None:
            again = f"run the command again{'' if export.adapter is None else ' without --adapter, which is done'}"
            stopped = f"stopped while merging, and nothing of {export.merge} is left: {again}"
            reporter.say("merging the adapter into a copy of the base model")
            merged = _write_merged(finished, export.merge, name=export.push, stop=stop, stopped=stopped)
            rows["merged"] = f"{merged.layers} layers; {100 * merged.rounding:.2g} % of the update is rounded away"
        written = [str(folder) for folder in (export.adapter, export.merge) if folder is not None]
        rows |= {"folder": ", ".join(written)} if written else {}
        if export.push is not None:
            reporter.say(f"uploading to {export.push}")
            again = _upload_again(export)
            with _ending_at_once(stop, f"stopped before all was uploaded to {export.push}: {again}"):
                rows["repository"] = hub.upload(
                    pushed, export.push, message=f"{finished.name}, by gdro_cli", again=again
                )
            rows["visible to"] = "all" if is_public else "you (private)"
    return rows


def _upload_again(export: Export) -> str:
    """What to do after a failed upload: the exported folder exists by then, and the same command would refuse it."""
    kept = export.merge or export.adapter
    return (
        "run the command again" if kept is None else f"continue with `hf upload {export.push} {kept}`: {kept} is whole"
    )


@contextmanager
def _ending_at_once(stop: StopFlag, message: str) -> Iterator[None]:
    """For long work that leaves nothing half made, such as a transfer: the first signal ends it, with this message.

    Raises:
        Interrupted: a stop was requested, here or before.
    """

    def interrupt() -> None:
        raise KeyboardInterrupt

    stop.check(message)
    try:
        with StopFlag(on_request=interrupt) as at_once:
            at_once.check(message)
            yield
    except KeyboardInterrupt as error:
        raise Interrupted(message) from error


@contextmanager
def _folder_to_push(export: Export) -> Iterator[Path]:
    """The exported folder that is uploaded; a temporary one where the user keeps none."""
    kept = export.merge or export.adapter
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="gdro-") as folder:
        yield Path(folder) / "adapter"


def _converted(finished: FinishedRun, format: Format) -> AdapterFile:
    adapter = read_adapter(finished.adapter_file)
    return adapter_file(adapter, format, family=finished.model["family"], stem=finished.name)


def _write_adapter(finished: FinishedRun, file: AdapterFile, folder: Path, *, name: str | None) -> None:
    with new_folder(folder.resolve()) as partial:
        file.write(partial)
        _write_description(finished, partial, CardFolder("adapter", name, format=file.format, file=file.name))


def _write_merged(finished: FinishedRun, folder: Path, *, name: str | None, stop: StopFlag, stopped: str) -> Merged:
    with _ending_at_once(stop, stopped):  # may fetch the model, and reads all of it
        base = _base(finished)
        base.own_files()
        base.identity  # noqa: B018 (cached from now on)
    if any(finished.model.get(key) != value for key, value in base.identity.items() if key != "path"):
        raise PrerequisiteError(
            f"the model {base.path} is not the one that the run {finished.name} was trained on: its files have changed;"
            " put the old ones back, or export with --adapter"
        )
    with new_folder(folder.resolve()) as partial:
        adapter = read_adapter(finished.adapter_file)
        merged = merge_into(base, adapter, partial, check=lambda: stop.check(stopped))
        _write_description(finished, partial, CardFolder("merged", name, rounding=merged.rounding))
    return merged


def _base(finished: FinishedRun) -> PipelineFolder:
    path = finished.recipe.model.path
    return PipelineFolder(tiny_model_path() if path == EMBEDDED else path)


def _grid(finished: FinishedRun) -> Path | None:
    """The evaluation's image grid, if there is one."""
    return None if finished.grid is None else finished.folder.path / finished.grid


def _write_description(finished: FinishedRun, folder: Path, card_folder: CardFolder) -> None:
    """Write the card, the recipe and the image grid."""
    grid = _grid(finished)
    with storage_errors(folder):
        (folder / CARD).write_bytes(card(finished, card_folder))
        (folder / EXPORTED_RECIPE).write_text(recipe_yaml(finished.recipe), encoding="utf-8")
        if grid is not None:
            shutil.copyfile(grid, folder / EXPORTED_GRID)
