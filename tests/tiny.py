"""Tiny but real: the stock classes at toy size, with random weights from a fixed seed, made offline in a second.

A tiny pipeline draws noise, but it draws it through every line that a large one does.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from diffusers import LCMScheduler, StableDiffusionPipeline

from ldm.data.labels import Labels
from ldm.data.numbers import Numbers
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.schedule import NoiseSchedule, scheduler_config
from ldm.models.fingerprint import base_fingerprints
from ldm.models.lora import NAME, LoRAConfig, LoRAFacts, adapter_weights, add_adapters, save_adapters
from ldm.models.text_encoder import TextConfig, TextEncoder
from ldm.models.unet import UNetConfig, build_unet, student_of
from ldm.models.vae import VAEConfig, build_vae, downsampling
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.pipelines.upscale import LDMUpscalePipeline

Kind = Literal["bert", "clip", "t5", "gpt2"]
KINDS: tuple[Kind, ...] = ("bert", "clip", "t5", "gpt2")
SIZE = 16  # edge of a picture in pixels
MAX_LENGTH = 12  # tokens, special ones included
WORDS = ["red", "blue", "green", "heart", "pizza", "rocket", "cat", "face", "house", "with", "garden", "flag", "japan"]


def save_text_encoder(folder: Path, kind: Kind, width: int = 32) -> Path:
    """Save an encoder and its tokenizer in `folder`, as they come from the Hub."""
    torch.manual_seed(1)
    tokenizer, model = {"bert": _bert, "clip": _clip, "t5": _t5, "gpt2": _gpt2}[kind](width)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _bert(width: int) -> tuple[Any, Any]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *WORDS, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), ":"]
    config = transformers.BertConfig(
        vocab_size=len(pieces),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    tokenizer = transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    return tokenizer, transformers.BertModel(config)


def _clip(width: int) -> tuple[Any, Any]:
    # byte pairs without merges: every letter is a token, but a whole word of WORDS is merged from them
    letters = [*string.ascii_lowercase, ":"]
    merges, merged = [], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (pair := f"{parts[0]} {parts[1]}") not in merges:
                merges.append(pair)
                merged.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    special = ["<|startoftext|>", "<|endoftext|>"]
    pieces = list(dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *merged, *special]))
    tokenizer = transformers.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[tuple(pair.split()) for pair in merges]
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, transformers.CLIPTextModel(config)


def _t5(width: int) -> tuple[Any, Any]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [*special, *((f"▁{word}", -3.0) for word in WORDS), *((letter, -6.0) for letter in string.ascii_lowercase)]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2
    )
    return tokenizer, transformers.T5EncoderModel(config)


def _gpt2(width: int) -> tuple[Any, Any]:
    tokenizer = gpt2_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=width, n_layer=2, n_head=2, n_inner=2 * width
    )
    return tokenizer, transformers.GPT2Model(config)


def gpt2_tokenizer() -> Any:
    """GPT-2's tokenizer, of letters and no merges; as from the Hub it has no token for padding."""
    letters = [*string.ascii_lowercase, ":", "Ġ", *(f"Ġ{letter}" for letter in string.ascii_lowercase)]
    pieces = [*letters, *WORDS, "<|endoftext|>"]
    return transformers.GPT2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


def text_encoder(folder: Path, kind: Kind = "bert", max_length: int = MAX_LENGTH) -> TextEncoder:
    """A tiny encoder, through the files that `TextEncoder.load` reads."""
    return TextEncoder.load(TextConfig(encoder=str(save_text_encoder(folder, kind)), max_length=max_length))


def pipeline(
    folder: Path,
    kind: Kind = "bert",
    schedule: NoiseSchedule | None = None,
    prediction: Prediction = "eps",
    vae_config: VAEConfig | None = None,
) -> LDMPipeline:
    """A pipeline that draws pictures of SIZE pixels; `folder` is where its text encoder is made."""
    text = text_encoder(folder, kind)
    torch.manual_seed(2)
    vae = build_vae(vae_config or VAEConfig(channels=(16, 32), layers=1)).eval()
    size = SIZE // downsampling(vae)
    shape = (vae.config.latent_channels, size, size)
    unet = build_unet(
        UNetConfig(channels=(32, 64), attention=(True, True), layers=1, head_channels=16),
        latent_shape=shape,
        context_dim=text.dim,
    )
    drawing = LDMPipeline.from_components(
        vae, text, unet.eval(), scheduler_config(schedule or NoiseSchedule.scaled_linear(), prediction)
    )
    drawing.set_progress_bar_config(disable=True)
    return drawing


def student_pipeline(folder: Path, prediction: Prediction = "v") -> LDMPipeline:
    """The same for a model that was distilled: it is given the guidance scale, by weights that are not zero."""
    whole = pipeline(folder, prediction=prediction)
    student = student_of(whole.unet, 16)
    torch.manual_seed(5)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.3)
    scheduler = LCMScheduler.from_config({**whole.scheduler.config, "original_inference_steps": 50})
    whole.register_modules(unet=student.eval(), scheduler=scheduler)
    return whole


def class_pipeline(folder: Path, names: tuple[str, ...]) -> LDMPipeline:
    """The same for a model that knows these classes, and no text."""
    whole = pipeline(folder)
    torch.manual_seed(3)
    unet = build_unet(
        UNetConfig(channels=(32, 64), attention=(False, True), layers=1, head_channels=16),
        latent_shape=(whole.unet.config.in_channels, whole.unet.config.sample_size, whole.unet.config.sample_size),
        context_dim=None,
        classes=len(names) + 1,
    )
    drawing = LDMPipeline.from_components(
        whole.vae, None, unet.eval(), scheduler_config(NoiseSchedule.scaled_linear(), "eps")
    )
    drawing.labels = Labels("kind", names)
    drawing.set_progress_bar_config(disable=True)
    return drawing


def numbers_pipeline(folder: Path, numbers: Numbers) -> LDMPipeline:
    """The same for a model that is conditioned on these numbers, beside text."""
    whole = pipeline(folder)
    torch.manual_seed(5)
    size = whole.unet.config.sample_size
    unet = build_unet(
        UNetConfig(channels=(32, 64), attention=(False, True), layers=1, head_channels=16),
        latent_shape=(whole.unet.config.in_channels, size, size),
        context_dim=whole.unet.config.cross_attention_dim,
        numbers=numbers.width,
    )
    whole.register_modules(unet=unet.eval())
    whole.numbers = numbers
    return whole


def inpaint_pipeline(folder: Path) -> LDMPipeline:
    """The same for a model that was trained to fill in masked parts."""
    return condition_pipeline(folder, mask_channels=1)


def upscale_pipeline(folder: Path) -> LDMUpscalePipeline:
    """An upscaler that makes pictures of 2 * SIZE pixels of ones of SIZE."""
    text = text_encoder(folder)
    torch.manual_seed(5)
    vae = build_vae(VAEConfig(channels=(16, 32), layers=1)).eval()
    unet = build_unet(
        UNetConfig(channels=(32, 64), attention=(False, True), layers=1, head_channels=16),
        latent_shape=(vae.config.latent_channels, SIZE, SIZE),
        context_dim=text.dim,
        classes=351,
        condition_channels=3,
    )
    scheduler = scheduler_config(NoiseSchedule.scaled_linear(), "eps")
    upscaling = LDMUpscalePipeline.from_components(vae, text, unet.eval(), scheduler, max_noise_level=350)
    upscaling.set_progress_bar_config(disable=True)
    return upscaling


def condition_pipeline(folder: Path, mask_channels: int = 0) -> LDMPipeline:
    """The same for a model that is conditioned on a second picture, beside text."""
    whole = pipeline(folder)
    torch.manual_seed(4)
    channels, size = whole.vae.config.latent_channels, whole.unet.config.sample_size
    unet = build_unet(
        UNetConfig(channels=(32, 64), attention=(False, True), layers=1, head_channels=16),
        latent_shape=(channels, size, size),
        context_dim=whole.unet.config.cross_attention_dim,
        condition_channels=channels + mask_channels,
    )
    whole.register_modules(unet=unet.eval())
    return whole


def lora(base: Path, folder: Path, config: LoRAConfig, seed: int = 0, few_steps: int = 0) -> Any:
    """A stock pipeline with adapters that are not zero, in memory, and saved in a folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    prints = base_fingerprints(pipeline.unet)
    torch.manual_seed(seed)
    add_adapters(pipeline.unet, pipeline.text_encoder if config.text_encoder else None, config)
    rng = torch.Generator().manual_seed(seed)
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    for network in networks.values():
        for name, weight in network.named_parameters():
            assert weight.requires_grad == (".lora_" in name) or network is pipeline.text_encoder
            if ".lora_" in name:
                weight.data += 0.2 * torch.randn(weight.shape, generator=rng)
    configs = {name: one.peft_config[NAME] for name, one in networks.items() if hasattr(one, "peft_config")}
    facts = LoRAFacts("tiny", prints, "in a style", ["red heart in a style"], config.rank, 8.0, few_steps=few_steps)
    save_adapters(folder, adapter_weights(pipeline.unet), adapter_weights(pipeline.text_encoder), configs, facts)
    return pipeline
