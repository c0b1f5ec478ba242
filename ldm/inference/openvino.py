"""U-Net and VAE decoder computed by OpenVINO while a picture is drawn, for CPUs.

OpenVINO packs a network's weights once, where torch reorders them at every call (docs/experiments.md, 13). Only the
networks' `forward` is another while a picture is drawn, so hooks on them (`steering.py`), sampling, text encoder and
everything that is saved stay as they are.

    pipe.enable_openvino()
    pipe("red heart")      # differs from torch's picture by rounding
    pipe.disable_openvino()
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from ldm.inference.decoding import version
from ldm.inference.openvino_cache import converted, core, load_openvino

#: Batch sizes that a network stays compiled for, each with a copy of its weights: those of a guidance interval.
MOST_COMPILED = 2
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states", "class_labels")


def tell(message: str) -> None:
    """Say something beside the output."""
    print(message, file=sys.stderr, flush=True)


class Network:
    """A function of a torch network, computed by OpenVINO, in the dtype of its weights.

    Compiled for each batch size: one compilation for all of them makes every call longer (docs/experiments.md, 13).
    """

    def __init__(
        self, network: nn.Module, name: str, computes: Callable[..., Tensor], say: Callable[[str], None] = tell
    ) -> None:
        self.network = network
        self.name = name
        self.computes = computes
        self.say = say
        self.state = weights(network)
        self.models: dict[Any, Any] = {}  # the rows' shapes => openvino.Model
        self.compiled: OrderedDict[Any, Any] = OrderedDict()  # latest last

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The answer to inputs [B,...] in float32."""
        inputs = {name: plain(value) for name, value in inputs.items()}
        threads = torch.get_num_threads()
        key = (threads, *((name, tuple(value.shape)) for name, value in inputs.items()))
        if key not in self.compiled:
            while len(self.compiled) >= MOST_COMPILED:
                self.compiled.popitem(last=False)
            model = self.model(inputs)
            model.reshape({name: list(value.shape) for name, value in inputs.items()})
            try:
                self.compiled[key] = core().compile_model(model, "CPU", self.settings(threads))
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"openvino: can't compile the {self.name} ({reason}); draw with torch") from error
        self.compiled.move_to_end(key)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(self.compiled[key](arrays)[0])

    def model(self, inputs: Mapping[str, Tensor]) -> Any:
        """The converted network for rows of these shapes."""
        rows = tuple((name, tuple(value.shape[1:])) for name, value in inputs.items())
        if rows not in self.models:
            self.models[rows] = converted(self.network, self.name, self.computes, inputs, self.say)
        return self.models[rows]

    def settings(self, threads: int) -> dict[str, Any]:
        """One drawing at a time with torch's threads, on the cores that the process was given."""
        precision = PRECISIONS[next(self.network.parameters()).dtype]
        return {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            # its code generator crashes the process at a scaled and shifted group norm (2026.4); it is worth 9 %
            "SNIPPETS_MODE": "DISABLE",
        }


class OpenVINO:
    """What a pipeline has while OpenVINO computes its networks.

    Raises:
        ModuleNotFoundError: if it isn't installed.
    """

    name = "openvino"

    def __init__(self, say: Callable[[str], None] = tell) -> None:
        self.version: str = load_openvino().get_version()
        self.say = say
        self.networks: dict[str, Network] = {}

    def prepare(self, pipeline: Any) -> None:
        """Convert what a picture of the usual size needs, so that the first one doesn't wait for it."""
        self.check(pipeline)
        unet, factor = pipeline.unet, pipeline.vae_scale_factor
        sizes = [pipeline.edge(name) // factor for name in ("height", "width")]
        tokens = 1 if pipeline.tokenizer is None else pipeline.tokenizer.model_max_length
        given = {
            "sample": torch.zeros(1, unet.config.in_channels, *sizes),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, tokens, unet.config.cross_attention_dim),
            "class_labels": torch.zeros(1, dtype=torch.long),
        }
        self.unet(pipeline).model({name: given[name] for name in inputs_of(unet)})
        self.decoder(pipeline).model({"sample": torch.zeros(1, pipeline.vae.config.latent_channels, *sizes)})

    @contextmanager
    def drawing(self, pipeline: Any) -> Iterator[None]:
        """Inside, OpenVINO computes the networks of a pipeline; converts what isn't yet, or has changed."""
        self.check(pipeline)
        unet, decoder = self.unet(pipeline), self.decoder(pipeline)
        names = inputs_of(pipeline.unet)

        def answer(
            sample: Tensor,
            timestep: Any,
            encoder_hidden_states: Tensor | None = None,
            class_labels: Tensor | None = None,
            return_dict: bool = True,
            **others: Any,
        ) -> Any:
            if told := sorted(name for name, value in others.items() if value is not None):
                raise ValueError(f"{told[0]}: what OpenVINO draws can't be told it; call disable_openvino() first")
            each = torch.as_tensor(timestep).expand(len(sample)).float()
            given = dict(zip(UNET_INPUTS, (sample, each, encoder_hidden_states, class_labels), strict=True))
            predicted = unet({name: given[name] for name in names}).to(sample.dtype)  # type: ignore[misc]
            return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)

        def decode(sample: Tensor) -> Tensor:
            return decoder({"sample": sample}).to(sample.dtype)

        with computed_by(pipeline.unet, answer), computed_by(pipeline.vae.decoder, decode):
            yield

    def unet(self, pipeline: Any) -> Network:
        """The pipeline's U-Net as it is now."""
        names = inputs_of(pipeline.unet)

        def computes(unet: Any, *inputs: Tensor) -> Tensor:
            given = {"encoder_hidden_states": None, **dict(zip(names, inputs, strict=True))}
            return type(unet).forward(unet, **given, return_dict=False)[0]  # type: ignore[no-any-return]

        return self.current(pipeline.unet, "U-Net", computes)

    def decoder(self, pipeline: Any) -> Network:
        """The pipeline's VAE decoder as it is now; the layer before it stays with torch."""

        def computes(vae: Any, latents: Tensor) -> Tensor:
            return type(vae.decoder).forward(vae.decoder, latents)  # type: ignore[no-any-return]

        return self.current(pipeline.vae, "VAE decoder", computes)

    def current(self, network: nn.Module, name: str, computes: Callable[..., Tensor]) -> Network:
        """The network of this name; another one if it or its weights have changed since."""
        known = self.networks.get(name)
        if known is None or known.network is not network or known.state != weights(network):
            known = self.networks[name] = Network(network, name, computes, self.say)
        return known

    def check(self, pipeline: Any) -> None:
        """Raise a ValueError if OpenVINO can't draw with a pipeline as it is."""
        for network in (pipeline.unet, pipeline.vae):
            if network.device.type != "cpu":
                raise ValueError(
                    f"openvino: draws on the CPU, but the pipeline is on {network.device}; move it with .to('cpu')"
                )
            if network.dtype not in PRECISIONS:
                raise ValueError(
                    f"openvino: computes in float32 or bfloat16, not in {str(network.dtype).removeprefix('torch.')}"
                )


def drawn_by(engine: OpenVINO | None, pipeline: Any) -> AbstractContextManager[None]:
    """Inside, this engine computes the networks of a pipeline; torch if it is None."""
    return nullcontext() if engine is None else engine.drawing(pipeline)


def inputs_of(unet: Any) -> list[str]:
    """What a U-Net looks at, of the stock arguments."""
    attends = any(getattr(part, "is_cross_attention", False) for part in unet.modules())
    unused = set() if attends else {"encoder_hidden_states"}
    unused |= set() if unet.class_embedding is not None else {"class_labels"}
    return [name for name in UNET_INPUTS if name not in unused]


def weights(network: nn.Module) -> tuple[Any, ...]:
    """Which weights, and how often they were changed in place."""
    tensors = [*network.parameters(), *network.buffers()]
    return tuple((id(one), one.data_ptr(), version(one), one.dtype) for one in tensors)


def plain(tensor: Tensor) -> Tensor:
    """A tensor as numpy has it: bfloat16 as float32."""
    tensor = tensor.detach().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


@contextmanager
def computed_by(network: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, this function is the network's `forward`; hooks are called as ever."""
    before = vars(network).get("forward")
    network.forward = function
    try:
        yield
    finally:
        del network.forward
        if before is not None:
            network.forward = before
