"""The inputs of both trainings, for each setting: a folder of pictures and a folder in Stable Diffusion's layout.

| setting | VAE                                        | text encoder                              | tokens |
|---------|--------------------------------------------|-------------------------------------------|--------|
| A       | of Stable Diffusion's size (f8, 84 M)      | of CLIP-L's size (12 layers, 768 wide)    | 77     |
| B       | configs/openmoji64.yaml's (f4)             | of CLIP-L's size                          | 77     |
| C       | configs/openmoji64.yaml's (f4)             | a CLIP of MiniLM's size (6 layers, 384)   | 24     |

Weights are random, from a fixed seed: nothing is downloaded, and speed does not depend on weights. The U-Net is the
recipe's with one block per level, and both trainings start from the same weights. Pictures are flattened on white
beforehand, since the peer drops the alpha channel. Only training pictures are in the folder, since the peer has no
held-out split.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.batches import spread
from ldm.data.dataset import read_captioned
from ldm.diffusion.schedule import NoiseSchedule, scheduler_config
from ldm.models.text_encoder import TextConfig, TextEncoder
from ldm.models.unet import UNetConfig, build_unet
from ldm.models.vae import VAEConfig, build_vae, downsampling, load_vae
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.training.normalization import normalize_on

SIZE = 64  # pixels
UNET = UNetConfig(channels=(128, 192, 256), attention=(False, True, True), layers=1)
VAE = VAEConfig(channels=(32, 64, 128), layers=1, latent_channels=4)
SD_WIDTHS = (128, 256, 512, 512)


@dataclass(frozen=True)
class Setting:
    """Sizes of the networks.

    Attributes:
        sd_vae: whether the VAE has Stable Diffusion's size, or ours.
        layers, width, heads, vocabulary: of the CLIP text encoder.
        tokens: length that captions are padded to.
    """

    name: str
    sd_vae: bool
    layers: int
    width: int
    heads: int
    vocabulary: int
    tokens: int
    unet_config: UNetConfig = UNET

    def text_config(self) -> Any:
        """The text encoder's configuration."""
        from transformers import CLIPTextConfig

        return CLIPTextConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            projection_dim=self.width,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=self.vocabulary - 2,
            eos_token_id=self.vocabulary - 1,
            pad_token_id=self.vocabulary - 1,
        )

    def vae(self) -> Any:
        """The VAE, with random weights."""
        from diffusers import AutoencoderKL

        if not self.sd_vae:
            return build_vae(VAE)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(SD_WIDTHS),
            up_block_types=("UpDecoderBlock2D",) * len(SD_WIDTHS),
            block_out_channels=SD_WIDTHS,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )

    def unet(self, latent_shape: tuple[int, int, int]) -> Any:
        """The U-Net, with random weights."""
        return build_unet(self.unet_config, latent_shape=latent_shape, context_dim=self.width)


SETTINGS = {
    "A": Setting("A", sd_vae=True, layers=12, width=768, heads=12, vocabulary=49408, tokens=77),
    "B": Setting("B", sd_vae=False, layers=12, width=768, heads=12, vocabulary=49408, tokens=77),
    "C": Setting("C", sd_vae=False, layers=6, width=384, heads=12, vocabulary=30522, tokens=24),
}


@dataclass(frozen=True)
class Folders:
    """The inputs of both trainings.

    Attributes:
        model: in Stable Diffusion's layout.
        text: the same text encoder and tokenizer in one folder, for ours.
        data: pictures and metadata.jsonl.
    """

    setting: Setting
    model: Path
    text: Path
    data: Path
    pictures: int

    def ours(self, run: Path, batch_size: int, steps: int, threads: int, *overrides: str) -> list[str]:
        """The arguments of train_ldm.py, without checkpoints, previews and validations on the way, as for the peer."""
        chosen = {
            "run": run,
            "vae": self.model,
            "data.source": self.data,
            "data.size": SIZE,
            "data.holdout": 0,
            "text.encoder": self.text,
            "text.max_length": self.setting.tokens,
            "unet.channels": list(self.setting.unet_config.channels),
            "unet.attention": json.dumps(self.setting.unet_config.attention),
            "unet.layers": self.setting.unet_config.layers,
            "diffusion.prediction": "v",
            "diffusion.weighting": "min_snr",
            "loop.steps": steps,
            "loop.batch_size": batch_size,
            "loop.threads": threads,
            "loop.prompts": [],
            "loop.sample_every": 0,
            "loop.evaluate_every": 0,
            "loop.checkpoint_every": 0,
        }
        return [*(f"{key}={value}" for key, value in chosen.items()), *overrides]

    def peer(self, out: Path, batch_size: int, steps: int, *flags: str) -> list[str]:
        """The arguments of train_text_to_image.py: the necessary ones, and these flags."""
        chosen = {
            "pretrained_model_name_or_path": self.model,
            "train_data_dir": self.data,
            "cache_dir": out / "datasets",
            "output_dir": out / "run",
            "resolution": SIZE,
            "train_batch_size": batch_size,
            "max_train_steps": steps,
            "checkpointing_steps": 10**9,
        }
        return [*(f"--{key}={value}" for key, value in chosen.items()), *flags]


def build(
    setting: Setting, source: str, folder: Path, most: int = 0, seed: int = 0, vae: Path | None = None
) -> Folders:
    """Make a setting's folders in `folder`, which is deleted first.

    Args:
        source: captioned pictures.
        most: training pictures, spread evenly; 0 is all.
        seed: of the U-Net's first weights.
        vae: a trained VAE instead of a random one, with which the model can learn something.
    """
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    captions = save_pictures(source, folder / "data", most)
    torch.manual_seed(1)
    autoencoder = load_vae(vae) if vae else setting.vae().eval()
    if vae:  # the peer doesn't normalize latents itself
        normalize_on(autoencoder, read_captioned(str(folder / "data"), holdout=0), SIZE)
    text = text_encoder(setting, captions, folder / "text")
    size = SIZE // downsampling(autoencoder)
    torch.manual_seed(seed)  # as train_ldm.py does before it builds its own
    unet = setting.unet((autoencoder.config.latent_channels, size, size))
    scheduler = scheduler_config(NoiseSchedule.scaled_linear(), "v")
    LDMPipeline.from_components(autoencoder, text, unet, scheduler).save_pretrained(folder / "model")
    return Folders(setting, folder / "model", folder / "text", folder / "data", len(captions))


def save_pictures(source: str, folder: Path, most: int) -> list[str]:
    """Training pictures as RGB files with a metadata.jsonl; returns their captions."""
    rows = read_captioned(source).train
    (folder / "images").mkdir(parents=True)
    captions = []
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for number in spread(len(rows), most or len(rows)):
            row, name = rows[number], f"images/{number:06d}.png"
            row.image(row.read()).convert("RGB").save(folder / name)
            captions.append(row.captions[0])
            table.write(json.dumps({"file_name": name, "text": captions[-1]}) + "\n")
    return captions


def text_encoder(setting: Setting, captions: Sequence[str], folder: Path) -> TextEncoder:
    """A CLIP text encoder with random weights, and byte pairs learned from the captions."""
    import torch
    from transformers import CLIPTextModel

    tokenizer = byte_pairs(captions, setting.vocabulary)
    tokenizer.model_max_length = setting.tokens
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    CLIPTextModel(setting.text_config()).save_pretrained(folder)
    return TextEncoder.load(TextConfig(encoder=str(folder), max_length=setting.tokens))


def byte_pairs(captions: Sequence[str], size: int) -> Any:
    """CLIP's kind of tokenizer: pairs learned from captions, tokens that never occur, start and end last."""
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = [*string.printable[:94], *(f"{letter}</w>" for letter in string.printable[:94])]
    untrained = CLIPTokenizer(vocab={piece: i for i, piece in enumerate([*letters, start, end])}, merges=[])
    learned = untrained.train_new_from_iterator([caption.lower() for caption in captions], size, show_progress=False)
    model = json.loads(learned.backend_tokenizer.to_str())["model"]
    pieces = [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if piece not in (start, end)]
    unused = [f"unused{i}</w>" for i in range(size - len(pieces) - 2)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *unused, start, end])}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]])
