"""Options and arguments of the commands, and their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gdro_cli.files import at_home


def path_at_home(text: str | Path) -> Path:
    """A path as the user wrote it, whose ``~`` the shell has left (``--out=~/x``)."""
    return Path(at_home(text))


FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", parser=path_at_home, help="A new folder; the recipe gets its name.")
]
ModelOption = Annotated[
    str,
    typer.Option("--model", metavar="NAME|PATH", help="tiny, flux, sd35, a diffusers folder, or a Hub id."),
]
RewardOption = Annotated[str, typer.Option("--reward", metavar="NAME", help="A reward (gdro rewards lists them).")]
FormOption = Annotated[
    Literal["scores", "pairs", "demonstrations"] | None,
    typer.Option("--data", help="Train on images of your own that come in this form."),
]
RecipeOption = Annotated[
    str,
    typer.Option("--recipe", metavar="NAME|PATH", help="A recipe file, or a shipped recipe (see gdro recipes)."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe; may be repeated."),
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", parser=path_at_home, help="Folder of stores and runs.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Report what would run, and run nothing.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ProcessesOption = Annotated[
    int, typer.Option("--num-processes", metavar="N", min=1, help="Processes on this machine, one per GPU.")
]
DataArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", parser=path_at_home, help="A table (.jsonl, .json, .parquet) or a folder: see docs/own-data.md."
    ),
]
DataNameOption = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="What recipes call the data. Default: the file's name.")
]
FitOption = Annotated[
    Literal["crop", "pad", "stretch"], typer.Option("--resize", help="How images are brought to the recipe's size.")
]
KeepImagesOption = Annotated[
    bool, typer.Option("--keep-images", help="Keep the images beside their latents, for gdro score.")
]
ScoresNameOption = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="What recipes call the imported scores (train.scores).")
]
ListImagesOption = Annotated[
    Path | None,
    typer.Option(
        "--export", metavar="FILE", parser=path_at_home, help="List the stored images for another scorer instead."
    ),
]
ImportScoresOption = Annotated[
    Path | None,
    typer.Option("--import", metavar="FILE", parser=path_at_home, help="Bring the scores of another scorer instead."),
]
ImagesOption = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        parser=path_at_home,
        help="Score these images instead (NNNNN/metadata.jsonl, samples/).",
    ),
]
RunsArgument = Annotated[
    list[str],
    typer.Argument(metavar="RUN", parser=at_home, help="Evaluated runs: their folders, or their names."),
]
EvaluatedRunArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN", parser=at_home, help="A finished run: its folder, or its name. Default: the run of the recipe."
    ),
]
AtRewardOption = Annotated[
    float | None,
    typer.Option(
        "--at-reward", metavar="R", help="Compare at this validation reward. Default: the lowest of the runs' highest."
    ),
]
ExportOption = Annotated[
    Path | None,
    typer.Option(
        "--export",
        metavar="DIR",
        parser=path_at_home,
        help="Also write both models' images to DIR, in GenEval's layout.",
    ),
]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("--param", metavar="KEY", help="Key of the recipe to sweep, or its short name; two make a grid."),
]
ValuesOption = Annotated[
    list[str] | None,
    typer.Option("--values", metavar="A,B,...", help="Its values, once per --param. Default: those of the recipe."),
]
SeedsOption = Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Trainings of each setting.")]
JobsOption = Annotated[
    int, typer.Option("--jobs", metavar="N", min=1, help="Trainings at a time, one per GPU (or sharing the CPU).")
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", parser=at_home, help="A finished run: its folder, or its name.")
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter", metavar="DIR", parser=path_at_home, help="Write the adapter to DIR, with model card and recipe."
    ),
]
FormatOption = Annotated[
    Literal["diffusers", "peft", "comfyui", "kohya"],
    typer.Option("--format", help="The tool that the adapter is for; docs/export.md says what each one reads."),
]
MergeOption = Annotated[
    Path | None,
    typer.Option(
        "--merge",
        metavar="DIR",
        parser=path_at_home,
        help="Write a complete pipeline to DIR, with the adapter merged in.",
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option("--push", metavar="OWNER/NAME", help="Upload the export to the Hugging Face Hub, with your token."),
]
PublicOption = Annotated[bool, typer.Option("--public", help="Push to a public repository.")]
ShellArgument = Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Serve a page of the run to a browser on this machine.")]
WorkerOption = Annotated[bool, typer.Option("--worker", hidden=True)]

DEFAULT_RECIPE = "ocr"
ABLATION_RECIPE = "ocr-ablation"
DEFAULT_OUT = Path("gdro-out")
