"""A diffusers pipeline folder, on disk or on the Hugging Face Hub, opened one component at a time.

``model_index.json`` names the class of each component and the library it comes from. Components of diffusers and
transformers are loaded, and those of modules inside ``gdro_cli``; any other library is refused, so that a downloaded
folder can never choose code to run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.files import sha256_file

_INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")
_OWN = "gdro_cli."
_COMPONENT = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ASKS_FOR_CODE = re.compile(r"Auto[A-Z]\w*|\w*Pipeline\w*", re.ASCII)
"""Classes that open whatever class a file names, also one whose code lies in the folder."""
_ATTENTION = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""What a configuration may name as an implementation. Other names are kernels, which are code from the Hub."""
_LICENSED = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.2-klein-9B", "stabilityai/stable-diffusion-3")
"""Repositories whose files the Hub gives out after their licence has been accepted; the beginnings of their ids."""
_HASH_THREADS = 4
_LICENCES = ("licen", "notice", "use_policy")


class PipelineFolder:
    """The components of one pipeline.

    Args:
        path: a folder that holds ``model_index.json``, or a Hub id such as ``black-forest-labs/FLUX.1-dev``.
        fetch: whether files of the Hub that are not in its cache may be fetched.

    Raises:
        PrerequisiteError: the folder or the Hub repository cannot be read.
    """

    def __init__(self, path: str | Path, *, fetch: bool = True) -> None:
        self.path = str(path)
        self._may_fetch = fetch
        folder = Path(path).expanduser()
        self._repo: str | None = None
        self._commit: str | None = None
        if folder.is_dir():
            self._root = folder
        elif _HUB_ID.fullmatch(self.path):
            self._repo = self.path
            self._root = self._fetch([_INDEX])
            self._commit = self._root.name
        else:
            raise PrerequisiteError(
                f"model folder {self.path} does not exist: set model.path to a folder with {_INDEX} (such as "
                "`hf download OWNER/NAME --local-dir FOLDER` makes), to a Hub id like OWNER/NAME, or to tiny"
            )
        self._index = _read_json(self._root / _INDEX, what=f"model {self.path}")

    @property
    def pipeline(self) -> str:
        """Class name of the pipeline, e.g. ``FluxPipeline``."""
        return str(self._index.get("_class_name", ""))

    @property
    def components(self) -> dict[str, str]:
        """Component name -> class name, without the absent ones."""
        return {name: entry[1] for name, entry in self._entries()}

    def setting(self, name: str) -> Any:
        """A plain value that the pipeline keeps beside its components, such as ``is_distilled``; None if absent."""
        return self._index.get(name)

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        """Read a component's configuration without loading the component.

        Raises:
            PrerequisiteError: the file is missing or broken.
            UserError: it asks for kernels from elsewhere.
        """
        if self._repo is not None:
            self._fetch([f"{name}/{file}"])
        found = _read_json(self._root / name / file, what=f"component {name} of model {self.path}")
        foreign = next((kernel for kernel in _implementations(found) if kernel not in _ATTENTION), None)
        if foreign is not None:
            raise UserError(
                f"{file} of component {name} of model {self.path} names the implementation {foreign[:60]!r}, "
                f"but only {', '.join(_ATTENTION)} are used: take that entry out of the file"
            )
        return found

    def load(self, name: str, *, dtype: torch.dtype | None = None, quantization: Any = None) -> Any:
        """Load a component by the class that ``model_index.json`` names.

        Args:
            name: component name, e.g. ``"transformer"``.
            dtype: of the weights; None for components without weights (tokenizers, schedulers).
            quantization: a quantization config of diffusers, where the weights are to be stored in fewer bits.

        Raises:
            PrerequisiteError: the component is absent, incomplete or broken.
            UserError: its class comes from a library that is not loaded, or is of another kind of component.
        """
        from safetensors import SafetensorError

        cls = self.component_class(name)
        if issubclass(cls, nn.Module) != (dtype is not None):
            kinds = ("a network", "no network") if dtype is None else ("no network", "a network")
            raise UserError(
                f"model {self.path} names {cls.__name__} for {name}, which is {kinds[0]}, but {name} must be "
                f"{kinds[1]}: fetch the pipeline folder again"
            )
        if self._repo is not None:
            self._fetch([f"{name}/*"])
        # weights come as safetensors or not at all: the libraries would also read pickles that lie beside them
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype, "use_safetensors": True}
        if self._from_transformers(name):
            options |= dict(trust_remote_code=False)  # else they ask on standard input
            if dtype is not None:
                self.config(name)
        if quantization is not None:
            options["quantization_config"] = quantization
        try:
            with _quietly():
                return cls.from_pretrained(str(self._root / name), local_files_only=True, **options)
        except (OSError, ValueError, ImportError, RecursionError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PrerequisiteError(
                f"component {name} of model {self.path} cannot be loaded ({reason}): fetch the folder again"
            ) from error

    def files(self) -> dict[str, Path]:
        """The index and every file of every component, fetched where needed: relative name -> file.

        Raises:
            PrerequisiteError: files of a Hub repository cannot be fetched.
        """
        if self._repo is not None:
            self._fetch([f"{name}/*" for name, _ in self._entries()])
        found = {_INDEX: self._root / _INDEX}
        for name, _ in self._entries():
            there = (f for f in (self._root / name).rglob("*") if f.is_file() and not f.name.startswith("."))
            found |= {f.relative_to(self._root).as_posix(): f for f in there}
        return found

    def own_files(self) -> dict[str, Path]:
        """``files`` and ``licence_files``, all of which lie in the folder itself: to be given away with a copy of it.

        Raises:
            PrerequisiteError: one is a link that leads out of the folder, or cannot be fetched.
        """
        # in the Hub's cache a snapshot's files are links to the blobs beside it
        snapshot = self._root.resolve()
        cached = snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--")
        inside = snapshot.parent.parent if cached else snapshot
        found = {**self.files(), **self.licence_files()}
        for name, path in found.items():
            if not path.resolve().is_relative_to(inside):
                raise PrerequisiteError(
                    f"{name} of model {self.path} is a link that leads out of the folder: put the file itself there, "
                    "or fetch the pipeline folder again"
                )
        return found

    def licence_files(self) -> dict[str, Path]:
        """Licences and notices that lie beside the index, fetched where needed: name -> file."""
        if self._repo is not None:
            self._fetch(["LICENSE*", "NOTICE*"])
        beside = (f for f in self._root.iterdir() if f.is_file())
        return {f.name: f for f in beside if f.name.lower().startswith(_LICENCES)}

    @property
    def on_hub(self) -> bool:
        """Whether the files come from the Hub and not from a folder of the user's."""
        return self._repo is not None

    def component_class(self, name: str) -> Any:
        """Find the class of a component.

        Raises:
            PrerequisiteError: the pipeline has no such component, or the installed library no such class.
            UserError: the class comes from a library that is not loaded, or would choose another one by itself.
        """
        entry = dict(self._entries()).get(name)
        if entry is None:
            raise PrerequisiteError(f"model {self.path} has no component {name}: fetch the whole pipeline folder")
        library, class_name = entry
        if library not in _LIBRARIES and not library.startswith(_OWN):
            raise UserError(
                f"model {self.path} names {library}.{class_name} for {name}, "
                "but only classes of diffusers, transformers and gdro_cli are loaded"
            )
        if _ASKS_FOR_CODE.fullmatch(class_name):
            raise UserError(
                f"model {self.path} names {library}.{class_name} for {name}, which can run code of the folder: "
                f"name the component's own class in {_INDEX}"
            )
        try:
            cls = getattr(importlib.import_module(library), class_name)
            cls.from_pretrained  # noqa: B018 (whether there is one)
            if not isinstance(cls, type):
                raise AttributeError(class_name)
            return cls
        except (ImportError, AttributeError) as error:
            raise PrerequisiteError(
                f"model {self.path} needs {library}.{class_name} for {name}, which the installed {library} lacks: "
                "upgrade it"
            ) from error

    @functools.cached_property
    def identity(self) -> dict[str, str | dict[str, str]]:
        """Path, pipeline and component classes, and ``digest`` (local) or ``commit`` (Hub). Reads every file once."""
        what: dict[str, str | dict[str, str]] = {
            "path": self.path,
            "pipeline": self.pipeline,
            "components": self.components,
        }
        if self._commit is not None:
            return {**what, "commit": self._commit}
        return {**what, "digest": self._digest()}

    def _digest(self) -> str:
        """SHA-256 over (relative name, SHA-256 of the bytes) of the index and of every component's files."""
        files = self.files()
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            sums = list(pool.map(sha256_file, files.values()))
        lines = sorted(f"{name} {digest}\n" for name, digest in zip(files, sums, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _from_transformers(self, name: str) -> bool:
        return dict(self._entries())[name][0] == "transformers"

    def _entries(self) -> Iterator[tuple[str, tuple[str, str]]]:
        for name, value in self._index.items():
            if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
                if not _COMPONENT.fullmatch(name):
                    raise PrerequisiteError(
                        f"model {self.path} names a component {name[:40]!r}, which is no folder of it: fetch the"
                        " pipeline folder again"
                    )
                yield name, (value[0], value[1])

    def _fetch(self, patterns: Sequence[str]) -> Path:
        """Fetch files of the Hub repository into its cache, or take them from there; returns the snapshot folder."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError

        repo = str(self._repo)
        terms = f"accept its licence at https://huggingface.co/{repo} and log in with `hf auth login`"
        local = f"or put it anywhere with `hf download {repo} --local-dir FOLDER` and set model.path=FOLDER"
        try:
            return Path(
                snapshot_download(
                    repo,
                    revision=self._commit,
                    allow_patterns=list(patterns),
                    ignore_patterns=["*.bin", "*.msgpack"],
                    local_files_only=not self._may_fetch,
                )
            )
        except GatedRepoError as error:
            raise PrerequisiteError(
                f"model {repo} is given out under a licence: {terms}, then run the command again, {local}"
            ) from error
        except (OSError, EntryNotFoundError, HFValidationError) as error:
            first = f"{terms}, then" if repo.startswith(_LICENSED) else "with a connection,"
            raise PrerequisiteError(
                f"model {repo} is neither a folder here nor could {', '.join(patterns)} be fetched from the Hugging "
                f"Face Hub ({type(error).__name__}): {first} fetch it with `hf download {repo}`, {local}"
            ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from drawing bars, which break up our own, and from asking whether code may be run."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    bars, patience = logging.is_progress_bar_enabled(), dynamic_module_utils.TIME_OUT_REMOTE_CODE
    logging.disable_progress_bar()
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds to wait for a yes: some classes open others by themselves
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience
        if bars:
            logging.enable_progress_bar()


def _implementations(config: dict[str, Any]) -> Iterator[str]:
    """Every name, at any depth, under a key such as ``attn_implementation``."""
    waiting: list[tuple[Any, bool]] = [(config, False)]
    while waiting:
        value, named = waiting.pop()
        if isinstance(value, dict):
            waiting += [(part, named or "_implementation" in key) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(part, named) for part in value]
        elif named and isinstance(value, str):
            yield value


def _read_json(path: Path, *, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise PrerequisiteError(f"{what}: {path} {reason}: fetch the pipeline folder again") from error
    if not isinstance(value, dict):
        raise PrerequisiteError(f"{what}: {path} is not a JSON object: fetch the pipeline folder again")
    return value
