"""`ldm push`: a run or a pipeline folder to the Hub, or into a folder to look at first."""

from __future__ import annotations

import argparse

from ldm.cli.parser import Command, path, place
from ldm.pipelines import import_networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=place, metavar="RUN_OR_MODEL", help="a run or a pipeline folder")
    add("repo_id", metavar="USER/NAME", help="the repository on the Hub; it is created if it does not exist")
    add("--license", required=True, help="of the weights, as the Hub spells it (cc-by-sa-4.0, apache-2.0, …)")
    add("--data", required=True, help="what the model was trained on, in words")
    add("--data-license", required=True, help="of the data")
    add("--evaluation", type=path, metavar="FOLDER", help="what `ldm evaluate` wrote (default: RUN/evaluation)")
    add("--private", action="store_true", default=None, help="create a private repository")
    add("--dry-run", type=path, metavar="FOLDER", help="write what would be uploaded into a folder, and upload nothing")


def run(arguments: argparse.Namespace) -> None:
    import_networks()
    from ldm.cli.find import find_model
    from ldm.models.fingerprint import model_sha256
    from ldm.pipelines.text_to_image import LDMPipeline
    from ldm.sharing import hub
    from ldm.sharing.model_card import Terms

    terms = Terms(arguments.license, arguments.data, arguments.data_license)
    folder, home, config = find_model(arguments.model)
    pipeline = LDMPipeline.from_pretrained(folder).to_best_device()
    evaluation = arguments.evaluation
    if evaluation is None and hub.is_evaluation_of(home, model_sha256(pipeline)):
        evaluation = home
    if evaluation is None:
        print(f"the card has no metrics: {home} holds no evaluation of this model (`ldm evaluate` makes one)")
    if arguments.dry_run:
        hub.write_model(pipeline, arguments.dry_run, arguments.repo_id, terms, evaluation, config)
        print(f"what would be uploaded to {arguments.repo_id} is in {arguments.dry_run}")
        return
    address = hub.push(
        pipeline, arguments.repo_id, terms, evaluation=evaluation, config=config, private=arguments.private
    )
    print(f"uploaded to {address}")


COMMAND = Command(
    "share a model on the Hugging Face Hub, with a model card that reports its metrics",
    """
ldm push runs/demo user/name --license mit --data "my photographs" --data-license cc0-1.0 --dry-run out
(without --dry-run it is uploaded; run `hf auth login` once before)""",
    add_arguments,
    run,
    "RUN_OR_MODEL USER/NAME --license LICENSE --data DATA --data-license LICENSE [OPTION ...]",
)
