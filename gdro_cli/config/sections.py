"""The sections of a recipe, each field with its meaning, unit and range."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gdro_cli.config.base import StrictModel
from gdro_cli.config.rewards import RewardName

#: Upper bounds of whole numbers, far above what any job needs: of optimizer steps, seeds, sizes and other counts.
MOST_STEPS = 10_000_000
MOST_SEED = 2**63 - 1
MOST_RANK = 65_536
MOST_PIXELS = 65_536
MOST = 1_000_000

Objective = Literal["soft", "strict", "accuracy"]
Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]
Strings = Annotated[tuple[str, ...], Field(strict=False)]


class ModelSection(StrictModel):
    """Which text-to-image model is trained."""

    path: str = Field("tiny", min_length=1)
    """`tiny` is the model inside the package; else a diffusers folder or a hub id such as `org/name`.
    A relative folder is looked up beside the recipe first, then in the current folder."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the frozen weights. `auto`: bfloat16 on CUDA, float32 on CPU. LoRA weights are always
    float32. There is no float16: the gradients of a mean over so many numbers are too small for it."""
    max_sequence_length: int | None = Field(None, ge=1, le=MOST)
    """Text tokens per prompt, 1 or more. Nothing: the model family's own length."""
    sharding: Literal["none", "fsdp"] = "none"
    """How several processes hold the frozen transformer: `none`, each has all of it; `fsdp`, each has a part of every
    layer, for models that do not fit one GPU. Changes memory and speed, not what is learnt."""
    quantization: Literal["none", "int8", "fp8", "nf4"] = "none"
    """How the linear layers of the frozen transformer are stored: `none` (in `dtype`), `int8` or `fp8` (half of
    bfloat16; package torchao), `nf4` (under a third; package bitsandbytes, CUDA only). The adapter stays float32. It
    changes the pictures a little, so a store belongs to one setting."""
    offload: bool = False
    """Keep text encoders, transformer and autoencoder in the CPU's memory, each on the GPU only while it is at work.
    Changes speed, not the pictures."""
    vae_slicing: bool = False
    """Decode one picture at a time. Changes memory and speed, not the pictures."""
    vae_tiling: bool = False
    """Decode pictures larger than the autoencoder's own size in overlapping tiles, which changes them slightly, so a
    store belongs to one setting."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile when they are first used, which takes a minute or more and,
    on the CPU, a C++ compiler. Changes speed, and results by rounding."""
    attention: Literal[
        "auto",
        "native",
        "native_cudnn",
        "native_efficient",
        "native_flash",
        "native_math",
        "flash",
        "flash_3",
        "xformers",
    ] = "auto"
    """Which kernels compute attention, by the names of diffusers: PyTorch's own (`native`, or one of its kinds), or
    those of a package that you have installed. `auto`: `native`. Changes speed and memory, and results by rounding."""


class PromptSource(StrictModel):
    """Where prompts come from: a `file`, or a `builtin` set; exactly one of them."""

    file: str | None = Field(None, min_length=1)
    """Prompt file, one prompt per line or JSONL. A relative path is looked up beside the recipe that names
    it, then in the current folder."""
    builtin: str | None = None
    """Name of a set that the tool draws itself: `ocr-train`, `ocr-validation` or `ocr-test`; for GenEval
    `geneval-train` and so on (the embedded model's shapes) or `geneval-coco-train` and so on (COCO's classes). `gdro
    prompts NAME` prints one."""
    count: int | None = Field(None, ge=1, le=MOST)
    """Number of prompts, 1 or more: the first so many. Nothing: all of a file, one per word of a built-in OCR set, or
    as many of a built-in GenEval set as there can be with every tag in full proportion to its weight (the official
    553 of `geneval-coco-test`)."""
    seed: int = Field(0, ge=0, le=MOST_SEED)
    """Which draw of a built-in set. 0 or more. Has no effect on a file, so it must stay 0 there."""
    two_line_share: float = Field(0.0, ge=0, le=1)
    """Share of a built-in OCR set whose signs carry two words, one above the other. 0 to 1."""
    min_letters: int = Field(4, ge=1, le=MOST)
    """Letters of the shortest word of a built-in OCR set. 1 or more, at most `max_letters`."""
    max_letters: int = Field(6, ge=1, le=MOST)
    """Letters of the longest word of a built-in OCR set. At least `min_letters`."""
    tags: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weight of each tag in a built-in GenEval set, such as `{position: 7, counting: 5}`: 0 or more, not all 0; a tag
    that is not named has none. A tag with no prompts left leaves the rest to the others. Nothing: the official sizes
    for `geneval-coco-test`, else the same for every tag."""
    plurals: Literal["naive", "correct"] = "naive"
    """Plurals in a built-in GenEval set of COCO's classes: `naive` as in the official prompts ("three knifes"), or
    `correct` ("three knives")."""


class PromptsSection(StrictModel):
    """The task, and its prompts for training, for watching the training, and for the final evaluation."""

    task: RewardName
    """What is asked of the images: `ocr` (write this text) or `geneval` (these objects, counts, colours, places)."""
    train: PromptSource
    """Prompts whose groups are sampled, scored and trained on."""
    validation: PromptSource
    """Prompts of the evaluation points during training. Settings may be chosen by them."""
    eval: PromptSource
    """Held-out prompts of `gdro eval`. Choose no setting by them."""


class SampleSection(StrictModel):
    """How the groups are made: deterministic (ODE) Euler sampling from the untrained model."""

    images_per_prompt: int = Field(16, ge=2, le=MOST)
    """Images of each training prompt kept in the store (the stored group). 2 or more. Paper: 16. Not for online
    methods."""
    steps: int = Field(8, ge=1, le=MOST)
    """Euler steps from noise to image. 1 or more. Online methods have their own number, and take this one for
    evaluations alone."""
    guidance: float = Field(1.0, ge=0)
    """Guidance scale g, 0 or more. An input of models made for one (FLUX.1-dev), in training, too. Classifier-free
    guidance for SD3, Qwen-Image, Z-Image and FLUX.2-klein-base: v_uncond + g (v_cond - v_uncond) for g above 1, in
    sampling and in online methods; training on stored groups has none. Models without guidance ignore it."""
    height: int | None = Field(None, ge=8, le=MOST_PIXELS)
    """Image height in pixels; set both or neither of height and width. Nothing: the model's own size."""
    width: int | None = Field(None, ge=8, le=MOST_PIXELS)
    """Image width in pixels."""
    batch_size: int = Field(32, ge=1, le=MOST)
    """Images per forward pass of sampling. 1 or more. Changes speed and memory, not which images come out."""
    prompts_per_shard: int = Field(8, ge=1, le=MOST)
    """Groups per shard of the store. 1 or more. An interruption costs at most one shard."""
    image_format: Literal["png", "webp"] = "png"
    """Format of the stored images, both lossless."""


class OcrReward(StrictModel):
    """The text recognition engine, PaddleOCR."""

    engine: Literal["onnxruntime", "paddle"] = "onnxruntime"
    """What runs the models: `onnxruntime`, or `paddle` where paddlepaddle is installed (for GPUs; models in its own
    format are needed then, see `model_dir`)."""
    recognition_width: int = Field(160, ge=48, le=3200)
    """Width in pixels to which a text line of height 48 is brought for recognition. 48 to 3200. The engine's
    own default is 320; 160 was as accurate on 64-pixel images and a third faster."""
    detection_model: str = Field("PP-OCRv6_small_det", min_length=1)
    """Name of the detection model."""
    recognition_model: str = Field("PP-OCRv6_small_rec", min_length=1)
    """Name of the recognition model."""
    model_dir: str | None = Field(None, min_length=1)
    """Folder with one sub-folder per model name. Nothing: the weights installed with the package."""


class GenEvalReward(StrictModel):
    """What finds the objects, what names their colours, and what the training wants."""

    objective: Objective | dict[Objective, Annotated[float, Field(ge=0)]] = "soft"
    """The reward that is trained on. `soft`: the mean of what each clause of the prompt got, 0 to 1; `strict`: 1 for
    exactly what was asked for; `accuracy`: 1 where the official metric says correct (more objects than asked for are
    forgiven in most prompts); or their mean with given weights, such as `{soft: 1, accuracy: 2}`. All three are
    stored, so a change costs no scoring."""
    detector: Literal["shapes", "mask2former"] = "shapes"
    """`shapes`: the small network for the embedded model's six shapes; `mask2former`: the 80 classes of COCO."""
    detector_model: str | None = Field(None, min_length=1)
    """Hub id or folder of the Mask2Former. Nothing: the official metric's, Swin-S trained on COCO instances."""
    colours: Literal["auto", "palette", "clip"] = "auto"
    """`palette`: the nearest of the embedded world's colours; `clip`: zero-shot CLIP, as in the official metric.
    `auto`: palette for shapes, clip for mask2former."""
    colour_model: str | None = Field(None, min_length=1)
    """Hub id or folder of the CLIP model. Nothing: the official metric's, ViT-L/14."""


class RewardSection(StrictModel):
    """How stored images are scored."""

    kind: RewardName = "ocr"
    """Which reward; must be the one of `prompts.task`."""
    workers: Annotated[int, Field(ge=1, le=MOST)] | Literal["auto"] = "auto"
    """Scoring processes, 1 or more. `auto`: one per CPU core that may be used; for mask2former and clip, one."""
    max_failed_share: float = Field(0.02, ge=0, le=1)
    """Share of images that may fail to be scored before `gdro score` or `gdro eval` refuses. 0 to 1. A failed image has
    no score, never a score of 0. Online methods go on without images that fail, as long as a round has one score."""
    ocr: OcrReward = OcrReward()
    """Settings of the OCR reward."""
    geneval: GenEvalReward = GenEvalReward()
    """Settings of the GenEval reward."""


class JudgeSection(StrictModel):
    """Who judges the quality of pictures for the corrected score. A judge never sees a reward."""

    kind: Literal["auto", "embedded", "unified-reward", "unified-reward-local", "none"] = "auto"
    """`embedded`: the small network that knows the embedded model's world; `unified-reward`: UnifiedReward behind an
    OpenAI-compatible endpoint (vLLM, SGLang); `unified-reward-local`: the same model in this process, through
    transformers; `none`: no judge, no corrected score. `auto`: embedded for the embedded model, none for others."""
    base_url: str | None = Field(None, min_length=1)
    """Address of the endpoint, up to `/v1`, without a name, a key or a query. For `unified-reward`."""
    model: str | None = Field(None, min_length=1)
    """`unified-reward`: name under which the endpoint serves the model. `unified-reward-local`: its folder, or the hub
    id of one that has been fetched."""
    api_key_env: str | None = Field(None, min_length=1)
    """Name of the environment variable with the endpoint's key, if it wants one. The key itself is never stored."""
    concurrency: int = Field(8, ge=1, le=MOST)
    """Requests at a time. 1 or more."""
    timeout: float = Field(120.0, gt=0)
    """Seconds that one request may take. Above 0."""
    retries: int = Field(4, ge=0, le=MOST)
    """How often a request that failed is repeated. 0 or more."""
    max_failed_share: float = Field(0.05, ge=0, le=1)
    """Share of images that may lack a judgement before `gdro eval` refuses, and up to which an evaluation point may be
    the best one. 0 to 1."""


class LoraSection(StrictModel):
    """The trained low-rank adapter."""

    rank: int = Field(32, ge=1, le=MOST_RANK)
    """Rank of the update. 1 or more. Paper: 32."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank (by alpha / sqrt(rank) with `rslora`). Above 0."""
    targets: Strings | Literal["auto", "all-linear"] = "auto"
    """Layers that get an adapter: `auto` (the ones published for the model family), `all-linear`, or a list
    of module names."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(rank)."""


class EmaSection(StrictModel):
    """Moving average of the adapter; its decay at step i is min(rate * i, max_decay)."""

    rate: float = Field(0.001, ge=0, le=1)
    """Growth of the decay per step. 0 to 1. Paper: 0.001."""
    max_decay: float = Field(0.5, ge=0, lt=1)
    """Highest decay. In [0, 1). Paper: 0.5."""


class TrainSection(StrictModel):
    """Optimisation of the adapter on stored, scored groups."""

    steps: int = Field(300, ge=1, le=MOST_STEPS)
    """Optimizer steps. 1 or more."""
    groups_per_step: int = Field(8, ge=1, le=MOST)
    """Groups per optimizer step, over all processes together. 1 or more. A step sees this times `method.k`
    images. Not for online methods."""
    lr: float = Field(3e-4, gt=0)
    """Highest learning rate of AdamW. Above 0. Paper: 3e-4."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: `constant`, or falling to 0, which it would reach one step after
    the last."""
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
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
    """The gradient's norm is clipped to this. Above 0."""
    micro_batch: int | None = Field(None, ge=1, le=MOST)
    """Images per forward pass in one process, 1 or more. Nothing: all images of the step. Changes memory and
    speed, not the gradient. For online methods an image is one at one sampling step."""
    rounds: int = Field(1, ge=1, le=MOST_STEPS)
    """Rounds of equally many steps, 1 or more, at most `steps`. In every round after the first the groups are sampled
    and scored anew, with the adapter's average as it is then; the reference stays the base model. Not for online
    methods."""
    group_gradient: Literal["auto", "one_pass", "two_pass"] = "auto"
    """`one_pass` keeps the activations of all images of the step; `two_pass` computes the images' weights first
    and needs memory for `micro_batch` images only; the gradients are equal. `auto`: one pass where all images of the
    step fit into `micro_batch`. Not for online methods."""
    checkpoint_every: int = Field(50, ge=1, le=MOST_STEPS)
    """Steps between checkpoints. 1 or more; the last step always has one. With online methods a checkpoint waits for
    the end of its round."""
    keep_checkpoints: int = Field(3, ge=1, le=MOST_STEPS)
    """Checkpoints kept; older ones are deleted. 1 or more."""
    log_every: int = Field(1, ge=1, le=MOST_STEPS)
    """Steps between rows of metrics.jsonl. 1 or more."""
    eval_every: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps between evaluation points on the validation prompts; 0 = none."""
    trackers: Annotated[tuple[Tracker, ...], Field(strict=False)] = ()
    """Experiment trackers that get the metrics, by accelerate's names; metrics.jsonl is always written."""
    lora: LoraSection = LoraSection()
    """The trained adapter."""
    ema: EmaSection = EmaSection()
    """Moving average of the adapter."""
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    """Seed of the training alone: the adapter's start, which groups and images are drawn, sigma and noise. 0 or more.
    Nothing: `seed`. The images of the store and their scores stay those of `seed`."""
    stop_on_collapse: bool = False
    """End the training at an evaluation point whose verdict is `collapsed`; needs `eval_every` above 0."""
    shuffle_rewards: bool = False
    """Control experiment: permute the rewards among the images of each group, so that there is nothing to learn. What a
    run still gains is not the reward's doing."""
    cache_reference: bool = True
    """Keep the reference's velocity errors beside the store, so that no later training of the same draws computes them
    again: the other values of an ablation, or this one where `method.noise_bank` repeats draws. Changes speed, not the
    result (by rounding with a `noise_bank`). No effect with `model.sharding: fsdp`. Not for online methods."""
    prefetch: bool = True
    """Draw the next step's groups and noise while a step is computed. Changes speed, not the result. Not for online
    methods."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class EvalSection(StrictModel):
    """How `gdro eval` and the evaluation points measure a model."""

    images_per_prompt: int = Field(2, ge=1, le=MOST)
    """Images per held-out prompt in `gdro eval`. 1 or more."""
    steps: int | None = Field(None, ge=1, le=MOST)
    """Euler steps, 1 or more. Nothing: as in `sample`."""
    guidance: float | None = Field(None, ge=0)
    """Guidance scale, 0 or more. Nothing: as in `sample`."""
    seed: int = Field(1000, ge=0, le=MOST_SEED)
    """Seed of the evaluation's noise. 0 or more. Base and trained model get the same noise."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of the adapter are evaluated: their moving average or the raw ones."""
    checkpoint: Literal["best", "last"] = "best"
    """Of which step: the evaluation point with the best corrected score on the validation prompts (where there is no
    judge, with the best headline measure: the OCR reward, or GenEval's overall accuracy), or the end of the training.
    A point of which more is missing than `reward.max_failed_share` or `judge.max_failed_share` is no candidate. Without
    evaluation points both are the end."""
    bootstrap: int = Field(2000, ge=100, le=MOST)
    """Resamples over prompts behind each 95 % confidence interval. 100 or more."""
    grid_prompts: int = Field(8, ge=0, le=MOST)
    """Prompts shown in the picture grid, base above trained; 0 = no grid."""
    validation_images_per_prompt: int = Field(1, ge=1, le=MOST)
    """Images per validation prompt at the evaluation points during training. 1 or more."""
