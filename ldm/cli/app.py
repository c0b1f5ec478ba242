"""`ldm app`: a page to generate pictures on."""

from __future__ import annotations

import argparse
import importlib.util
import socket

from ldm.cli.find import DEFAULT_MODELS, default_model
from ldm.cli.lora import add_lora_option, check_lora_engine, load_loras
from ldm.cli.parser import Command, place, port
from ldm.inference.defaults import ENGINES
from ldm.pipelines import import_networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        type=place,
        metavar="FOLDER",
        help=f"a pipeline folder or a Hub id (default: {', else '.join(DEFAULT_MODELS)})",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=port, help="port to listen on (default: the first free one from 7860)")
    add(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="what computes U-Net and VAE decoder (default: auto, OpenVINO if installed and without a GPU)",
    )
    add_lora_option(add)
    add("--share", action="store_true", help="make a public link through gradio.live")


def run(arguments: argparse.Namespace) -> None:
    model = arguments.model or default_model()
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError('the page needs gradio; pip install "ldm[app]"')
    check_host(arguments.host)
    check_lora_engine(arguments)
    import_networks()
    from ldm.app.page import load, serve

    pipeline = load(model, "torch" if arguments.lora else arguments.engine)  # OpenVINO does not support adapters
    load_loras(pipeline, arguments.lora)
    serve(pipeline, host=arguments.host, port=arguments.port, share=arguments.share)


def check_host(host: str) -> None:
    """Raise a ValueError unless this machine can listen there; gradio would try a hundred ports first."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host: {host[:200]!r} is not an address of this machine ({error})") from None


COMMAND = Command(
    "generate pictures in the browser",
    """
ldm app                               (the model in models/emoji or runs/demo/pipeline)
ldm app --model runs/mine/pipeline
ldm app --lora runs/ink/lora         (with a slider for what a LoRA counts)
ldm app --host 0.0.0.0 --port 8000    (for other machines too)""",
    add_arguments,
    run,
)
