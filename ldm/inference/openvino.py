"""U-Net and VAE decoder computed by OpenVINO, for CPUs.

OpenVINO packs a network's weights once, where torch reorders them at every call (docs/experiments.md, 13). The
denoising loop calls what `OpenVINO.unet` returns in place of the U-Net; the networks, and all that is saved, stay as
they are.

    pipe.enable_openvino()
    pipe("red heart")      # differs from torch's picture by rounding
    pipe.disable_openvino()
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.inference.openvino_cache import converted, core, load_openvino
from ldm.models.fingerprint import weights_state

#: Batch sizes that a network stays compiled for, each with a copy of its weights: those of a guidance interval.
MOST_COMPILED = 2
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond")


def log(message: str) -> None:
    """Print to stderr."""
    print(message, file=sys.stderr, flush=True)


class Network:
    """A function of a torch network, computed by OpenVINO, in the dtype of its weights.

    Compiled for each batch size: one compilation for all of them makes every call longer (docs/experiments.md, 13).
    """

    def __init__(
        self, network: nn.Module, name: str, computes: Callable[..., Tensor], log: Callable[[str], None] = log
    ) -> None:
        self.network = network
        self.name = name
        self.computes = computes
        self.log = log
        self.state = weights_state(network)
        self.models: dict[Any, Any] = {}  # the rows' shapes => openvino.Model
        self.compiled: OrderedDict[Any, Any] = OrderedDict()  # latest last

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output for inputs [B,...], in float32."""
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
                raise ValueError(f"openvino: can't compile the {self.name} ({reason}); use torch") from error
        self.compiled.move_to_end(key)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(self.compiled[key](arrays)[0])

    def model(self, inputs: Mapping[str, Tensor]) -> Any:
        """The converted network for rows of these shapes."""
        rows = tuple((name, tuple(value.shape[1:])) for name, value in inputs.items())
        if rows not in self.models:
            self.models[rows] = converted(self.network, self.name, self.computes, inputs, self.log)
        return self.models[rows]

    def settings(self, threads: int) -> dict[str, Any]:
        """One call at a time with torch's threads, on the cores that the process may use."""
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
    """The engine of a pipeline whose networks OpenVINO computes.

    Raises:
        ModuleNotFoundError: if it isn't installed.
    """

    name = "openvino"

    def __init__(self, log: Callable[[str], None] = log) -> None:
        self.version: str = load_openvino().get_version()
        self.log = log
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
            "class_labels": torch.zeros(1, dtype=torch.long)
            if unet.config.num_class_embeds
            else torch.zeros(1, unet.config.projection_class_embeddings_input_dim or 1),
            "timestep_cond": torch.zeros(1, unet.config.time_cond_proj_dim or 0),
        }
        self._unet(unet).model({name: given[name] for name in inputs_of(unet)})
        self._decoder(pipeline.vae).model({"sample": torch.zeros(1, pipeline.vae.config.latent_channels, *sizes)})

    def unet(self, pipeline: Any) -> Callable[..., tuple[Tensor]]:
        """What computes the pipeline's U-Net as it is now, with the arguments of the stock one.

        Raises:
            ValueError: if OpenVINO can't compute it, and, when called, for arguments that it doesn't support.
        """
        self.check(pipeline)
        network, names = self._unet(pipeline.unet), inputs_of(pipeline.unet)

        def compute(
            sample: Tensor,
            timestep: Any,
            encoder_hidden_states: Tensor | None = None,
            class_labels: Tensor | None = None,
            timestep_cond: Tensor | None = None,
            return_dict: bool = False,
            **others: Any,
        ) -> tuple[Tensor]:
            if unsupported := sorted(name for name, value in others.items() if value is not None):
                raise ValueError(
                    f"{unsupported[0]}: the OpenVINO engine doesn't support it; call disable_openvino() first"
                )
            each = torch.as_tensor(timestep).expand(len(sample)).float()
            values = (sample, each, encoder_hidden_states, class_labels, timestep_cond)
            given = dict(zip(UNET_INPUTS, values, strict=True))
            predicted = network({name: given[name] for name in names})  # type: ignore[misc]
            return (predicted.to(sample.dtype),)

        return compute

    def decoder(self, pipeline: Any) -> Callable[[Tensor], Tensor]:
        """Raw latents => pixels by the pipeline's VAE as it is now; the layer before its decoder stays with torch."""
        vae, network = pipeline.vae, self._decoder(pipeline.vae)
        before = getattr(vae, "post_quant_conv", None)

        def compute(raw_latents: Tensor) -> Tensor:
            parts = raw_latents.split(1) if vae.use_slicing else (raw_latents,)
            inputs = [part if before is None else before(part) for part in parts]
            return torch.cat([network({"sample": part}).to(part.dtype) for part in inputs])

        return compute

    def _unet(self, unet: Any) -> Network:
        names = inputs_of(unet)

        def computes(unet: Any, *inputs: Tensor) -> Tensor:
            given = {"encoder_hidden_states": None, **dict(zip(names, inputs, strict=True))}
            return unet(**given, return_dict=False)[0]  # type: ignore[no-any-return]

        return self._current(unet, "U-Net", computes)

    def _decoder(self, vae: Any) -> Network:
        def computes(vae: Any, latents: Tensor) -> Tensor:
            return vae.decoder(latents)  # type: ignore[no-any-return]

        return self._current(vae, "VAE decoder", computes)

    def _current(self, network: nn.Module, name: str, computes: Callable[..., Tensor]) -> Network:
        """The network of this name; another one if it or its weights have changed since."""
        known = self.networks.get(name)
        if known is None or known.network is not network or known.state != weights_state(network):
            known = self.networks[name] = Network(network, name, computes, self.log)
        return known

    def check(self, pipeline: Any) -> None:
        """Raise a ValueError if OpenVINO can't compute a pipeline as it is."""
        for network in (pipeline.unet, pipeline.vae):
            if network.device.type != "cpu":
                raise ValueError(
                    f"openvino: computes on the CPU, but the pipeline is on {network.device}; move it with .to('cpu')"
                )
            if network.dtype not in PRECISIONS:
                raise ValueError(
                    f"openvino: computes in float32 or bfloat16, not in {str(network.dtype).removeprefix('torch.')}"
                )
        if any(getattr(block, "b1", None) is not None for block in pipeline.unet.up_blocks):
            raise ValueError("openvino: doesn't support FreeU; call disable_freeu() or disable_openvino()")
        if any(_adapts(part) for part in pipeline.unet.modules()):
            raise ValueError(
                "openvino: doesn't support active adapters; call fuse_lora(), unload_lora_weights() or "
                "disable_openvino()"
            )
        if getattr(pipeline.vae, "use_tiling", False):
            raise ValueError("openvino: doesn't support VAE tiling; call vae.disable_tiling() or disable_openvino()")


def _adapts(part: nn.Module) -> bool:
    """Whether a layer of PEFT's adds to what it wraps."""
    adapts = bool(getattr(part, "active_adapters", None)) and not getattr(part, "disable_adapters", False)
    return adapts and not getattr(part, "merged", False) and hasattr(part, "base_layer")


def inputs_of(unet: Any) -> list[str]:
    """The stock arguments that a U-Net reads."""
    attends = any(getattr(part, "is_cross_attention", False) for part in unet.modules())
    unused = set() if attends else {"encoder_hidden_states"}
    unused |= set() if unet.class_embedding is not None else {"class_labels"}
    unused |= set() if unet.config.time_cond_proj_dim is not None else {"timestep_cond"}
    return [name for name in UNET_INPUTS if name not in unused]


def plain(tensor: Tensor) -> Tensor:
    """A tensor as numpy has it: bfloat16 as float32."""
    tensor = tensor.detach().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor
