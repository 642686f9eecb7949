"""Tiny random models of the real pipeline classes, one builder per family, small enough to build in a second or two."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import torch
from PIL import Image
from torch import nn

from gdro_cli.models.base import Conditioning, FlowModel

SIZE = {"height": 32, "width": 48}
"""Image size of the tests: 4 x 6 latent pixels, 2 x 3 tokens; not square, so that swapped axes show."""
T5_TOKENS = 12
WIDTH = 24
"""Text width of the tiny transformers."""

_CHAT = (
    "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% if not enable_thinking %}-{% endif %}{% endif %}"
)


@contextmanager
def seeded() -> Iterator[None]:
    """Random weights that are the same in every run, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def loud(module: nn.Module) -> Any:
    """Give every matrix a size that matters for the output; some layers start at zero."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()


def autoencoder(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=0.4,
        shift_factor=0.1,
        **options,
    ).eval()


def clip_tokenizer(*, length: int = 16) -> Any:
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase
    words = {piece: i for i, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    words |= {f"{letter}</w>": len(words) + i for i, letter in enumerate(letters)}
    return CLIPTokenizer(vocab=words, merges=[], model_max_length=length)


def clip_encoder(width: int, *, positions: int = 77) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=16,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModelWithProjection(config).eval()


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def t5_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=30, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False)
    ).eval()


def qwen_tokenizer() -> Any:
    """A byte-pair tokenizer without merges: one token per byte, and a chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {"<|endoftext|>": 0} | {byte: i + 1 for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    return Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=_CHAT)


_VISION_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def qwen3_config(*, width: int, layers: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


def llama_tokenizer() -> Any:
    """One token per byte after a first token; it has no token for padding, like the published one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<first>": 0, "<end>": 1}
    vocab |= {byte: i + 2 for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<first> $A", special_tokens=[("<first>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<first>", eos_token="<end>")


def gemma_tokenizer(template: str) -> Any:
    """One token per letter, and one for the text that the pipeline puts before each prompt."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters]
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], add_bos_token=True)
    tokenizer.add_tokens([template])
    return tokenizer


def gemma_encoder() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        query_pre_attn_scalar=4,
    )
    return Gemma2Model(config).eval()


def scheduler(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def sources(count: int) -> list[Image.Image]:
    """Images to edit, of the tests' size."""
    pixels = torch.randint(256, (count, SIZE["height"], SIZE["width"], 3), generator=torch.Generator().manual_seed(5))
    return [Image.fromarray(one.numpy().astype("uint8")) for one in pixels]


def encode(model: FlowModel, prompts: Sequence[str]) -> list[Conditioning]:
    """The conditionings of prompts; a model that edits edits one image with all of them."""
    return model.encode(prompts, sources(1) * len(prompts) if model.edits else ())


def set_up(pipe: Any) -> None:
    """Let a pipeline draw what the family draws at the tests' size, as the model card says."""
    from gdro_cli.models.diffusers_flow import FAMILIES

    setup = Template(FAMILIES[type(pipe).__name__].pipeline_setup).substitute(SIZE)
    exec(setup, {"pipe": pipe})
    if type(pipe).__name__ == "SanaPipeline":
        pipe.check_inputs = lambda *_: None  # it demands multiples of 32, the pixels per token of the published models


def build_flux(
    folder: Path, *, guidance_embeds: bool = False, dynamic_shift: bool = True, pipeline: str = "FluxPipeline"
) -> Path:
    """FLUX.1, with or without a guidance input, its schedule shifted by image size or by a fixed number."""
    import diffusers
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with seeded():
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        )
        clip = CLIPTextConfig(
            vocab_size=54,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
        getattr(diffusers, pipeline)(
            scheduler=scheduler(use_dynamic_shifting=dynamic_shift, shift=3.0),
            vae=autoencoder(),
            text_encoder=CLIPTextModel(clip).eval(),
            tokenizer=clip_tokenizer(length=77),
            text_encoder_2=t5_encoder(),
            tokenizer_2=t5_tokenizer(),
            transformer=loud(transformer),
        ).save_pretrained(folder)
    return folder


def build_chroma(folder: Path) -> Path:
    """Chroma, with the spacing of noise levels that it is published with."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    with seeded():
        transformer = ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=2,
        )
        ChromaPipeline(
            scheduler=scheduler(use_beta_sigmas=True),
            vae=autoencoder(),
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
            transformer=loud(transformer),
        ).save_pretrained(folder)
    return folder


def build_sd3(folder: Path, *, t5: bool = True, dual: bool = True) -> Path:
    """SD3.5-like (dual attention, normalised queries) or SD3-like, with or without T5."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    with seeded():
        transformer = SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=20,
            pos_embed_max_size=12,
            dual_attention_layers=(0,) if dual else (),
            qk_norm="rms_norm" if dual else None,
        )
        StableDiffusion3Pipeline(
            transformer=loud(transformer),
            scheduler=scheduler(shift=3.0),
            vae=autoencoder(),
            text_encoder=clip_encoder(8),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_encoder(12),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder() if t5 else None,
            tokenizer_3=t5_tokenizer() if t5 else None,
        ).save_pretrained(folder)
    return folder


def build_qwen_image(folder: Path, *, pipeline: str = "QwenImagePipeline", zero_cond_t: bool = False) -> Path:
    """Qwen-Image (or a Qwen-Image-Edit) with its linear-in-size shift that ends at 0.02."""
    import diffusers
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with seeded():
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.8, 1.2, 1.0],
        )
        encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": 257 + len(_VISION_TOKENS),
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
                    "bos_token_id": 0,
                    "eos_token_id": 0,
                    "pad_token_id": 0,
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": 16,
                    "fullatt_block_indexes": [0],
                },
                image_token_id=257,
                video_token_id=258,
                vision_start_token_id=259,
                vision_end_token_id=260,
            )
        )
        parts: dict[str, Any] = dict(
            transformer=loud(transformer),
            scheduler=scheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
            vae=vae.eval(),
            text_encoder=encoder.eval(),
            tokenizer=qwen_tokenizer(),
        )
        if pipeline == "QwenImagePipeline":
            diffusers.QwenImagePipeline(**parts).save_pretrained(folder)
            return folder
        parts["tokenizer"].add_special_tokens({"additional_special_tokens": _VISION_TOKENS})
        getattr(diffusers, pipeline)(**parts, processor=None).save_pretrained(folder)
        image_processor(parts["tokenizer"]).image_processor.save_pretrained(folder / "processor")
        index = json.loads((folder / "model_index.json").read_text())
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def build_qwen_image_edit(folder: Path) -> Path:
    return build_qwen_image(folder, pipeline="QwenImageEditPipeline")


def build_qwen_image_edit_plus(folder: Path) -> Path:
    """As Qwen-Image-Edit-2511, which differs from 2509 in ``zero_cond_t``."""
    return build_qwen_image(folder, pipeline="QwenImageEditPlusPipeline", zero_cond_t=True)


def image_processor(tokenizer: Any) -> Any:
    """Qwen2.5-VL's processor for images and texts; the part for videos needs torchvision."""
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

    class OfImages(Qwen2VLProcessor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, *_: Any) -> None: ...

    return OfImages(Qwen2VLImageProcessorPil(), tokenizer, None)


def open_pipeline(folder: Path, **options: Any) -> Any:
    """The pipeline in a folder, which draws what the family draws."""
    from diffusers import DiffusionPipeline
    from transformers import Qwen2Tokenizer

    if json.loads((folder / "model_index.json").read_text()).get("processor"):
        options["processor"] = image_processor(Qwen2Tokenizer.from_pretrained(folder / "tokenizer"))
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    set_up(pipe)
    return pipe


def build_z_image(folder: Path) -> Path:
    """Z-Image with the fixed shift of Turbo."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    with seeded():
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        )
        ZImagePipeline(
            transformer=loud(transformer),
            scheduler=scheduler(shift=3.0),
            vae=autoencoder(),
            text_encoder=Qwen3Model(qwen3_config(width=WIDTH, layers=3)).eval(),
            tokenizer=qwen_tokenizer(),
        ).save_pretrained(folder)
    return folder


def build_lumina2(folder: Path) -> Path:
    """Lumina-Image 2.0; its schedule is shifted as the pipeline does it, which the published one is not."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    with seeded():
        transformer = Lumina2Transformer2DModel(
            sample_size=16,
            in_channels=4,
            hidden_size=48,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 64, 64),
            cap_feat_dim=WIDTH,
        )
        pipe = Lumina2Pipeline(
            transformer=loud(transformer),
            scheduler=scheduler(use_dynamic_shifting=True),
            vae=autoencoder(),
            text_encoder=gemma_encoder(),
            tokenizer=gemma_tokenizer(""),
        )
        pipe.register_modules(tokenizer=gemma_tokenizer(pipe.system_prompt))
        pipe.save_pretrained(folder)
    return folder


def build_sana(folder: Path) -> Path:
    """SANA with the scheduler that it is published with."""
    import inspect

    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    with seeded():
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=WIDTH,
            sample_size=8,
        )
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,)),
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.4,
        )
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        SanaPipeline(
            transformer=loud(transformer),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            vae=vae.eval(),
            text_encoder=gemma_encoder(),
            tokenizer=gemma_tokenizer("\n".join(instruction)),
        ).save_pretrained(folder)
    return folder


def build_flux2_klein(folder: Path, *, distilled: bool = False) -> Path:
    """FLUX.2 klein base (or distilled), with batch statistics that are not the identity."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    with seeded():
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 8,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64
        )
        vae.bn.running_mean.copy_(torch.randn(16))
        vae.bn.running_var.copy_(torch.rand(16) + 0.5)
        Flux2KleinPipeline(
            transformer=loud(transformer),
            scheduler=scheduler(use_dynamic_shifting=True, shift=3.0),
            vae=vae.eval(),
            text_encoder=Qwen3ForCausalLM(qwen3_config(width=8, layers=28)).eval(),
            tokenizer=qwen_tokenizer(),
            is_distilled=distilled,
        ).save_pretrained(folder)
    return folder


def build_flux2(folder: Path) -> Path:
    """FLUX.2 dev; the published one has a processor, which needs torchvision, in place of the tokenizer."""
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    with seeded():
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 8,
            axes_dims_rope=(4, 4, 4, 4),
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64
        )
        vae.bn.running_mean.copy_(torch.randn(16))
        vae.bn.running_var.copy_(torch.rand(16) + 0.5)
        small = {"intermediate_size": 16, "num_attention_heads": 2, "head_dim": 4, "hidden_size": 8}
        config = Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": 261,
                "num_hidden_layers": 31,
                "num_key_value_heads": 1,
                **small,
            },
            vision_config={
                "model_type": "pixtral",
                "num_hidden_layers": 1,
                "image_size": 28,
                "patch_size": 14,
                **small,
            },
            image_token_index=258,
        )
        tokenizer = qwen_tokenizer()
        tokenizer.add_tokens([SYSTEM_MESSAGE])
        tokenizer.chat_template = (
            "{% for m in messages %}<{% for c in m.content %}{{ c.text }}{% endfor %}>{% endfor %}"
        )
        Flux2Pipeline(
            transformer=loud(transformer),
            scheduler=scheduler(use_dynamic_shifting=True, shift=3.0),
            vae=vae.eval(),
            text_encoder=Mistral3ForConditionalGeneration(config).eval(),
            tokenizer=tokenizer,
        ).save_pretrained(folder)
    return folder


def build_hidream(folder: Path) -> Path:
    """HiDream-I1 with the scheduler that Full is published with, and with its Llama, which it is published without."""
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel, UniPCMultistepScheduler
    from transformers import LlamaConfig, LlamaForCausalLM

    with seeded():
        transformer = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[WIDTH, 16],
            text_emb_dim=20,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=[0, 2, 1],
        )
        llama = LlamaConfig(
            vocab_size=258,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=0,
            eos_token_id=1,
        )
        HiDreamImagePipeline(
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            vae=autoencoder(),
            text_encoder=clip_encoder(8, positions=248),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_encoder(12, positions=248),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(),
            tokenizer_3=t5_tokenizer(),
            text_encoder_4=LlamaForCausalLM(llama).eval(),
            tokenizer_4=llama_tokenizer(),
            transformer=loud(transformer),
        ).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder / "tokenizer_4")  # without the padding that the pipeline has given it
    return folder


def build_flux2_klein_distilled(folder: Path) -> Path:
    return build_flux2_klein(folder, distilled=True)


def build_flux_kontext(folder: Path) -> Path:
    return build_flux(folder, guidance_embeds=True, pipeline="FluxKontextPipeline")


def build_sd3_without_t5(folder: Path) -> Path:
    return build_sd3(folder, t5=False, dual=False)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "flux-kontext": build_flux_kontext,
    "sd3": build_sd3,
    "sd3-without-t5": build_sd3_without_t5,
    "qwen-image": build_qwen_image,
    "qwen-image-edit": build_qwen_image_edit,
    "qwen-image-edit-plus": build_qwen_image_edit_plus,
    "z-image": build_z_image,
    "flux2": build_flux2,
    "flux2-klein": build_flux2_klein,
    "flux2-klein-distilled": build_flux2_klein_distilled,
    "chroma": build_chroma,
    "lumina2": build_lumina2,
    "sana": build_sana,
    "hidream": build_hidream,
}
