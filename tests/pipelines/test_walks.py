"""Walks start and end at the pipeline's own pictures, and their way is the formula's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from ldm.pipelines.text_to_image import LDMPipeline
from ldm.pipelines.walks import slerp, walk

WORDS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder: Path) -> LDMPipeline:
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_slerp_turns_evenly_at_an_even_length() -> None:
    a, b = torch.tensor([[1.0, 0, 0], [0, 2, 0]]), torch.tensor([[0.0, 1, 0], [0, 0, 2]])
    for f in (0, 0.25, 0.5, 1):
        c, s = math.cos(f * math.pi / 2), math.sin(f * math.pi / 2)
        assert torch.allclose(slerp(a, b, f), torch.tensor([[c, s, 0], [0, 2 * c, 2 * s]]), atol=1e-6)
    assert torch.allclose(slerp(a, a, 0.3), a) and bool(slerp(a, -a, 0.5).isfinite().all())
    noise = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert abs(slerp(noise[:1], noise[1:], 0.5).std() - 1) < 0.02 < 1 - torch.lerp(*noise, 0.5).std()


@pytest.mark.parametrize("sampler", [None, "euler-a"])
@pytest.mark.parametrize(("prompts", "seeds"), [(["cat", "pizza"], [3]), (["cat"], [3, 8]), (["cat", "pizza"], [3, 8])])
def test_a_walk_starts_and_ends_at_the_pipeline_s_pictures(
    prompts: list[str], seeds: list[int], sampler: str | None, pipe: LDMPipeline
) -> None:
    """Bit for bit if a picture is made alone; a sampler that adds noise adds the first seed's to all pictures."""
    words = {**WORDS, "sampler": sampler}
    pictures = walk(pipe, prompts, seeds, 4, batch_size=1, **words)
    ends = [pipe(prompts[i], seed=seeds[i], **words).images[0] for i in (0, -1)]
    assert len(pictures) == 4 and np.array_equal(pictures[0], ends[0])
    assert np.array_equal(pictures[-1], ends[1]) == (sampler is None or len(seeds) == 1)
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_the_way_between_is_straight_for_contexts_and_an_arc_for_noise(pipe: LDMPipeline) -> None:
    with torch.no_grad():
        a, b = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("cat", "pizza"))
    one, other = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 8))
    pictures = walk(pipe, ["cat", "pizza"], [3, 8], 3, batch_size=2, **WORDS)
    (expected,) = pipe(prompt_embeds=(a + b) / 2, latents=slerp(one, other, 0.5), **WORDS).images
    assert np.abs(np.asarray(pictures[1]).astype(int) - np.asarray(expected)).max() <= 1
    (wide,) = walk(pipe, ["cat"], [3, 8], 2, height=16, width=24, **WORDS)[:1]
    assert wide.size == (24, 16)


def test_classes_walk_between_seeds(tmp_path: Path) -> None:
    pipe = tiny.class_pipeline(tmp_path, ("food", "flags"))
    pictures = walk(pipe, [], [1, 2], 3, batch_size=1, class_label="flags", **WORDS)
    (first,) = pipe(class_label="flags", seed=1, **WORDS).images
    assert np.array_equal(pictures[0], first)
    with pytest.raises(ValueError, match="prompts: this model knows no text; walk between two seeds"):
        walk(pipe, ["a", "b"])


@pytest.mark.parametrize(
    ("prompts", "seeds", "frames", "message"),
    [
        (["cat"], [1], 4, "prompts: expected two prompts or two seeds to walk between"),
        (["cat"] * 3, [1], 4, "prompts: expected one, or two to walk between"),
        ("cat", [1, 2], 4, "prompts: expected one, or two to walk between, got 'cat'"),
        (["cat"], [], 4, "seeds: expected one, or two"),
        (["cat"] * 2, [1, 2], 4, "prompts: 'cat' is both ends"),
        (["cat"], [7, 7], 4, "seeds: 7 is both ends, so all pictures would be one; name two, or it once"),
        (["cat"], [1, -1], 4, "seeds: expected a whole number from 0"),
        (["cat", "pizza"], [1], 1, "frames: expected a .*number from 2"),
    ],
)
def test_what_is_no_walk_is_refused(
    prompts: Any, seeds: list[int], frames: int, message: str, pipe: LDMPipeline
) -> None:
    with pytest.raises(ValueError, match="^" + message):
        walk(pipe, prompts, seeds, frames, **WORDS)
