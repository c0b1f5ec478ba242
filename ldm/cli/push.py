"""`ldm push`: a run or a pipeline folder to the Hub, or into a folder to look at first."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.pipelines import import_networks

EXAMPLE = """ldm push runs/demo user/name --license mit --data "my photographs" --data-license cc0-1.0 --dry-run out
  (without --dry-run it is uploaded; `hf auth login` once before)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm push`."""
    add = parser.add_argument
    add("model", metavar="RUN_OR_MODEL", help="a run or a pipeline folder")
    add("repo_id", metavar="USER/NAME", help="where on the Hub; it is made if it isn't there")
    add("--license", required=True, help="of the weights, as the Hub spells it (cc-by-sa-4.0, apache-2.0, …)")
    add("--data", required=True, help="what it was trained on, in words")
    add("--data-license", required=True, help="of these data")
    add("--evaluation", type=Path, metavar="FOLDER", help="what `ldm evaluate` wrote (default: RUN/evaluation)")
    add("--private", action="store_true", default=None, help="make a private repository")
    add("--dry-run", type=Path, metavar="FOLDER", help="write there what would be uploaded, and upload nothing")


def run(arguments: argparse.Namespace) -> None:
    """Write or upload."""
    import_networks()
    from ldm.cli.evaluate import find_model
    from ldm.models.fingerprint import model_sha256
    from ldm.pipelines.text_to_image import LDMPipeline
    from ldm.sharing import hub
    from ldm.sharing.model_card import Terms

    terms = Terms(arguments.license, arguments.data, arguments.data_license)
    folder, home, config = find_model(arguments.model)
    pipeline = LDMPipeline.from_pretrained(folder).to_best_device()
    evaluation = arguments.evaluation
    if evaluation is None and hub.is_of(home, model_sha256(pipeline)):
        evaluation = home
    if evaluation is None:
        print(f"no figures: {home} holds no evaluation of this very model (ldm evaluate makes one)")
    if arguments.dry_run:
        hub.write_model(pipeline, arguments.dry_run, arguments.repo_id, terms, evaluation, config)
        print(f"what would be uploaded to {arguments.repo_id} is in {arguments.dry_run}")
        return
    address = hub.push(
        pipeline, arguments.repo_id, terms, evaluation=evaluation, config=config, private=arguments.private
    )
    print(f"it is at {address}")
