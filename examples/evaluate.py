"""Evaluate from Python: a first look at a model, with metrics in OUT/evaluation.json and a report in OUT/report.html.

python examples/evaluate.py [MODEL] [PICTURES] [OUT]
"""

import sys
from pathlib import Path

from ldm import LDMPipeline
from ldm.data.dataset import read_captioned
from ldm.evaluation.evaluate import QUICK, evaluate
from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings
from ldm.evaluation.features import pixel_extractor
from ldm.evaluation.report.text import summary


def main(model: str = "models/emoji", pictures: str = "data/emoji", out: str = "evaluation") -> None:
    pipe = LDMPipeline.from_pretrained(model).to_best_device()
    evaluated, defaults = EvaluatedModel(pipe, Path(model)), pipe.defaults
    settings = SamplingSettings(defaults.num_inference_steps, defaults.guidance_scale, 0, defaults.guidance_interval)
    extractors = [pixel_extractor(evaluated.size)]  # load_extractor("facebook/dinov2-small", …) adds FID and its kin
    report = evaluate(evaluated, read_captioned(pictures), extractors, settings, Path(out), QUICK)
    print(summary(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
