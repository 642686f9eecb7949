"""Where a model's files come from: a local folder, or a repository of the Hugging Face Hub.

Weights must be safetensors. Pickles are neither fetched nor read, and no code of a model runs.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2

from gdro_cli.errors import PrerequisiteError, StoreError
from gdro_cli.files import at_home, cache_folder, json_bytes, parse_json, sha256, sha256_file, write_bytes
from gdro_cli.network import check_hub, hub_cache

WEIGHTS = "*.safetensors"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NEVER_FETCHED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.py"]
_LICENSED = (
    "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-klein-9B",
    "stabilityai/stable-diffusion-3",
)  # fmt: skip
"""Prefixes of the ids of repositories whose licence the user must accept before the Hub serves their files."""
_HASH_THREADS = 4
_REMEMBERED_FROM = 2**27
"""Bytes from which a file's SHA-256 is remembered; a smaller file is read in a tenth of a second."""
_CLOCK_TICK = 2 * 10**9
"""Nanoseconds; the coarsest times of files that are in use."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATIENCE = 10.0
"""Seconds for the Hub's first answer; the Hub's client waits for as long as the operating system does."""
_silent_hubs: dict[str, Exception | None] = {}
"""Address of a Hub that was asked by this process -> why it does not answer; None if it does."""
_NUMBER = re.compile(r"\d+")
_VARIANT = re.compile(r"(?:diffusion_pytorch_)?model\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors")
_LOGGING = ("diffusers.utils.logging", "transformers.utils.logging")


class ModelSource:
    """The files of one model. The constructor reads and fetches nothing.

    Args:
        name: a local folder, or a Hub id such as ``black-forest-labs/FLUX.1-dev``.
        key: the recipe key that names the model, for messages.
        fetch: whether files that are not in the Hub's cache may be fetched.

    Raises:
        PrerequisiteError: the name is neither an existing folder nor a Hub id.
        UserError: it is in a home folder that is not known.
    """

    def __init__(self, name: str | Path, *, key: str, fetch: bool = True) -> None:
        self.name, self.key = str(name), key
        self.folder = Path(at_home(self.name, key=key))
        """Where the files are; for a Hub model only after ``get`` or ``in_cache``."""
        self.on_hub = not self.folder.is_dir()
        self.commit: str | None = None
        """Commit of a Hub model, known after the first file; all later files are of this commit."""
        self._may_fetch = fetch
        if self.folder.is_file():
            raise PrerequisiteError(f"{key} names the file {self.name}: set it to the model's folder, or to a Hub id")
        if self.on_hub and not _HUB_ID.fullmatch(self.name):
            raise PrerequisiteError(
                f"the model folder {self.name} does not exist: set {key} to a folder (such as `hf download OWNER/NAME "
                f"--local-dir FOLDER` makes), or to a Hub id like OWNER/NAME{self._page}"
            )

    @property
    def remedy(self) -> str:
        """What the user can do about a missing or broken file."""
        if self.on_hub:
            return f"run `hf download {self.name}` again, or set {self.key} to a local folder{self._page}"
        return "fetch the whole folder again"

    @property
    def _page(self) -> str:
        page = "rewards.md" if self.key.startswith(("reward", "judge")) else "models.md#fetching-weights"
        return f" (docs/{page})"

    def get(self, *patterns: str) -> Path:
        """Return the model's folder, after fetching the files of these patterns if the model is on the Hub.

        Raises:
            PrerequisiteError: they are not in the Hub's cache and cannot be fetched.
            UserError: the cache is in a home folder that is not known.
        """
        if not self.on_hub:
            return self.folder
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError

        repo = self.name
        terms = f"accept its licence at https://huggingface.co/{repo} and log in with `hf auth login`"
        local = f"or put it anywhere with `hf download {repo} --local-dir FOLDER` and set {self.key}=FOLDER{self._page}"
        try:
            return self._snapshot(patterns, offline=not self._may_fetch or self._why_silent() is not None)
        except GatedRepoError as error:
            raise PrerequisiteError(
                f"model {repo} needs an accepted licence: {terms}, then run the command again, {local}"
            ) from error
        except (OSError, EntryNotFoundError, HFValidationError, httpx2.HTTPError) as error:
            cause = (self._may_fetch and self._why_silent()) or error
            first = f"{terms}, then" if repo.startswith(_LICENSED) else "with a connection,"
            raise PrerequisiteError(
                f"model {repo} is neither a local folder nor could {', '.join(patterns)} be read from the Hugging Face "
                f"cache or fetched ({type(cause).__name__}): {first} run `hf download {repo}`, {local}"
            ) from error

    def in_cache(self, *patterns: str) -> bool:
        """Whether the Hub's cache has files for all these patterns; does not use the network."""
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = self._snapshot(patterns, offline=True)
        except (LocalEntryNotFoundError, HFValidationError):
            return False
        return all(any(folder.glob(pattern)) for pattern in patterns)

    def _why_silent(self) -> Exception | None:
        """Why the Hub does not answer; None if it does. A process asks once: each failure takes the client seconds.

        Raises:
            PrerequisiteError: a setting of the environment forbids every request.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        if constants.HF_HUB_OFFLINE:
            return OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        hub = constants.ENDPOINT
        if hub not in _silent_hubs:
            check_hub()
            try:
                HfApi().model_info(self.name, timeout=_PATIENCE)
                _silent_hubs[hub] = None
            except HFValidationError:
                return None  # nothing was asked
            except HfHubHTTPError as error:  # of this model alone, unless the Hub itself is down
                _silent_hubs[hub] = error if error.response.status_code >= 500 else None
            except (httpx2.TransportError, ValueError) as error:  # ValueError: an answer that is not the Hub's
                _silent_hubs[hub] = error
        return _silent_hubs[hub]

    def _snapshot(self, patterns: Collection[str], *, offline: bool) -> Path:
        from huggingface_hub import snapshot_download

        hub_cache()
        options: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": _NEVER_FETCHED}
        self.folder = Path(snapshot_download(self.name, revision=self.commit, local_files_only=offline, **options))
        self.commit = self.folder.name
        return self.folder

    def require(self, *patterns: str | Collection[str]) -> None:
        """Raise PrerequisiteError unless each pattern, or one of each collection of patterns, matches a file."""
        for alternatives in patterns:
            names = [alternatives] if isinstance(alternatives, str) else alternatives
            if not any(any(self.folder.glob(name)) for name in names):
                raise PrerequisiteError(f"model {self.name} has no {' or '.join(names)}: {self.remedy}")

    def version(self, *patterns: str) -> dict[str, str]:
        """Return Hub id and commit, or the digest of a local folder's files of these patterns."""
        if self.commit is not None:
            return {"model": self.name, "commit": self.commit}
        files = {file.name: file for pattern in patterns for file in self.folder.glob(pattern)}
        return {"sha256": files_digest(files)}

    def read_json(self, file: str) -> dict[str, Any]:
        """Read a JSON object from a file that ``get`` has fetched.

        Raises:
            PrerequisiteError: the file is missing or broken.
        """
        try:
            value = json.loads((self.folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise PrerequisiteError(f"{file} of model {self.name} is missing: {self.remedy}") from error
        except (OSError, ValueError) as error:
            raise PrerequisiteError(f"{file} of model {self.name} cannot be read: {self.remedy}") from error
        if not isinstance(value, dict):
            raise PrerequisiteError(f"{file} of model {self.name} is not a JSON object: {self.remedy}")
        return value

    def load(self, cls: Any, subfolder: str = "", *, dtype: Any = None, **options: Any) -> Any:
        """Load a part of the model through its class's ``from_pretrained``, from local files only.

        Args:
            cls: a class of diffusers or transformers.
            subfolder: the part's folder inside the model's.
            dtype: dtype of the weights; None for a part without weights (tokenizer, scheduler, image processor).
            options: more arguments of ``from_pretrained``.

        Raises:
            PrerequisiteError: files are missing or broken, they lack weights of a network, or they have more blocks
                of it than their configuration says. Other weights that the class does not have are ignored.
        """
        from safetensors import SafetensorError

        what = f"component {subfolder} of model {self.name}" if subfolder else f"model {self.name}"
        if dtype is not None:
            options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
            if (variant := only_variant(self.folder / subfolder)) is not None:
                options["variant"] = variant
        if cls.__module__.startswith("transformers."):
            options |= _transformers_options(network=dtype is not None)
        try:
            with quiet():
                part = cls.from_pretrained(str(self.folder / subfolder), local_files_only=True, **options)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
            raise PrerequisiteError(f"{what} cannot be loaded ({_first_sentence(error)}): {self.remedy}") from error
        if dtype is None:
            return part
        module, report = part
        # Weights that the files lack would stay random or uninitialised, and a part of the blocks is another network.
        own = {_NUMBER.sub("#", name) for name in module.state_dict()}
        problem = weights_problem(
            missing=report["missing_keys"],
            misshapen=report["mismatched_keys"],
            unexpected=[name for name in report["unexpected_keys"] if _NUMBER.sub("#", name) in own],
        )
        if problem is not None:
            raise PrerequisiteError(f"{what} {problem}: {self.remedy}")
        return module


def weights_problem(
    *, missing: Collection[str], misshapen: Iterable[tuple[str, Any, Any]] = (), unexpected: Collection[str] = ()
) -> str | None:
    """Return how a network's files differ from its class; None if they agree.

    Args:
        missing: names of the weights that the files lack.
        misshapen: (name, shape in the files, shape in the class).
        unexpected: names of the weights that the class does not have.
    """
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"lacks the weight {min(missing)}{more}"
    for name, stored, own in sorted(misshapen):
        return f"holds the weight {name} in the shape {list(stored)} instead of {list(own)}"
    return f"holds the weight {min(unexpected)}, which its class does not have" if unexpected else None


def only_variant(folder: Path) -> str | None:
    """The one variant that a component's weights have, such as ``fp16`` of ``model.fp16.safetensors``.

    None if there are weights without a variant, which diffusers and transformers take unless asked for another, or
    weights of several variants.
    """
    names = [file.name for file in folder.glob(WEIGHTS)]
    variants = {match[1] if (match := _VARIANT.fullmatch(name)) else None for name in names}
    return variants.pop() if len(variants) == 1 else None


def files_digest(files: Mapping[str, Path]) -> str:
    """Return a SHA-256 over the names and contents of files; reads those that have changed since the last time."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        sums = list(pool.map(_remembered_sha256, files.values()))
    lines = sorted(f"{name} {digest}\n" for name, digest in zip(files, sums, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _remembered_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes; that of a large one is kept in the user's cache until the file's stamp changes."""
    stamp = _stamp(path)
    if stamp["size"] < _REMEMBERED_FROM:
        return sha256_file(path)
    note = cache_folder() / "digests" / f"{sha256(str(path.resolve()).encode())[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = parse_json(note.read_bytes())
        if known["stamp"] == stamp and _SHA256.fullmatch(known["sha256"]):
            return str(known["sha256"])
    began = time.time_ns()
    digest = sha256_file(path)
    # A file that changes again within a clock tick keeps its stamp.
    if _stamp(path) == stamp and began - stamp["changed"] > _CLOCK_TICK:
        with suppress(StoreError):  # without a cache, the next command reads the file again
            write_bytes(note, json_bytes({"stamp": stamp, "sha256": digest}))
    return digest


def _stamp(path: Path) -> dict[str, int]:
    """What changes with a file's content: its size and times. ``changed`` also changes if a copy keeps the other."""
    about = path.stat()
    return {"size": about.st_size, "modified": about.st_mtime_ns, "changed": about.st_ctime_ns}


def _transformers_options(*, network: bool) -> dict[str, Any]:
    from transformers import dynamic_module_utils

    # Some classes open others without passing the option on, which would ask the user whether to run the folder's code.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    # The library reports misshapen weights by name only if it may ignore them.
    return dict(trust_remote_code=False) | (dict(ignore_mismatched_sizes=True) if network else {})


def _first_sentence(error: BaseException) -> str:
    """Return the first sentence of a library's error; the rest is advice to programmers."""
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of diffusers and transformers; ``weights_problem`` says what matters."""
    # A class's library is already imported; the other one may not be.
    libraries: list[Any] = [sys.modules[name] for name in _LOGGING if name in sys.modules]
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, (bars, verbosity) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
