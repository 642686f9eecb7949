"""The judge ``unified-reward-local``: UnifiedReward 2.0 in this process, with the same prompt as behind an endpoint.

UnifiedReward 2.0 is tuned from Qwen's vision models (Qwen2.5-VL, Qwen3-VL, Qwen3.5). Their processors in transformers
need torchvision even without a video, so this module combines tokens and pixels itself: it repeats the chat template's
single mark for the image once for each merged patch. Pillow resizes the images, so a server's numbers may differ in the
last digits.

It judges one image at a time; a server with vLLM or SGLang is many times faster.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.model_source import WEIGHTS, ModelSource
from gdro_cli.rewards.base import ImageSource, Resources, UnreadableImageError, one_line, read_rgb
from gdro_cli.rewards.judge.base import Judgement
from gdro_cli.rewards.judge.unified_prompt import MAX_TOKENS, TEMPLATE, provenance, read_answer, request_text

KINDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""UnifiedReward 2.0's model types in transformers."""
_IMAGE_MARK = "<|image_pad|>"
_FILES = ("*.json", "*.txt", "*.jinja", WEIGHTS)


@dataclass(frozen=True, slots=True)
class _Loaded:
    network: Any
    tokenizer: Any
    processor: Any


class UnifiedRewardLocal:
    """Asks UnifiedReward 2.0 for the axes of each image, greedily. Details of a judgement: ``answer``, its text.

    Args:
        model: a folder as ``save_pretrained`` writes it, or the id of a model in the Hugging Face cache. Nothing is
            downloaded.
        template: the words of a request, with a place for the prompt.
        device: ``auto`` uses a GPU if there is one. The network is bfloat16 on a GPU, otherwise float32.

    Raises:
        PrerequisiteError: the model is not on this machine.
        UserError: the model is of another kind.
    """

    def __init__(self, model: str | Path, *, template: str = TEMPLATE, device: str = "auto") -> None:
        self._template = template
        self._source = ModelSource(model, key="judge.model", fetch=False)
        self._source.get(*_FILES)
        self._source.require("config.json", WEIGHTS)
        kind = self._source.read_json("config.json").get("model_type")
        if kind not in KINDS:
            raise UserError(f"the judge's model {model} is a {str(kind)[:60]}; it must be one of {', '.join(KINDS)}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = device
        self._dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._parts: _Loaded | None = None

    @functools.cached_property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the model's commit, or the digest of its files (read once); prompt, precision, transformers."""
        return {
            "judge": "unified-reward-local",
            **self._source.version(*_FILES),
            **provenance(self._template),
            "precision": str(self._dtype).removeprefix("torch."),
            "transformers": metadata.version("transformers"),
        }

    @property
    def resources(self) -> Resources:
        """One large network."""
        return "device"

    def load(self) -> None:
        """Load the network; a second call does nothing. Raises ``PrerequisiteError`` for missing or damaged files."""
        self._loaded()

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """Judge ``images[i]`` for the text ``prompts[i]``, in order. An image that fails is missing with a reason.

        Raises:
            ValueError: the numbers of images and prompts differ.
            PrerequisiteError: the network cannot be loaded.
        """
        loaded = self._loaded()
        return [self._judge_one(loaded, image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _judge_one(self, loaded: _Loaded, source: ImageSource, prompt: str) -> Judgement:
        try:
            image = read_rgb(source)
        except UnreadableImageError as error:
            return Judgement.missing(str(error))
        try:
            answer, complete = _ask(loaded, image, request_text(prompt, template=self._template))
        except (RuntimeError, ValueError) as error:  # for example, too little memory for this image
            return Judgement.missing(f"the judge failed on this image: {one_line(error)}")
        return read_answer(answer, complete=complete)

    def _loaded(self) -> _Loaded:
        if self._parts is not None:
            return self._parts
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        tokenizer = self._source.load(AutoTokenizer)
        if tokenizer.chat_template is None:
            raise PrerequisiteError(f"model {self._source.name} has no chat template: {self._source.remedy}")
        processor = self._source.load(Qwen2VLImageProcessorPil)
        # The files could name an attention implementation that is code from the Hub.
        network = self._source.load(AutoModelForImageTextToText, dtype=self._dtype, attn_implementation="sdpa")
        self._parts = _Loaded(network.eval().requires_grad_(False).to(self._device), tokenizer, processor)
        return self._parts

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the network, so that a judge can be sent to a worker process."""
        return {**self.__dict__, "_parts": None}


def _ask(loaded: _Loaded, image: Image.Image, text: str) -> tuple[str, bool]:
    """The model's answer to an image and a text, and whether the answer is complete."""
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
            mm_token_type_ids=(ids == network.config.image_token_id).int(),  # 1 for tokens of the image
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
