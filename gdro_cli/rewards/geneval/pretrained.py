"""The files of a transformers model that a reward needs: a local folder, or a repository of the Hugging Face Hub.

A repository that is in the Hub's cache is taken from there without asking the network. Otherwise the small files
are fetched when the reward is made, and the weights when it is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.files import sha256_file
from gdro_cli.rewards.base import one_line

_CONFIG = "config.json"
_SMALL = ("*.json", "*.txt")
_WEIGHTS = "*.safetensors"
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ModelFiles:
    """One model. Making one reads ``config.json`` and loads nothing.

    Args:
        model: a folder with ``config.json`` and ``*.safetensors``, or a Hub id like ``owner/name``.
        key: the recipe's key that names the model, for error messages.
        kind: the ``model_type`` that ``config.json`` must name.
        needs: further small files; of each group of names one must be there.

    Raises:
        PrerequisiteError: the folder or its files are missing, or the repository cannot be fetched.
        UserError: it holds another kind of model.
    """

    def __init__(
        self, model: str | Path, *, key: str, kind: str, needs: Sequence[Sequence[str]] = (_PROCESSOR,)
    ) -> None:
        self.name = str(model)
        self._key = key
        self._commit: str | None = None
        folder = Path(model).expanduser()
        if folder.is_dir():
            self._root = folder
            self._check([[_CONFIG], *needs, [_WEIGHTS]])
        elif _HUB_ID.fullmatch(self.name):
            self._root = self._cached() or self._fetch(_SMALL)
            self._commit = self._root.name
            self._check([[_CONFIG], *needs])
        else:
            raise PrerequisiteError(
                f"the model folder {self.name} does not exist: set `{key}` to a folder with {_CONFIG} and {_WEIGHTS}, "
                "or to a Hub id like owner/name"
            )
        self.config = self._read_config()
        found = self.config.get("model_type")
        if found != kind:
            raise UserError(f"`{key}` names {self.name}, a model of the type {found}; it must be of the type {kind}")

    @functools.cached_property
    def version(self) -> dict[str, Any]:
        """What the model is: its Hub id and commit, or the digest of a folder's files (read once), and transformers."""
        library = {"transformers": metadata.version("transformers")}
        if self._commit is not None:
            return {"model": self.name, "commit": self._commit, **library}
        return {"sha256": self._digest(), **library}

    def load_model(self, cls: Any, *, device: str) -> Any:
        """The model of the class ``cls`` in float32, for inference, on ``device`` (see ``pick_device``).

        Raises:
            PrerequisiteError: the weights are missing, broken or not those of this model.
        """
        model, info = self._from_pretrained(
            cls,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation="sdpa" if cls._supports_sdpa else "eager",  # the files might name kernels of the Hub
        )
        # transformers would go on with random numbers for weights that the file lacks
        missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
        if missing:
            raise PrerequisiteError(
                f"the weights of the model {self.name} lack {missing[0]} and {len(missing) - 1} more: {self._remedy()}"
            )
        return model.eval().requires_grad_(False).to(pick_device(device))

    def load_part(self, cls: Any) -> Any:
        """A tokenizer or image processor of the class ``cls``. Raises ``PrerequisiteError``."""
        return self._from_pretrained(cls)

    def _from_pretrained(self, cls: Any, **options: Any) -> Any:
        from safetensors import SafetensorError

        if self._commit is not None and not any(self._root.glob(_WEIGHTS)):
            self._fetch([*_SMALL, _WEIGHTS])
        try:
            with _quiet():
                return cls.from_pretrained(str(self._root), local_files_only=True, trust_remote_code=False, **options)
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise PrerequisiteError(
                f"the model {self.name} cannot be loaded ({one_line(error)}): {self._remedy()}"
            ) from error

    def _read_config(self) -> dict[str, Any]:
        try:
            value = json.loads((self._root / _CONFIG).read_bytes().decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PrerequisiteError(f"{_CONFIG} of the model {self.name} cannot be read: {self._remedy()}") from error
        if not isinstance(value, dict):
            raise PrerequisiteError(f"{_CONFIG} of the model {self.name} is not a JSON object: {self._remedy()}")
        return value

    def _check(self, groups: Sequence[Sequence[str]]) -> None:
        for names in groups:
            if not any(any(self._root.glob(name)) for name in names):
                raise PrerequisiteError(f"the model {self.name} has no {' or '.join(names)}: {self._remedy()}")

    def _remedy(self) -> str:
        if self._commit is None:
            return "fetch the whole folder again"
        return f"run `hf download {self.name}`, or name a local folder as `{self._key}`"

    def _digest(self) -> str:
        """SHA-256 over name and SHA-256 of every file that loading may read."""
        files = sorted({file for pattern in (*_SMALL, _WEIGHTS) for file in self._root.glob(pattern)})
        lines = [f"{file.name} {sha256_file(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _cached(self) -> Path | None:
        """The repository's folder in the Hub's cache, if it is there with weights; the network is not asked."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            root = Path(snapshot_download(self.name, allow_patterns=[*_SMALL, _WEIGHTS], local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
        return root if (root / _CONFIG).is_file() and any(root.glob(_WEIGHTS)) else None

    def _fetch(self, patterns: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError

        try:
            return Path(snapshot_download(self.name, revision=self._commit, allow_patterns=list(patterns)))
        except (OSError, EntryNotFoundError, HFValidationError) as error:
            raise PrerequisiteError(
                f"the model {self.name} is neither a folder here nor in the Hugging Face cache, and could not be "
                f"fetched ({type(error).__name__}): run `hf download {self.name}` where there is a connection, or name "
                f"a local folder as `{self._key}`"
            ) from error


def pick_device(device: str) -> torch.device:
    """The device of that name; ``auto`` is ``cuda`` if there is a GPU, else ``cpu``."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and listing keys of a checkpoint that it does not use."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
