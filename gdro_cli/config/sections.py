"""The sections of a recipe: each key with its meaning, unit, range and effects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_serializer, model_validator

from gdro_cli.config.base import Affects, FallsBackTo, StoredGroupsOnly, StrictModel
from gdro_cli.config.rewards import MIX, RewardName

_MOST_WORKERS = 1024
"""Scoring processes; a slip of the keyboard must not start thousands."""

Attention = Literal[
    "auto", "native", "native_cudnn", "native_efficient", "native_flash", "native_math", "flash", "flash_3", "xformers"
]
OcrObjective = Literal["accuracy", "exact", "similarity", "confident"]
GenEvalObjective = Literal["soft", "strict", "accuracy"]
Weight = Annotated[float, Field(ge=0)]
Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]
SOURCE_KINDS = {"file": "a `file`", "builtin": "a `builtin` set", "imported": "`imported` data"}
"""Keys that say where prompts come from, and their words in messages."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What imported data and scores may be called: the name becomes part of a path."""
Strings = Annotated[tuple[str, ...], Field(strict=False)]


class ModelSection(StrictModel):
    """The text-to-image model to train."""

    path: str = Field("tiny", min_length=1)
    """`tiny` for the model inside the package, a diffusers folder, or a Hub id such as `org/name`. A relative folder
    is looked up beside the recipe first, then in the current folder."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the frozen weights. `auto`: bfloat16 on CUDA, float32 on the CPU. LoRA weights are always
    float32. float16 is not supported: the gradients of a mean over so many numbers are too small for it."""
    max_sequence_length: int | None = Field(None, ge=1)
    """Text tokens per prompt, 1 or more. Unset: the model family's own length."""
    sharding: Annotated[Literal["none", "fsdp"], Affects("speed")] = "none"
    """How several processes share the frozen transformer. `none`: each has all of it; `fsdp`: each has a part of every
    layer, for models that do not fit on one GPU. Changes memory and speed, not what is learnt."""
    quantization: Literal["none", "int8", "fp8", "nf4"] = "none"
    """How the linear layers of the frozen transformer are stored: `none` (in `dtype`), `int8` or `fp8` (half of
    bfloat16; package torchao), `nf4` (less than a third of bfloat16; package bitsandbytes, CUDA only). The adapter
    stays float32. Changes the images slightly, so every setting has its own store."""
    offload: Annotated[bool, Affects("speed")] = False
    """Keep the text encoders, transformer and autoencoder in CPU memory, and move each to the GPU only while it works.
    Changes memory and speed, not the images."""
    vae_slicing: Annotated[bool, Affects("speed")] = False
    """Decode and encode one image at a time. Changes memory and speed, not the images."""
    vae_tiling: bool = False
    """Decode and encode images larger than the autoencoder's own size in overlapping tiles. Changes such images
    slightly, so every setting has its own store."""
    compile: Annotated[bool, Affects("speed")] = False
    """Compile the transformer's blocks with torch.compile at their first use. Takes a minute or more and, on the CPU, a
    C++ compiler. Changes speed, and results by rounding."""
    attention: Annotated[Attention, Affects("speed")] = "auto"
    """The attention kernels, by diffusers' names: PyTorch's own (`native` and its variants), or those of an installed
    package. `auto`: `native`. Changes speed and memory, and results by rounding."""


class PromptSource(StrictModel):
    """Where prompts come from: a `file` or a `builtin` set, exactly one of them."""

    file: str | None = Field(None, min_length=1)
    """Prompt file, one prompt per line or JSONL. A relative path is looked up beside the recipe that names it, then in
    the current folder."""
    builtin: str | None = None
    """Name of a set that the tool generates: `ocr-train`, `ocr-validation` or `ocr-test`; for GenEval `geneval-train`
    and so on (the embedded model's shapes) or `geneval-coco-train` and so on (COCO's classes). `gdro prompts NAME`
    prints a set."""
    count: int | None = Field(None, ge=1)
    """Number of prompts, counted from the first. 1 or more. Unset: all of a file, one per word of a built-in OCR set,
    or as many of a built-in GenEval set as are possible with every tag in proportion to its weight (the official 553
    for `geneval-coco-test`)."""
    seed: int = Field(0, ge=0)
    """Which draw of a built-in set. 0 or more. Must stay 0 for a file."""
    skip_bad: Annotated[bool, Affects("speed")] = False
    """Leave out the bad lines of a file, such as those without the quoted text that the reward needs, and count them.
    Otherwise the file is refused. The name of a store or run follows from the prompts that are left."""
    two_line_share: float = Field(0.0, ge=0, le=1)
    """Share of a built-in OCR set whose signs carry two words, one above the other. 0 to 1."""
    min_letters: int = Field(4, ge=1)
    """Letters of the shortest word of a built-in OCR set. 1 or more, at most `max_letters`."""
    max_letters: int = Field(6, ge=1)
    """Letters of the longest word of a built-in OCR set. At least `min_letters`."""
    tags: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weight of each tag in a built-in GenEval set, such as `{position: 7, counting: 5}`. 0 or more, not all 0. A tag
    that is not named has weight 0. If a tag runs out of prompts, the others fill its share. Unset: the official sizes
    for `geneval-coco-test`, otherwise the same weight for every tag."""
    plurals: Literal["naive", "correct"] = "naive"
    """Plurals in a built-in GenEval set of COCO's classes: `naive`, as in the official prompts ("three knifes"), or
    `correct` ("three knives")."""


class TrainingPrompts(PromptSource):
    """Where the training prompts come from: a `file`, a `builtin` set, or data that was `imported` with its images;
    exactly one of them."""

    imported: str | None = Field(None, pattern=NAME)
    """Name under which `gdro import` stored prompts with their images. Nothing is then sampled. Not for online methods,
    which make their images."""


class PromptsSection(StrictModel):
    """The prompts for training, evaluation points and the final evaluation. What they must carry follows from the
    reward."""

    train: Annotated[TrainingPrompts, Affects("images", "training")]
    """Prompts whose groups are sampled, scored and trained on."""
    validation: Annotated[PromptSource, Affects("measurement")]
    """Prompts of the evaluation points during training. Their results may be used to choose settings."""
    eval: Annotated[PromptSource, Affects("evaluation")]
    """Held-out prompts of `gdro eval`. Do not use their results to choose settings."""


class SampleSection(StrictModel):
    """How groups are made: deterministic (ODE) Euler sampling from the untrained model."""

    images_per_prompt: Annotated[int, StoredGroupsOnly(instead="method.group_size")] = Field(16, ge=2)
    """Images of each training prompt in the store (the stored group). 2 or more. Paper: 16."""
    steps: int = Field(8, ge=1)
    """Euler steps from noise to image. 1 or more. Online methods use this number for evaluations only
    (`method.train_sample_steps`)."""
    guidance: Annotated[float, Affects("images", "training")] = Field(1.0, ge=0)
    """Guidance scale g, 0 or more. FLUX.1-dev and other guidance-distilled models take it as an input, in training too.
    Most others use classifier-free guidance, v_uncond + g (v_cond - v_uncond) for g above 1, in sampling and in online
    methods, but not in training on stored groups. Models without guidance ignore it. docs/models.md has the kinds."""
    height: Annotated[int | None, Affects("images", "training", "measurement")] = Field(None, ge=8)
    """Image height in pixels, 8 or more. Set both height and width, or neither. Unset: the model's own size."""
    width: Annotated[int | None, Affects("images", "training", "measurement")] = Field(None, ge=8)
    """Image width in pixels, 8 or more."""
    batch_size: Annotated[int, Affects("speed")] = Field(32, ge=1)
    """Images per forward pass of sampling. 1 or more. Changes speed and memory, not the images."""
    prompts_per_shard: Annotated[int, Affects("speed")] = Field(8, ge=1)
    """Groups per shard of a new store. 1 or more. An interruption costs at most one shard."""
    image_format: Annotated[Literal["png", "webp"], Affects("speed")] = "png"
    """File format of the images in a new store. Both are lossless."""


class OcrReward(StrictModel):
    """The reward to train on, and the text recognition engine, PaddleOCR."""

    objective: Annotated[OcrObjective | dict[OcrObjective, Weight], Affects("training")] = "accuracy"
    """The reward to train on. `accuracy`: how much of the text was read, in steps of a letter, where more text than
    asked for costs nothing; `exact`: 1 for the text and nothing else; `similarity`: as `accuracy`, where more text
    costs as much as too little; `confident`: the accuracy times the recogniser's confidence, which also orders images
    with the same letters; or a weighted mean of them, such as `{accuracy: 1, exact: 1}`. All four are stored, so a
    change needs no new scoring."""
    engine: Literal["onnxruntime", "paddle"] = "onnxruntime"
    """What runs the models: `onnxruntime`, or `paddle` if paddlepaddle is installed (for GPUs; it needs models in its
    own format, see `model_dir`)."""
    recognition_width: int = Field(160, ge=48, le=3200)
    """Width in pixels to which a text line of height 48 is scaled for recognition. 48 to 3200. The engine's default is
    320; 160 was as accurate on 64-pixel images and a third faster."""
    detection_model: str = Field("PP-OCRv6_small_det", min_length=1)
    """Name of the detection model."""
    recognition_model: str = Field("PP-OCRv6_small_rec", min_length=1)
    """Name of the recognition model."""
    model_dir: str | None = Field(None, min_length=1)
    """Folder with one sub-folder per model name. Unset: the weights installed with the package."""


class GenEvalReward(StrictModel):
    """The detector of objects, the classifier of colours, and the reward to train on."""

    objective: Annotated[GenEvalObjective | dict[GenEvalObjective, Weight], Affects("training")] = "soft"
    """The reward to train on. `soft`: the mean score of the prompt's clauses, 0 to 1; `strict`: 1 for exactly what the
    prompt asks for; `accuracy`: 1 if the official metric says correct (for most prompts it forgives additional
    objects); or a weighted mean of them, such as `{soft: 1, accuracy: 2}`. All three are stored, so a change needs no
    new scoring."""
    detector: Literal["shapes", "mask2former"] = "shapes"
    """`shapes`: the small network for the embedded model's six shapes; `mask2former`: the 80 classes of COCO."""
    detector_model: str | None = Field(None, min_length=1)
    """Hub id or folder of the Mask2Former. Unset: the official metric's, Swin-S trained on COCO instances."""
    colours: Literal["auto", "palette", "clip"] = "auto"
    """`palette`: the nearest of the embedded world's colours; `clip`: zero-shot CLIP, as in the official metric.
    `auto`: palette for shapes, clip for mask2former."""
    colour_model: str | None = Field(None, min_length=1)
    """Hub id or folder of the CLIP model. Unset: the official metric's, ViT-L/14."""


class RewardSection(StrictModel):
    """How images are scored."""

    kind: RewardName = "ocr"
    """The reward, built in or of an installed plug-in (`gdro rewards` lists both). Its settings are the section of its
    name."""
    workers: Annotated[Annotated[int, Field(ge=1, le=_MOST_WORKERS)] | Literal["auto"], Affects("speed")] = "auto"
    """Scoring processes of a reward that runs on the CPU, 1 or more. `auto`: one per available CPU core. Other rewards
    (large networks, servers) always have a single one."""
    timeout: Annotated[float, Affects("speed")] = Field(120.0, gt=0)
    """Seconds that a scoring process may take for one image, on average over those that it gets at a time. Above 0. A
    process that takes longer is ended and replaced; its images are tried once more, one by one. Rewards that ask a
    server have limits of their own."""
    max_failed_share: Annotated[float, Affects("evaluation")] = Field(0.02, ge=0, le=1)
    """Share of images that may lack a score, 0 to 1. Above it, `gdro score` and `gdro eval` stop with an error, and an
    evaluation point cannot be the best one. A failed image has no score, never a score of 0. Online methods continue
    without the failed images as long as a round has one score."""
    ocr: OcrReward = OcrReward()
    """Settings of the OCR reward."""
    geneval: GenEvalReward = GenEvalReward()
    """Settings of the GenEval reward."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The rewards that score: the parts of a mixture, or the reward itself."""
        if self.kind != MIX:
            return (self.kind,)
        parts: tuple[str, ...] = getattr(self, MIX).parts
        return parts


class JudgeSection(StrictModel):
    """Who judges the quality of images for the corrected score. A judge never sees a reward."""

    kind: Literal["auto", "embedded", "unified-reward", "unified-reward-local", "none"] = "auto"
    """`embedded`: the small network for the embedded model's world; `unified-reward`: UnifiedReward behind an
    OpenAI-compatible endpoint (vLLM, SGLang); `unified-reward-local`: the same model in this process, through
    transformers; `none`: no judge and no corrected score. `auto`: embedded for the embedded model, none for others."""
    base_url: Annotated[str | None, Affects("speed")] = Field(None, min_length=1)
    """Address of the endpoint, up to `/v1`, without a user name, key or query. For `unified-reward`."""
    model: str | None = Field(None, min_length=1)
    """For `unified-reward`, the name by which the endpoint serves the model. For `unified-reward-local`, its folder, or
    the Hub id of a model that is already downloaded."""
    api_key_env: Annotated[str | None, Affects("speed")] = Field(None, min_length=1)
    """Name of the environment variable with the endpoint's key, if the endpoint needs one. The key itself is never
    stored."""
    template: str | None = Field(None, min_length=1)
    """File with the words that UnifiedReward is asked in, with the place {prompt} for the image's prompt. Its content
    is part of the protocol. Unset: words of our own in the form of the authors'."""
    concurrency: Annotated[int, Affects("speed")] = Field(8, ge=1)
    """Simultaneous requests. 1 or more."""
    timeout: Annotated[float, Affects("speed")] = Field(120.0, gt=0)
    """Seconds to wait for a connection, and for each pause in an answer of the endpoint. Above 0."""
    retries: Annotated[int, Affects("speed")] = Field(4, ge=0)
    """Repetitions of a failed request. 0 or more."""
    max_failed_share: Annotated[float, Affects("evaluation")] = Field(0.05, ge=0, le=1)
    """Share of images that may lack a judgement, 0 to 1. Above it, `gdro eval` stops with an error, and an evaluation
    point cannot be the best one."""


class LoraSection(StrictModel):
    """The trained low-rank adapter."""

    rank: int = Field(32, ge=1)
    """Rank of the update. 1 or more. Paper: 32."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank (by alpha / sqrt(rank) with `rslora`). Above 0."""
    targets: Strings | Literal["auto", "all-linear"] = "auto"
    """Layers with an adapter: `auto` (those published for the model family), `all-linear`, or a list of module
    names."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(rank)."""
    init: Annotated[str | None, Affects("images", "training", "measurement")] = Field(None, min_length=1)
    """Adapter to start from: its file, or a folder with it, such as a finished run. It stays frozen and belongs to the
    base model, which samples the images and is the reference; the trained adapter is a new one on top, and the saved
    file contains both. A relative path is looked up beside the recipe first, then in the current folder. Unset:
    none."""


class EmaSection(StrictModel):
    """Moving average of the adapter. Its decay at step i is min(rate * i, max_decay)."""

    rate: float = Field(0.001, ge=0, le=1)
    """Growth of the decay per step. 0 to 1. Paper: 0.001."""
    max_decay: float = Field(0.5, ge=0, lt=1)
    """Highest decay. In [0, 1). Paper: 0.5."""


class TrainSection(StrictModel):
    """Optimisation of the adapter."""

    steps: int = Field(300, ge=1)
    """Optimizer steps. 1 or more. A finished run is not extended: another number makes another run."""
    groups_per_step: Annotated[int, StoredGroupsOnly(instead="method.prompts_per_round")] = Field(8, ge=1)
    """Groups per optimizer step, over all processes together. 1 or more. A step uses this times `method.k` images."""
    lr: float = Field(3e-4, gt=0)
    """Highest learning rate of AdamW. Above 0. Paper: 3e-4."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: `constant`, or a decay to 0, which would be reached one step after the
    last."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0. 0 or more, at most `steps`."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW. 0 or more."""
    adam_betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.999)
    """Decay of AdamW's first and second moment. Each in [0, 1)."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw`, or `adamw8bit`: the same with both moments in 8 bits, a quarter of their memory (package
    bitsandbytes)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which the gradient is clipped. Above 0."""
    micro_batch: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"] | None, Affects("speed")] = None
    """Images per forward pass in one process, 1 or more. Unset: all images of the step. `auto`: the most that fit the
    GPU by the estimate of `--dry-run`; on the CPU as if it was unset. If memory runs out in the first steps, `auto` is
    halved and the step tried again (not with `model.sharding: fsdp`). Changes memory and speed, and the gradient by
    rounding only. For online methods an image counts once per sampling step."""
    rounds: Annotated[int, StoredGroupsOnly()] = Field(1, ge=1)
    """Rounds with equal numbers of steps, 1 or more, at most `steps`. Every round after the first samples and scores
    new groups with the adapter's average at that point. The reference stays the base model."""
    scores: Annotated[str | None, StoredGroupsOnly()] = Field(None, pattern=NAME)
    """Name of imported scores to train on, instead of those of the recipe's reward: those that came with the images
    (`gdro import`), or those of `gdro score --import`. The reward still measures validation and held-out images."""
    group_gradient: Annotated[Literal["auto", "one_pass", "two_pass"], Affects("speed"), StoredGroupsOnly()] = "auto"
    """`one_pass`: each group goes forward and backward once, as many groups at a time as fit into `micro_batch`.
    `two_pass` computes the images' weights first, at the cost of one more forward pass, and can split a group. The
    gradients are equal. `auto`: one pass if a group fits into `micro_batch`."""
    checkpoint_every: Annotated[int, Affects("speed")] = Field(50, ge=1)
    """Steps between checkpoints. 1 or more. The last step always has one. For online methods a checkpoint waits for the
    end of its round."""
    checkpoint_minutes: Annotated[float | None, Affects("speed")] = Field(None, gt=0)
    """Minutes after which the next step also has a checkpoint. Above 0. Unset: `checkpoint_every` alone decides."""
    keep_checkpoints: Annotated[int, Affects("speed")] = Field(3, ge=1)
    """Checkpoints to keep; older ones are deleted. 1 or more."""
    log_every: Annotated[int, Affects("speed")] = Field(1, ge=1)
    """Steps between rows of metrics.jsonl. 1 or more."""
    eval_every: Annotated[int, Affects("measurement")] = Field(0, ge=0)
    """Steps between evaluation points on the validation prompts. 0: no evaluation points."""
    trackers: Annotated[tuple[Tracker, ...], Field(strict=False), Affects("speed")] = ()
    """Experiment trackers that get the metrics, by accelerate's names. metrics.jsonl is always written.

    `tensorboard`, `trackio` and `wandb` also get the image sheets of evaluation points."""
    lora: LoraSection = LoraSection()
    """The trained adapter."""
    ema: EmaSection = EmaSection()
    """Moving average of the adapter."""
    seed: Annotated[int | None, FallsBackTo("seed")] = Field(None, ge=0)
    """Seed of the training alone: the adapter's initial weights, the order of groups and images, sigma and noise. 0 or
    more. Unset: `seed`. The images of the store and their scores always follow `seed`."""
    stop_on_collapse: bool = False
    """End the training at an evaluation point whose verdict is `collapsed`. Needs `eval_every` above 0."""
    shuffle_rewards: bool = False
    """Control experiment: permute the rewards within each group, so that nothing can be learnt from them. Whatever such
    a run gains is not caused by the reward."""
    cache_reference: Annotated[bool, Affects("speed"), StoredGroupsOnly()] = True
    """Keep the reference's velocity errors beside the store, so that trainings with the same draws compute them once:
    other values of an ablation, or this training if `method.noise_bank` repeats draws. Changes speed, not the result
    (with a `noise_bank`, by rounding). No effect with `model.sharding: fsdp`, or for `nft`, which takes the reference's
    velocities themselves."""
    prefetch: Annotated[bool, Affects("speed"), StoredGroupsOnly()] = True
    """Draw the next step's groups and noise during the current step. Changes speed, not the result."""
    gradient_checkpointing: Annotated[bool | Annotated[float, Field(gt=0, lt=1)], Affects("speed")] = False
    """Recompute activations in the backward pass: less memory, about a third more time. `true`: those of all blocks.
    Between 0 and 1: those of this share of the blocks, evenly spread; memory and time are between the two ends."""


class EvalSection(StrictModel):
    """How `gdro eval` and the evaluation points measure a model."""

    images_per_prompt: Annotated[int, Affects("evaluation")] = Field(2, ge=1)
    """Images per held-out prompt in `gdro eval`. 1 or more."""
    steps: Annotated[int | None, FallsBackTo("sample.steps")] = Field(None, ge=1)
    """Euler steps, 1 or more. Unset: `sample.steps`."""
    guidance: Annotated[float | None, FallsBackTo("sample.guidance")] = Field(None, ge=0)
    """Guidance scale, 0 or more. Unset: `sample.guidance`."""
    seed: int = Field(1000, ge=0)
    """Seed of the evaluation's noise. 0 or more. The base and the trained model get the same noise."""
    weights: Literal["ema", "raw"] = "ema"
    """The adapter's weights to evaluate: the moving average (`ema`) or the trained weights themselves (`raw`)."""
    checkpoint: Annotated[Literal["best", "last"], Affects("evaluation")] = "best"
    """The step to evaluate. `best`: the evaluation point with the best verdict, and among these with the best corrected
    score on the validation prompts (without a judge, with the best headline measure: the OCR reward, or GenEval's
    overall accuracy); a point that lacks more than `reward.max_failed_share` or `judge.max_failed_share` is not a
    candidate. `last`: the end of the training, which is also `best` if there are no evaluation points."""
    rewards: Annotated[tuple[RewardName, ...], Field(strict=False), Affects("evaluation")] = ()
    """Rewards that `gdro eval` reports beside the trained one, such as [clip, aesthetic]. A trained model that gains in
    its own reward and loses in others has probably hacked its own."""
    bootstrap: int = Field(2000, ge=100)
    """Bootstrap resamples over prompts for each 95 % confidence interval. 100 or more."""
    grid_prompts: Annotated[int, Affects("evaluation")] = Field(8, ge=0)
    """Prompts shown in the image grid, base above trained. 0: no grid."""
    validation_images_per_prompt: int = Field(1, ge=1)
    """Images per validation prompt at the evaluation points during training. 1 or more."""


class AblationEntry(StrictModel):
    """What `gdro ablate` does with a key by default. A list is short for its `values` alone."""

    values: Annotated[tuple[JsonValue, ...], Field(strict=False)]
    """The values of the key, one cell each."""
    set: dict[str, JsonValue] = Field(default_factory=dict)
    """Values of other keys, by full or short name, in all cells."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        return given if isinstance(given, Mapping) else {"values": given}

    @model_serializer
    def _shortest(self) -> Any:
        return {"values": self.values, "set": self.set} if self.set else self.values
