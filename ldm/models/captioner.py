"""pictures => captions, by an image-to-text network of transformers in a local folder: BLIP, GIT, ViT + GPT-2, ...

The folder is checked first (`safety`): safetensors alone, no code of its own. Captions are the likeliest words
(greedy, or by beams), so the same picture always gets the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.models.loading import load_network, loading
from ldm.models.safety import check_model_folder, read_json

PROMPT = "Describe the picture in a few words."  # for models that chat
BATCH = 8


class Captioner:
    """An image-to-text network, with what prepares its pictures and reads its tokens."""

    def __init__(self, model: Any, images: Any, tokenizer: Any, processor: Any) -> None:
        self.model, self.images, self.tokenizer, self.processor = model, images, tokenizer, processor

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Captioner:
        """The network in a folder.

        Raises:
            FileNotFoundError: if there is no such folder, or it has no config.json.
            ValueError: if it is no image-to-text network, or holds more than data.
            OSError: if its weights are no safetensors, or the files of its tokenizer or its pictures are missing.
        """
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"--from: {folder} is no model's folder: it has no config.json")
        check_model_folder(folder)
        kind = read_json(folder / "config.json").get("model_type")
        if kind not in KNOWN:
            raise ValueError(
                f"--from: {folder / 'config.json'}: model_type is {kind!r}; expected an image-to-text model of "
                "transformers, such as blip, git, vision-encoder-decoder"
            )
        model = load_network(transformers.AutoModelForImageTextToText, folder, whole=False, dtype=torch.float32)
        with loading(folder):
            local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            processor = None
            if (folder / "processor_config.json").exists() or (folder / "chat_template.jinja").exists():
                processor = transformers.AutoProcessor.from_pretrained(folder, **local)
            images = transformers.AutoImageProcessor.from_pretrained(folder, **local)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        return cls(model.eval().requires_grad_(False).to(device), images, tokenizer, processor)

    def captions(
        self, pictures: Iterable[Image.Image], prompt: str | None = None, max_tokens: int = 32, beams: int = 1
    ) -> Iterator[str]:
        """A caption of each picture, of at most so many tokens, as soon as its batch is done.

        Args:
            pictures: mode RGB.
            prompt: what the caption follows; models that chat get PROMPT without it.
            beams: of the search; 1 is greedy.
        """
        waiting: list[Image.Image] = []
        for picture in pictures:
            waiting.append(picture)
            if len(waiting) == BATCH:
                yield from self._batch(waiting, prompt, max_tokens, beams)
                waiting = []
        if waiting:
            yield from self._batch(waiting, prompt, max_tokens, beams)

    @torch.no_grad()
    def _batch(self, pictures: Sequence[Image.Image], prompt: str | None, max_tokens: int, beams: int) -> Iterator[str]:
        chats = bool(getattr(self.processor, "chat_template", None))
        if chats:
            said = [{"type": "image"}, {"type": "text", "text": prompt or PROMPT}]
            text = self.processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)
            self.tokenizer.padding_side = "left"
            inputs = self.processor(
                images=[[picture] for picture in pictures], text=[text] * len(pictures), padding=True,
                return_tensors="pt",
            )  # fmt: skip
        else:
            inputs = self.images(images=list(pictures), return_tensors="pt")
            if prompt:
                inputs |= self.tokenizer([prompt] * len(pictures), return_tensors="pt", return_token_type_ids=False)
                if self.model.config.model_type == "git":  # its caption would end with the prompt's last token, [SEP]
                    inputs = {name: value if value.ndim > 2 else value[:, :-1] for name, value in dict(inputs).items()}
        inputs = {name: value.to(self.model.device) for name, value in dict(inputs).items()}
        tokens = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=beams)
        if chats:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # the answer alone
        for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True):
            yield " ".join(text.split())
