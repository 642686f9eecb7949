"""A diffusers pipeline folder, local or on the Hugging Face Hub, opened one component at a time.

``model_index.json`` names the class and library of each component. Only classes of diffusers, transformers and modules
inside ``gdro_cli`` are loaded, so a downloaded folder can never choose code to run.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.files import at_home
from gdro_cli.model_source import ModelSource, files_digest, only_variant, weights_problem
from gdro_cli.models.other_forms import INDEX, other_form

_LIBRARIES = ("diffusers", "transformers")
_OWN = "gdro_cli."
_COMPONENT = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NETWORKS = ("text_encoder", "transformer", "vae")
_ATTENTION = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""The implementations that a configuration may name. Other names are kernels, which are code from the Hub."""
_TOKENIZERS = {"PixtralProcessor": "PreTrainedTokenizerFast"}
"""A processor of texts and images, which needs torchvision -> the class that loads its tokenizer from its files."""
_WEIGHTS = "diffusion_pytorch_model"
_LICENCES = ("licen", "notice", "use_policy")


class PipelineFolder:
    """The components of one pipeline.

    Args:
        path: a folder with ``model_index.json``, or a Hub id such as ``black-forest-labs/FLUX.1-dev``.
        fetch: whether files that are not in the Hub's cache may be fetched.

    Raises:
        PrerequisiteError: the folder or the Hub repository cannot be read.
        UserError: the path is something else than a pipeline folder.
    """

    def __init__(self, path: str | Path, *, fetch: bool = True) -> None:
        self.path = str(path)
        form = other_form(Path(at_home(self.path, key="model.path")))
        if form is not None:
            raise UserError(f"model.path names {self.path}, which is {form}")
        self._source = ModelSource(path, key="model.path", fetch=fetch)
        self._source.get(INDEX)
        self._index = self._source.read_json(INDEX)
        self._checked = False

    @property
    def pipeline(self) -> str:
        """Class name of the pipeline, e.g. ``FluxPipeline``."""
        return str(self._index.get("_class_name", ""))

    @property
    def components(self) -> dict[str, str]:
        """Component name -> class name, without absent components."""
        return {name: class_name for name, (_, class_name) in self._entries.items()}

    @property
    def on_hub(self) -> bool:
        """Whether the files come from the Hub and not from the user's folder."""
        return self._source.on_hub

    def setting(self, name: str) -> Any:
        """A plain value in the pipeline's index, such as ``is_distilled``; None if absent."""
        return self._index.get(name)

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        """Read a component's configuration without loading the component.

        Raises:
            PrerequisiteError: the file is missing or broken.
            UserError: it names kernels of other origin.
        """
        self._source.get(f"{name}/{file}")
        config = self._source.read_json(f"{name}/{file}")
        foreign = next((kernel for kernel in _implementations(config) if kernel not in _ATTENTION), None)
        if foreign is not None:
            raise UserError(
                f"{file} of component {name} of model {self.path} names the implementation {foreign[:60]!r}, "
                f"but only {', '.join(_ATTENTION)} are used: take that entry out of the file"
            )
        return config

    def load(self, name: str, *, dtype: torch.dtype | None = None, quantization: Any = None) -> Any:
        """Load a component by the class that ``model_index.json`` names.

        The first load from a local folder checks all its components, so that none fails after hours of sampling.

        Args:
            name: component name, e.g. ``"transformer"``.
            dtype: dtype of the weights; None for a component without weights (tokenizer, scheduler).
            quantization: a quantization config of diffusers; None stores the weights in ``dtype``.

        Raises:
            PrerequisiteError: this or another component is absent, incomplete or broken.
            UserError: its class comes from a library that is not loaded, or is of another kind of component.
        """
        cls = self.component_class(name)
        if self.on_hub:
            self._source.get(f"{name}/*")
        elif not self._checked:
            self.check()
        if name.startswith("text_encoder"):
            self.config(name)  # refuses kernels of other origin
        options = {} if quantization is None else {"quantization_config": quantization}
        return self._source.load(cls, name, dtype=dtype, **options)

    def check(self) -> None:
        """Compare the files of all components with their classes; only names and shapes of weights are read.

        Raises:
            PrerequisiteError: a weight or a vocabulary is missing or misshapen, or a file is broken.
            UserError: as for ``load``.
        """
        for name in self.components:
            if name.startswith("tokenizer"):
                self._check_vocabulary(name)
            elif name.startswith(_NETWORKS) and not self.config(name).get("quantization_config"):
                # Quantised weights have names and shapes of the quantiser, which checks them as they load.
                self._check_weights(name)
        self._checked = True

    def _check_vocabulary(self, name: str) -> None:
        """Refuse a missing vocabulary, without which transformers silently makes a tokenizer that knows no word."""
        parts = dict(self.component_class(name).vocab_files_names)
        whole = parts.pop("tokenizer_file", "tokenizer.json")
        folder = self._source.folder / name
        needed = [whole] if (folder / whole).is_file() or not parts else parts.values()
        for file in ("tokenizer_config.json", *needed):
            if not (folder / file).is_file():
                raise self._refusal(name, f"has no {file}")

    def _check_weights(self, name: str) -> None:
        cls = self.component_class(name)
        if name.startswith("text_encoder"):
            # On the meta device the library reads no numbers, and it knows the names that its versions have changed.
            self._source.load(cls, name, dtype=torch.float32, device_map="meta")
            return
        own, stored = self.meta_component(name).state_dict(), self._stored_shapes(name)
        ignored = cls._keys_to_ignore_on_load_unexpected or ()
        problem = weights_problem(
            missing=own.keys() - stored.keys(),
            misshapen=[
                (key, shape, own[key].shape)
                for key, shape in stored.items()
                if key in own and list(own[key].shape) != shape
            ],
            unexpected=[k for k in stored.keys() - own.keys() if not any(re.search(one, k) for one in ignored)],
        )
        if problem is not None:
            raise self._refusal(name, problem)

    def _stored_shapes(self, name: str) -> dict[str, list[int]]:
        """Names and shapes in the weight files of a diffusers component, from their headers."""
        from safetensors import SafetensorError, safe_open

        shapes: dict[str, list[int]] = {}
        for file in self.weight_files(name):
            try:
                with safe_open(self._source.folder / file, "pt") as tensors:
                    shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise self._refusal(name, f"cannot be loaded ({file}: {error})") from error
        return shapes

    def _refusal(self, name: str, problem: str) -> PrerequisiteError:
        return PrerequisiteError(f"component {name} of model {self.path} {problem}: {self._source.remedy}")

    def weight_files(self, name: str) -> list[str]:
        """Return the names, relative to the folder, of the weight files of a diffusers component.

        Raises:
            PrerequisiteError: the index of sharded weights is broken.
        """
        variant = only_variant(self._source.folder / name)
        dotted = "" if variant is None else f".{variant}"
        index = f"{name}/{_WEIGHTS}.safetensors.index{dotted}.json"
        if not (self._source.folder / index).exists():
            return [f"{name}/{_WEIGHTS}{dotted}.safetensors"]
        parts = self._source.read_json(index).get("weight_map")
        if not isinstance(parts, dict):
            raise PrerequisiteError(f"{index} of model {self.path} names no files: {self._source.remedy}")
        return sorted({f"{name}/{part}" for part in parts.values()})

    def meta_component(self, name: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build a network on the meta device from its class and configuration, frozen: shapes without numbers.

        Raises:
            PrerequisiteError: class or configuration is missing.
            UserError: the class comes from a library that is not loaded.
        """
        cls = self.component_class(name)
        config = {key: value for key, value in self.config(name).items() if not key.startswith("_")}
        with torch.device("meta"):
            transformers = getattr(cls, "config_class", None)
            module: nn.Module = cls.from_config(config) if transformers is None else cls(transformers.from_dict(config))
        # torch's own method: that of diffusers warns of layers to keep in float32 that the network does not have
        return nn.Module.to(module, dtype=dtype).eval().requires_grad_(False)

    def files(self) -> dict[str, Path]:
        """Return the index and every file of every component, fetched if needed: relative name -> file.

        Raises:
            PrerequisiteError: files of a Hub repository cannot be fetched.
        """
        root = self._source.get(INDEX, *(f"{name}/*" for name in self.components))
        files = {INDEX: root / INDEX}
        for name in self.components:
            visible = (f for f in (root / name).rglob("*") if f.is_file() and not f.name.startswith("."))
            files |= {f.relative_to(root).as_posix(): f for f in visible}
        return files

    def own_files(self) -> dict[str, Path]:
        """Return ``files`` and licences, all inside the folder itself: the files of a copy to give away.

        Raises:
            PrerequisiteError: a file is a link that leads out of the folder, or cannot be fetched.
        """
        root = self._source.get("LICENSE*", "NOTICE*")
        licences = {f.name: f for f in root.iterdir() if f.is_file() and f.name.lower().startswith(_LICENCES)}
        # In the Hub's cache, the files of a snapshot are links to the blobs beside it.
        snapshot = root.resolve()
        cached = snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--")
        inside = snapshot.parent.parent if cached else snapshot
        files = {**self.files(), **licences}
        for name, path in files.items():
            if not path.resolve().is_relative_to(inside):
                raise PrerequisiteError(
                    f"{name} of model {self.path} is a link that leads out of the folder: put the file itself there, "
                    f"or {self._source.remedy}"
                )
        return files

    def component_class(self, name: str) -> Any:
        """Return the class of a component.

        Raises:
            PrerequisiteError: the pipeline has no such component, or the installed library no such class.
            UserError: the class comes from a library that is not loaded, or is of another kind of component.
        """
        if name not in self._entries:
            raise PrerequisiteError(f"model {self.path} has no component {name}: {self._source.remedy}")
        library, class_name = self._entries[name]
        class_name = _TOKENIZERS.get(class_name, class_name)
        if library not in _LIBRARIES and not library.startswith(_OWN):
            raise UserError(
                f"model {self.path} names {library}.{class_name} for {name}, "
                "but only classes of diffusers, transformers and gdro_cli are loaded"
            )
        try:
            cls = getattr(importlib.import_module(library), class_name)
        except (ImportError, AttributeError) as error:
            raise PrerequisiteError(
                f"model {self.path} needs {library}.{class_name} for {name}, which the installed {library} lacks: "
                "upgrade it"
            ) from error
        kind = _kind(name)
        # This excludes classes such as AutoTokenizer, which open whatever a file names, including the folder's code.
        if not (isinstance(cls, type) and issubclass(cls, kind)):
            raise UserError(
                f"model {self.path} names {library}.{class_name} for {name}, which is not a {kind.__name__}: fetch the "
                "pipeline folder again"
            )
        return cls

    @functools.cached_property
    def identity(self) -> dict[str, str | dict[str, str]]:
        """Path as given, pipeline and component classes, and the ``commit`` (Hub) or ``digest`` (local) of the files.

        ``digest`` is a SHA-256 over the index and every component file; its first use reads those that are new.
        """
        commit = self._source.commit
        version = {"digest": files_digest(self.files())} if commit is None else {"commit": commit}
        return {"path": self.path, "pipeline": self.pipeline, "components": self.components, **version}

    @functools.cached_property
    def _entries(self) -> dict[str, tuple[str, str]]:
        """Component name -> library and class."""
        entries = {}
        for name, value in self._index.items():
            if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
                if not _COMPONENT.fullmatch(name):
                    raise PrerequisiteError(
                        f"model {self.path} names a component {name[:40]!r}, which cannot be one of its folders: fetch"
                        " the pipeline folder again"
                    )
                entries[name] = (value[0], value[1])
        return entries


def _kind(name: str) -> type:
    """The base class that a component's class must have."""
    from diffusers import ModelMixin, SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if name.startswith("tokenizer"):
        return PreTrainedTokenizerBase
    if name.startswith("text_encoder"):
        return PreTrainedModel
    return SchedulerMixin if name == "scheduler" else ModelMixin


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
