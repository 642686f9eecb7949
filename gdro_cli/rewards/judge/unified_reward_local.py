"""UnifiedReward 2.0 in this process, through transformers: the same question and reading as behind an endpoint.

UnifiedReward 2.0 is tuned from Qwen's vision models (Qwen2.5-VL, Qwen3-VL, Qwen3.5). Their processors in transformers
need torchvision even when there is no video, so tokens and pixels are put together here: the chat template's one mark
for the image becomes as many as there are merged patches. Images are resized by Pillow, and a server's numbers may
differ in late digits.

One image is judged at a time. A server with vLLM or SGLang is many times as fast.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.files import sha256, sha256_file
from gdro_cli.rewards.base import ImageSource, UnreadableImageError, one_line, read_rgb
from gdro_cli.rewards.judge.base import Judgement
from gdro_cli.rewards.judge.unified_prompt import (
    MAX_TOKENS,
    TEMPLATE,
    check_template,
    provenance,
    read_answer,
    request_text,
)

KINDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""Model types of transformers that UnifiedReward 2.0 comes in."""
_IMAGE_MARK = "<|image_pad|>"
_FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors")


@dataclass(frozen=True, slots=True)
class _Loaded:
    network: Any
    tokenizer: Any
    processor: Any


class UnifiedRewardLocal:
    """Asks UnifiedReward 2.0 for the axes of each image, greedily. Details of a judgement: ``answer``, its text.

    Args:
        model: a folder as ``save_pretrained`` writes it, or a Hub id that is in the Hugging Face cache. Nothing is
            downloaded.
        device: ``auto`` takes a GPU if there is one. The network is bfloat16 on a GPU, else float32.
        template: the text that goes with an image, with ``{caption}`` where its prompt goes.

    Raises:
        PrerequisiteError: the model is not there.
        ValueError: the template has no place for the caption.
    """

    def __init__(self, model: str | Path, *, device: str = "auto", template: str = TEMPLATE) -> None:
        check_template(template)
        self._name = str(model)
        self._template = template
        self._folder, self._commit = _find(model)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = device
        self._dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._parts: _Loaded | None = None

    @functools.cached_property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the model's commit, or the digest of its files (read once); prompt, precision, transformers."""
        model = {"sha256": self._digest()} if self._commit is None else {"model": self._name, "commit": self._commit}
        return {
            "judge": "unified-reward-local",
            **model,
            **provenance(self._template),
            "precision": str(self._dtype).removeprefix("torch."),
            "transformers": metadata.version("transformers"),
        }

    def load(self) -> None:
        """Load the network; a second call does nothing.

        Raises:
            PrerequisiteError: files are missing or broken.
            UserError: the model is of another kind.
        """
        self._loaded()

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """Judge ``images[i]`` for the text ``prompts[i]``, in order. An image that fails is missing with a reason.

        Raises:
            ValueError: not as many prompts as images.
            PrerequisiteError: the network cannot be loaded.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        loaded = self._loaded()
        return [self._judge_one(loaded, image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _judge_one(self, loaded: _Loaded, source: ImageSource, prompt: str) -> Judgement:
        try:
            image = read_rgb(source)
        except UnreadableImageError as error:
            return Judgement.missing(str(error))
        try:
            answer, complete = _ask(loaded, image, request_text(prompt, template=self._template))
        except (RuntimeError, ValueError) as error:  # such as too little memory for this image
            return Judgement.missing(f"the judge failed on this image: {one_line(error)}")
        return read_answer(answer, complete=complete)

    def _loaded(self) -> _Loaded:
        if self._parts is None:
            self._parts = self._load()
        return self._parts

    def _load(self) -> _Loaded:
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder, loader = str(self._folder), cast(Any, AutoModelForImageTextToText)
        try:
            self._check_kind()
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
            network, info = loader.from_pretrained(
                folder,
                dtype=self._dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation="sdpa",  # the files might name kernels of the Hub
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise PrerequisiteError(
                f"the judge's model {self._name} cannot be loaded ({one_line(error)}): fetch all of its files again"
            ) from error
        # transformers would go on with random numbers for weights that the file lacks
        missing = sorted(set(info["missing_keys"]) & {name for name, _ in network.named_parameters()})
        if missing:
            raise PrerequisiteError(f"the judge's model {self._name} lacks the weight {missing[0]}: fetch it again")
        if tokenizer.chat_template is None:
            raise PrerequisiteError(
                f"the judge's model {self._name} has no chat template: fetch all of its files again"
            )
        return _Loaded(network.eval().requires_grad_(False).to(self._device), tokenizer, processor)

    def _check_kind(self) -> None:
        config = json.loads((self._folder / "config.json").read_bytes().decode("utf-8"))
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind not in KINDS:
            raise UserError(
                f"the judge's model {self._name} is a {str(kind)[:60]}; it must be one of {', '.join(KINDS)}"
            )

    def _digest(self) -> str:
        files = sorted({file for pattern in _FILES for file in self._folder.glob(pattern)})
        return sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode())

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the network, so that a judge can be sent to a worker process."""
        return {**self.__dict__, "_parts": None}


def _find(model: str | Path) -> tuple[Path, str | None]:
    """The model's folder, and its commit if it is in the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = Path(model).expanduser()
    commit = None
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(model), allow_patterns=list(_FILES), local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            raise PrerequisiteError(
                f"the judge's model {model} is neither a folder here nor in the Hugging Face cache: name a local "
                "folder, or run `hf download` with the model's Hub id"
            ) from None
        commit = folder.name
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise PrerequisiteError(f"the judge's model {model} has no {pattern}: fetch all of its files again")
    return folder, commit


def _ask(loaded: _Loaded, image: Image.Image, text: str) -> tuple[str, bool]:
    """The model's answer to an image and a text, and whether the model ended it."""
    network, tokenizer = loaded.network, loaded.tokenizer
    pixels = loaded.processor(images=[image], return_tensors="pt")
    patches = int(pixels["image_grid_thw"][0].prod()) // loaded.processor.merge_size**2
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    if chat.count(_IMAGE_MARK) != 1:
        raise ValueError(f"the chat must hold {_IMAGE_MARK} once, it does {chat.count(_IMAGE_MARK)} times")
    tokens = tokenizer(chat.replace(_IMAGE_MARK, _IMAGE_MARK * patches), add_special_tokens=False, return_tensors="pt")
    ids = tokens["input_ids"].to(network.device)
    with torch.inference_mode():
        output = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == network.config.image_token_id).int(),  # 1 where a token is an image's
            pixel_values=pixels["pixel_values"].to(network.device, network.dtype),
            image_grid_thw=pixels["image_grid_thw"].to(network.device),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    answer = output[0, ids.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True), len(answer) < MAX_TOKENS
