"""The small pictures that an upscaler learns from: kept beside the latent cache, each in one or two versions.

    version 0    the picture shrunk, as the base model's training shrank it
    version 1    that, encoded and decoded by the base's VAE, and most often noised a little and denoised in between,
                 as image-to-image does (SDEdit, Meng et al. 2022)

A base's own pictures differ from shrunk ones in what it blurs and gets wrong, but they belong to no large picture.
Version 1 has these faults and still belongs to one. How much is noised away, and the noise, are a function of (seed,
picture), so each is made once, ahead of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.batches import PIXELS, load_pixels
from ldm.data.cache.latents import Builder, save_table
from ldm.data.cache.store import Kind, Store, to_keys
from ldm.data.dataset import Row
from ldm.data.images import to_pixels
from ldm.data.rows import count
from ldm.models.fingerprint import model_sha256
from ldm.models.safety import check_model_folder, read_json
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import decode, encode
from ldm.pipelines.loading import UPSCALER, find_pipeline
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.files import check_space
from ldm.system.memory import give_back
from ldm.training.config import Config
from ldm.training.distributed import Tick, on_rank_0
from ldm.training.facts import RunFacts, folder_stamp, stamp
from ldm.training.randomness import generator

STEPS = 10  # of the base's sampler; a version takes up to upscale.base_strength of them

#: What a version is made of: pixels [3,s,s], a caption, and the hash of the picture's content.
Source = tuple[Tensor, str, bytes]


@dataclass(frozen=True)
class SmallPictures:
    """Small pictures of some rows.

    Attributes:
        rows: of the large pictures.
        size: edge in pixels.
        store, table: the versions [V,3,s,s] in 8 bits, and the key of each row's; None to shrink pictures at access,
            version 0 alone.
    """

    rows: Sequence[Row]
    size: int
    store: Store | None = None
    table: Any = None

    def pixels(self, number: int, version: int, flip: bool) -> Tensor:
        """Row `number`'s small picture [3,s,s] in [-1,1]. Raises DamagedError."""
        if self.store is None:
            return load_pixels(self.rows[number], self.size, flip=flip)
        small = self.store.array(self.table[number, 0].tobytes())[version]
        pixels = torch.from_numpy(to_pixels(np.moveaxis(small, 0, -1)))
        return pixels.flip(-1) if flip else pixels


class Base:
    """The model whose pictures are to be upscaled: `upscale.base`.

    Raises:
        ValueError: if it makes pictures of another size, or takes more than a caption; names the key.
        OSError: if there is no such folder or id.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        assert config.upscale.base is not None
        self.config, self.device, self.dtype = config, device, dtype
        try:
            self.folder = find_pipeline(config.upscale.base)
            check_model_folder(self.folder)
            unet, vae = (read_json(self.folder / part / "config.json") for part in ("unet", "vae"))
        except (OSError, ValueError) as error:
            raise type(error)(f"upscale.base: {error}") from None
        name, small = config.upscale.base, config.data.size // config.upscale.factor
        if read_json(self.folder / "model_index.json").get("_class_name") == UPSCALER:
            raise ValueError(f"upscale.base: {name} is an upscaler; name the model whose pictures are to be upscaled")
        if unet["in_channels"] != unet["out_channels"] or unet.get("num_class_embeds") or unet.get("class_embed_type"):
            raise ValueError(
                f"upscale.base: {name} takes a class, numbers or a second picture; expected a model of captions alone"
            )
        scheduler = read_json(self.folder / "scheduler/scheduler_config.json")
        if unet.get("time_cond_proj_dim") is not None or scheduler.get("solver_order") == 1:  # as diffusion.few_steps
            raise ValueError(
                f"upscale.base: {name} knows a few steps alone, and image-to-image takes others; name the model it was "
                "trained from"
            )
        edge = unet["sample_size"] * 2 ** (len(vae.get("block_out_channels") or [0]) - 1)
        if edge != small:
            raise ValueError(
                f"upscale.base: {name} makes pictures of {edge} pixels, and data.size={config.data.size} shrunk by "
                f"upscale.factor={config.upscale.factor} is {small}; set data.size={edge * config.upscale.factor}"
            )

    @cached_property
    def sha256(self) -> str:
        """Which model it is, on this run's device and in its dtype; remembered by the stamp of its files."""
        facts, state = RunFacts(self.config.run), stamp(folder_stamp(self.folder), str(self.dtype))
        known: str | None = facts.recall("upscale.base", state) if folder_stamp(self.folder) else None
        if known is None:
            known = model_sha256(self.pipeline)
            if folder_stamp(self.folder):
                facts.keep("upscale.base", state, known)
        return known

    @cached_property
    def pipeline(self) -> LDMPipeline:
        """The model, in memory until `free`."""
        pipeline = LDMPipeline.from_pretrained(self.folder, dtype=self.dtype).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def free(self) -> None:
        """Free its memory."""
        self.__dict__.pop("pipeline", None)
        give_back()

    @torch.no_grad()
    def through(self, sources: Sequence[Source]) -> Tensor:
        """Version 1 of pictures, [B,3,s,s] in [-1,1]."""
        pixels = torch.stack([picture for picture, _, _ in sources])
        rngs = [generator(self.config.seed, "base", content.hex()) for _, _, content in sources]
        most = round(self.config.upscale.base_strength * STEPS)
        steps = [int(torch.randint(most + 1, (), generator=rng)) for rng in rngs]
        seeds = [int(torch.randint(2**62, (), generator=rng)) for rng in rngs]
        made = torch.empty_like(pixels)
        for taken in sorted(set(steps)):
            some = [i for i, one in enumerate(steps) if one == taken]
            made[some] = self._versions(pixels[some], [sources[i][1] for i in some], [seeds[i] for i in some], taken)
        return made

    def _versions(self, pixels: Tensor, captions: list[str], seeds: list[int], steps: int) -> Tensor:
        """Pictures encoded, the last `steps` of the sampler's steps taken anew, and decoded."""
        pipe = self.pipeline
        if not steps:
            return decode(pipe.vae, encode(pipe.vae, pixels).mean).cpu()
        given: dict[str, Any] = {}
        if pipe.tokenizer is not None:  # captions that are too long are cut, as in training
            text = TextEncoder(pipe.tokenizer, pipe.text_encoder)
            given["prompt_embeds"] = text.encode(captions)
            given["negative_prompt_embeds"] = text.encode([""]).expand_as(given["prompt_embeds"])
        output: Any = pipe(
            image=(pixels + 1) / 2, strength=min(1.0, (steps + 0.5) / STEPS), num_inference_steps=STEPS,
            guidance_scale=pipe.defaults.guidance_scale, seed=seeds, output_type="pt", **given,
        )  # fmt: skip
        made: Tensor = output.images.float().cpu() * 2 - 1
        return made


def build_small_pictures(config: Config, rows: Sequence[Row], base: Base | None, name: str = "small") -> SmallPictures:
    """Make what is missing of these rows' small pictures, and open them. Every rank must call it; rank 0 makes them.

    Args:
        base: None for version 0 alone.
        name: of the table with the keys; one for each sequence of rows.
    Raises:
        NoSpaceError: if they don't fit on the disk.
        BadDataError: if a picture can't be read.
    """
    folder, table = config.cache_folder(), Path(config.run) / "cache" / f"{name}.npy"
    assert folder is not None, "data.cache is off"
    kind = small_kind(config, base)
    size = kind.shape[-1]

    def build(tick: Tick) -> None:
        builder = Builder(folder, tick=tick)
        hashes = builder.hashes(rows)
        captions = [row.captions[0] if base and row.captions else "" for row in rows]
        keys = to_keys(b"".join(kind.key(h, c.encode()) for h, c in zip(hashes, captions, strict=True)))

        def load(number: int) -> Source:
            return load_pixels(rows[number], size, content=hashes[number]), captions[number], hashes[number]

        def versions(batch: list[Source]) -> Any:
            kinds = [torch.stack([pixels for pixels, _, _ in batch])]
            kinds += [base.through(batch)] if base else []
            return ((torch.stack(kinds, dim=1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()

        with builder.writer(kind) as writer:
            needs = {count(len(writer.missing(keys)), "small picture"): writer.needed(keys)}
            check_space(folder, needs)
            builder.fill(writer, keys, load, versions, "small picture")
        save_table(table, keys.reshape(-1, 1))
        if base:
            base.free()

    on_rank_0(build)
    return SmallPictures(rows, size, Store(folder / kind.file, kind), np.load(table, mmap_mode="r"))


def small_kind(config: Config, base: Base | None) -> Kind:
    """The store of small pictures [V,3,s,s]."""
    size = config.data.size // config.upscale.factor
    what: dict[str, Any] = {"size": size, "crop": "center", "background": config.data.background, "pixels": PIXELS}
    if base is not None:
        strength = config.upscale.base_strength
        what |= {"base": base.sha256, "strength": strength, "steps": STEPS, "seed": config.seed}
    return Kind("small", what, "u1", (1 if base is None else 2, 3, size, size))
