"""A torch network => the same in OpenVINO's format, kept on the disk by what it computes.

Converting takes seconds and gives the same for the same weights, so it is done once on a machine:

    ~/.cache/ldm/openvino/<hash>/network.xml, network.bin, manifest.json

The hash is of class, config, weights, shapes and versions, so an entry can't be stale: what changed has another name.
`ldm.system.user_cache` keeps it. Deleting the folder costs nothing but the seconds.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from ldm.models.fingerprint import fingerprint
from ldm.system.user_cache import ensure, locked, user_cache

FORMAT = 1  # of what is converted and how; another one is another entry
NETWORK = "network.xml"
TELEMETRY = "openvino_telemetry"


def load_openvino() -> Any:
    """The package `openvino`, which sends nothing to anybody: by itself it tells Google Analytics of every import.

    Raises:
        ModuleNotFoundError: if it isn't installed, with the command that does it.
    """
    missing = object()
    before = sys.modules.get(TELEMETRY, missing)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # not to be found; openvino then goes without
    try:
        import openvino
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        raise ModuleNotFoundError("openvino: it isn't installed; pip install openvino", name="openvino") from None
    finally:
        if before is missing:
            del sys.modules[TELEMETRY]
        else:
            sys.modules[TELEMETRY] = before  # type: ignore[assignment]
    return openvino


@cache
def core() -> Any:
    """OpenVINO's devices, looked for once."""
    return load_openvino().Core()


def cache_folder() -> Path:
    """Where converted networks are kept: $XDG_CACHE_HOME/ldm/openvino, by default ~/.cache/ldm/openvino."""
    return user_cache("openvino")


def converted(
    network: nn.Module,
    name: str,
    computes: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    say: Callable[[str], None],
) -> Any:
    """What a network computes of such inputs, as an openvino.Model with any batch size.

    Args:
        network: a network of diffusers; its class, config and weights are what the entry is found by.
        name: of what is computed, as errors and messages have it: "U-Net".
        computes: (network in float32, *inputs) => the answer; it calls no hooks.
        inputs: examples, by name; their shapes beside the first dimension are fixed.
        say: is told what takes long.
    Raises:
        ValueError: if OpenVINO can't convert it.
    """
    openvino = load_openvino()
    shapes = {key: [str(value.dtype), *value.shape[1:]] for key, value in inputs.items()}
    versions = [openvino.get_version(), torch.__version__, diffusers.__version__]
    entry = cache_folder() / fingerprint(network, FORMAT, name, shapes, versions)

    @cache
    def model() -> Any:
        say(f"converting the {name} for OpenVINO (once for this model, some seconds; kept in {entry.parent})")
        return convert(network, name, computes, inputs)

    def make(folder: Path) -> None:
        try:
            openvino.save_model(model(), folder / NETWORK, compress_to_fp16=False)
        except RuntimeError as error:  # OpenVINO's word for a full disk
            raise OSError(str(error)) from error

    try:
        with locked(entry):
            ensure(make, entry, say)
            return core().read_model(entry / NETWORK)
    except OSError as error:  # no room, no permission
        say(f"the converted {name} can't be kept ({error}); it is converted again next time")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        return core().read_model(Path(folder) / NETWORK)


def convert(network: nn.Module, name: str, computes: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Any:
    """Trace a network in float32, with two rows of each input, into an openvino.Model."""
    whole = network if all(p.dtype == torch.float32 for p in network.parameters()) else copy.deepcopy(network).float()
    examples = [value[:1].repeat(2, *[1] * (value.ndim - 1)) for value in inputs.values()]
    examples = [value.float() if value.is_floating_point() else value for value in examples]
    openvino = load_openvino()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)  # of shapes, which are fixed
        try:
            model = openvino.convert_model(Traced(whole, computes), example_input=tuple(examples))
        except Exception as error:  # OpenVINO's have no common class
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"openvino: can't convert the {name} ({reason}); draw with torch") from error
    for port, key in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({key})
    model.reshape({key: [-1, *value.shape[1:]] for key, value in inputs.items()})
    return model


class Traced(nn.Module):
    """A function of a network as a module, which is what can be traced."""

    def __init__(self, network: nn.Module, computes: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network
        self.computes = computes

    def forward(self, *inputs: Tensor) -> Tensor:
        """What is computed of the inputs."""
        return self.computes(self.network, *inputs)
