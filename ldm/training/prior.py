"""Prior preservation: the samples of a LoRA's training that hold prompts without its words to what the model does.

Before the first step the model itself generates pictures, of its example prompts and of the captions without the
trigger words: "pizza, ink style" becomes "pizza" (DreamBooth, Ruiz et al. 2023, section 3.3). A share of the
samples, `lora.keep`, shows them. Their target is not the picture: it is the model's own prediction of the same x_t.
Samples whose caption was dropped for guidance have that target, too. Adapters that do nothing there have no loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ldm.data.batches import spread
from ldm.models.text_encoder import TextEncoder
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.files import write_in_place
from ldm.training.distributed import Tick, on_rank_0
from ldm.training.randomness import Draw

PICTURES = 128  # that the model generates, each prompt in turn
BATCH = 16
FILE = "prior.safetensors"  # in the run


@dataclass(frozen=True)
class Prior:
    """The pictures of the model, and which samples show them.

    Attributes:
        share: of the samples, in (0, 1), besides those whose caption is dropped.
        latents: [K,C,h,w].
        contexts: [M,L,D], of the prompts; picture k shows prompt k % M.
    """

    share: float
    latents: Tensor
    contexts: Tensor

    def keeps(self, n: int) -> bool:
        """Whether sample n shows one of them: one sample of every 1 / share."""
        return math.floor((n + 1) * self.share) > math.floor(n * self.share)

    def __call__(self, n: int, drawn: Draw, sample: dict[str, Any]) -> dict[str, Any]:
        """Sample n, or one of the pictures; `kept` says that the model's own prediction is the target."""
        if drawn.caption is None or not self.keeps(n):
            return sample | {"kept": drawn.caption is None}
        picture = int(drawn.caption * len(self.latents))
        latents = self.latents[picture]
        shown = {"mean": latents, "std": torch.zeros_like(latents)}
        return sample | shown | {"context": self.contexts[picture % len(self.contexts)], "kept": True}


def build_prior(
    share: float, run: Path, stamp: str, captions: Sequence[str], load_model: Callable[[], LDMPipeline], seed: int
) -> Prior:
    """Generate the pictures, unless RUN/prior.safetensors has them. Every rank must call it; rank 0 generates.

    Args:
        stamp: of the model.
        captions: without the trigger words; the model's example prompts are generated as well.
    """
    file, known = run / FILE, f"2 {stamp} {seed} {PICTURES} {list(captions)}"

    def make(tick: Tick) -> None:
        if read(file, known) is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_in_place(file, save(generate(load_model(), captions, seed, tick), metadata={"stamp": known}))

    on_rank_0(make)
    tensors = read(file, known)
    assert tensors is not None, f"{file} was changed while it was read"
    return Prior(share, tensors["latents"], tensors["contexts"])


def read(file: Path, known: str) -> dict[str, Tensor] | None:
    """The tensors in a file, None if there is none, or one of something else."""
    try:
        with safe_open(file, framework="pt") as weights:
            if (weights.metadata() or {}).get("stamp") != known:
                return None
            return {name: weights.get_tensor(name) for name in ("latents", "contexts")}
    except (OSError, SafetensorError):
        return None


def prompts_of(examples: Sequence[str], captions: Sequence[str]) -> list[str]:
    """What the model generates: its example prompts, then captions; of more than `PICTURES` some of all the list."""
    first = list(dict.fromkeys(examples))[:PICTURES]
    rest = [caption for caption in captions if caption not in first]
    return first + [rest[i] for i in spread(len(rest), PICTURES - len(first))]


@torch.no_grad()
def generate(pipeline: LDMPipeline, captions: Sequence[str], seed: int, tick: Tick) -> dict[str, Tensor]:
    """Latents of the model's pictures, by its own defaults, and the contexts of their prompts, cut as in training."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = prompts_of(pipeline.example_prompts, captions)
    text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
    contexts, null = text.encode(prompts), text.encode([""])
    steps, scale = pipeline.defaults.num_inference_steps, pipeline.defaults.guidance_scale
    latents = []
    for start in tqdm(range(0, PICTURES, BATCH), "generating the model's own pictures", unit="batch", leave=False):
        numbers = range(start, min(start + BATCH, PICTURES))
        shown = contexts[[number % len(prompts) for number in numbers]]
        made: Any = pipeline(
            prompt_embeds=shown, negative_prompt_embeds=null.expand_as(shown),
            seed=[seed + number for number in numbers], output_type="latent",
            num_inference_steps=steps, guidance_scale=scale,
        )  # fmt: skip
        latents.append(made.images.float().cpu())
        tick()
    return {"latents": torch.cat(latents), "contexts": contexts.cpu()}
