"""The judge in this process, with tiny Qwen vision models that have memorised two answers."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import ImageSource
from gdro_cli.rewards.judge import unified_reward_local
from gdro_cli.rewards.judge.base import AXES
from gdro_cli.rewards.judge.unified_reward_local import UnifiedRewardLocal
from tests.support.judge_server import lines

TEMPLATE = "Rate {caption}."  # short, because each letter is a token here
MARKS = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGES = {"red": Image.new("RGB", (16, 8), "#ff0000"), "blue": Image.new("RGB", (16, 8), "#0000ff")}
ANSWERS = {"red": lines(4.5, 3, 2), "blue": lines(1, 5, 3.25)}


def letter_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=MARKS
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def network(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "head_dim": 16,
        "rope_parameters": rope | ({"mrope_interleaved": True} if kind == "qwen3_vl" else {}),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
    }
    marks = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in marks.items()}
    if kind == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        config: Any = Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    else:
        vision |= {"fullatt_block_indexes": [1], "window_size": 16}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config)


def learn(model: Any, tokenizer: PreTrainedTokenizerFast, processor: Any) -> None:
    """Train on the two answers. 16 x 8 pixels are 4 x 2 patches of 4 pixels, merged by 2 x 2: 2 tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = []
    for name, image in IMAGES.items():
        question = (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
            "Rate a card.<|im_end|>\n<|im_start|>assistant\n"
        )
        question_ids = tokenizer(question, return_tensors="pt")["input_ids"]
        ids = tokenizer(question + ANSWERS[name] + "<|im_end|>", return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : question_ids.shape[1]] = -100
        pixels = processor(images=[image], return_tensors="pt")
        kinds = (ids == model.config.image_token_id).int()
        batches.append({"input_ids": ids, "labels": labels, "mm_token_type_ids": kinds, **pixels})
    for _ in range(400):
        optimizer.zero_grad()
        learnt = True
        for batch in batches:
            output = model(**batch)
            output.loss.backward()
            answer = batch["labels"][:, 1:] >= 0
            learnt &= torch.equal(output.logits.argmax(-1)[:, :-1][answer], batch["labels"][:, 1:][answer])
        if learnt:  # greedy decoding then gives the answers, letter by letter
            return
        optimizer.step()
    raise AssertionError("the answers were not learnt")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = letter_tokenizer()
    model = network(request.param, tokenizer)
    processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096})
    learn(model, tokenizer, processor)
    path: Path = tmp_path_factory.mktemp(request.param)
    for part in (model, tokenizer, processor):
        part.save_pretrained(path)
    return path


def judged(judge: UnifiedRewardLocal, *images: ImageSource) -> list[tuple[float | None, ...]]:
    judgements = judge.judge(images, ["a card"] * len(images))
    return [tuple(judgement.axes[axis] for axis in AXES) for judgement in judgements]


def test_each_image_gets_the_memorised_answer(folder: Path, tmp_path: Path) -> None:
    judge = UnifiedRewardLocal(folder, template=TEMPLATE, device="cpu")
    stored, broken = tmp_path / "blue.png", tmp_path / "broken.png"
    IMAGES["blue"].save(stored)
    broken.write_bytes(b"no")
    expected = [(4.5, 3.0, 2.0), (None, None, None), (1.0, 5.0, 3.25)]
    assert judged(judge, IMAGES["red"], broken, stored) == expected
    assert judged(pickle.loads(pickle.dumps(judge)), IMAGES["red"]) == expected[:1]


def test_an_answer_that_was_cut_off_loses_its_last_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each letter is a token; all but the last one are allowed."""
    monkeypatch.setattr(unified_reward_local, "MAX_TOKENS", len(lines(4.5, 3, 2)) - 1)
    assert judged(UnifiedRewardLocal(folder, template=TEMPLATE, device="cpu"), IMAGES["red"]) == [(4.5, 3.0, None)]


def test_a_prompt_that_contains_the_model_s_image_mark_is_missing(folder: Path) -> None:
    (judgement,) = UnifiedRewardLocal(folder, template=TEMPLATE, device="cpu").judge(
        [IMAGES["red"]], ["a <|image_pad|>"]
    )
    assert judgement.reason is not None and "2 times" in judgement.reason


def test_provenance_covers_the_files_and_the_prompt(folder: Path, tmp_path: Path) -> None:
    version = UnifiedRewardLocal(folder).version
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert UnifiedRewardLocal(copy).version == version
    assert UnifiedRewardLocal(folder, template=TEMPLATE).version != version
    assert version["precision"] == "float32"
    with (copy / "config.json").open("a") as file:
        file.write("\n")
    assert UnifiedRewardLocal(copy).version != version


def test_missing_and_damaged_files_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"nowhere does not exist: set judge\.model to a folder"):
        UnifiedRewardLocal(tmp_path / "nowhere")
    with pytest.raises(PrerequisiteError, match=r"has no config\.json"):
        UnifiedRewardLocal(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(PrerequisiteError, match="no chat template"):
        UnifiedRewardLocal(copy, device="cpu").load()
    shutil.copy(folder / "chat_template.jinja", copy)
    weights = load_file(copy / "model.safetensors")
    name, matrix = next((name, value) for name, value in sorted(weights.items()) if value.ndim == 2)
    for change, words in (
        ({}, "lacks the weight"),
        ({name: matrix[1:].contiguous()}, "holds the weight .* in the shape"),
    ):
        save_file({**{n: v for n, v in weights.items() if n != name}, **change}, copy / "model.safetensors")
        with pytest.raises(PrerequisiteError, match=words):
            UnifiedRewardLocal(copy, device="cpu").load()
    (copy / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(PrerequisiteError, match="cannot be loaded"):
        UnifiedRewardLocal(copy).load()
    (copy / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="is a clip"):
        UnifiedRewardLocal(copy).load()
