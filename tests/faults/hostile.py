"""Configs and model folders made to do harm, or merely malformed: {kind: what is done and named}.

Whatever runs one of the payloads creates that file, so that its absence proves that nothing ran.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def source(canary: Path) -> str:
    """A module that runs when it is imported, and has a class of any name."""
    return f"open({str(canary)!r}, 'w').close()\ndef __getattr__(name): return type(name, (), {{}})\n"


def configs(canary: Path) -> dict[str, bytes]:
    """{kind: a YAML file that must be refused}."""
    touch = f"touch {canary}"
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
    texts = {
        "python call": f"run: !!python/object/apply:os.system ['{touch}']",
        "python object": f"run: !!python/object/new:os.system ['{touch}']",
        "python name": "run: !!python/name:os.system",
        "python module": "run: !!python/module:this",
        "python tuple": "loop: {prompts: !!python/tuple [a]}",
        "own tag": "run: !evil x",
        "binary tag": "run: !!binary aGVsbG8=",
        "set tag": "loop: {prompts: !!set {a}}",
        "class path of a section": f"optim: {{class_path: os.system, init_args: {{command: '{touch}'}}}}",
        "class path of text": f"text: {{class_path: subprocess.Popen, init_args: {{args: [touch, '{canary}']}}}}",
        "class path at the top": "class_path: ldm.training.config.Config",
        "init_args at the top": "init_args: {run: x}",
        "billion laughs": f"{laughs}run: *j",
        "anchor": "run: &a x",
        "alias of itself": "loop: {prompts: &p [*p]}",
        "alias of nothing": "run: *x",
        "merge of itself": "a: &a {<<: *a}",
        "merge of a map": "data: {<<: {size: 64}}",
        "key twice": "run: a\nrun: b",
        "key twice in a section": "optim: {lr: 1, lr: 2}",
        "section twice": "optim: {lr: 1}\noptim: {warmup: 2}",
        "two documents": "run: a\n---\nrun: b",
        "deep list": "run: " + "[" * 3000 + "]" * 3000,
        "deep map": "run: " + "{a: " * 3000 + "}" * 3000,
        "list as key": "? [a]\n: b",
        "number as key": "5: x",
        "null as key": "null: x",
        "dunder key": "__class__: x",
        "dunder in a section": "data: {__init__: x}",
        "a list": "[1, 2]",
        "a number": "5",
        "nothing": "",
        "null": "null",
        "tab": "\trun: a",
        "open quote": 'run: "a',
        "open bracket": "loop: {prompts: [a",
        "nul": "run: a\0b",
        "escape": "run: a\x1bb",
        "escaped nul": 'data: {source: "a\\0b"}',
        "escaped terminal code": 'run: "a\\e[2Jb"',
        "line break in a name": 'run: "a\\nb"',
        "half a surrogate pair": 'run: "\\ud800"',
        "long name": f"run: {'x' * 5000}",
        "large file": f"run: {'x' * (1 << 20)}",
        "another config": "config: /etc/passwd",
        "map as text": "run: {a: b}",
        "list as text": "run: [a]",
        "text as number": "loop: {steps: many}",
        "fraction as whole number": "loop: {steps: 1.5}",
        "truth as number": "loop: {steps: true}",
        "null as number": "loop: {steps: null}",
        "list as number": "optim: {lr: [1]}",
        "number as section": "optim: 5",
        "list as section": "optim: [1]",
        "null as section": "optim: null",
        "text as section": "data: pictures",
        "nan": "optim: {lr: .nan}",
        "nan nobody looks at": "vae_training: {l1: .nan}",
        "nan in a pair": "optim: {betas: [.nan, 0.9]}",
        "infinity": "optim: {lr: .inf}",
        "overflow": "optim: {lr: 1e400}",
        "infinite whole number": "optim: {warmup: -.inf}",
        "nan guidance": "loop: {guidance_scale: .nan}",
        "5000 digits": f"loop: {{steps: {'9' * 5000}}}",
        "40 digits": f"loop: {{steps: {'9' * 40}}}",
        "65 bits": f"seed: {2**64}",
        "negative seed": "seed: -1",
        "negative steps": "loop: {steps: -1}",
        "negative learning rate": "optim: {lr: -1}",
        "negative weight decay": "optim: {weight_decay: -1}",
        "betas above one": "optim: {betas: [5, 5]}",
        "three betas": "optim: {betas: [0.1, 0.2, 0.3]}",
        "a million threads": "loop: {threads: 1000000}",
        "pictures of gigapixels": "data: {size: 80000}",
        "negative channels": "vae_model: {latent_channels: -4}",
        "no layers": "vae_model: {layers: 0}",
        "endless captions": "text: {max_length: 9999999}",
        "unknown choice": "diffusion: {schedule: evil}",
    }
    return {kind: text.encode() for kind, text in texts.items()} | {
        "not UTF-8": b"run: caf\xe9",
        "UTF-16": "run: a".encode("utf-16"),
        "every byte": bytes(range(256)),
        "pickle": pickled(canary),
    }


Harm = Callable[[Path], object]


def edit(path: str, **keys: Any) -> Harm:
    """Change keys of a JSON file of the folder."""

    def harm(folder: Path) -> None:
        said = json.loads((folder / path).read_text("utf-8"))
        (folder / path).write_text(json.dumps({**said, **keys}), "utf-8")

    return harm


def write(path: str, data: bytes | str) -> Harm:
    return lambda folder: (folder / path).write_bytes(data.encode() if isinstance(data, str) else data)


def both(*harms: Harm) -> Harm:
    return lambda folder: [harm(folder) for harm in harms]


def link(path: str, target: Path) -> Harm:
    """A link of this name instead of what is there."""

    def harm(folder: Path) -> None:
        if (folder / path).is_dir():
            (folder / path).rename(folder.parent / "moved")
        else:
            (folder / path).unlink()
        (folder / path).symlink_to(target)

    return harm


def weights(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file made by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def reweigh(path: str, change: Callable[[dict[str, Any]], object]) -> Harm:
    """Change the tensors of a good safetensors file, which stays one."""

    def harm(folder: Path) -> None:
        tensors = load_file(folder / path)
        change(tensors)
        save_file(tensors, folder / path, {"format": "pt"})

    return harm


def one_less(tensors: dict[str, Any]) -> object:
    return tensors.pop(min(tensors))


def one_more(tensors: dict[str, Any]) -> None:
    tensors["evil.weight"] = torch.zeros(1)


def wider(tensors: dict[str, Any]) -> None:
    tensors["conv_in.bias"] = torch.zeros(99)


def pipelines(canary: Path, outside: Path) -> dict[str, tuple[Harm, str]]:
    """{kind: (what is done to a good pipeline folder, what the error must name)}; `outside` is a folder beside it."""
    index, unet, text = "model_index.json", "unet/config.json", "text_encoder/config.json"
    tokens, numbers = "tokenizer/tokenizer_config.json", "unet/diffusion_pytorch_model.safetensors"
    code, evil = source(canary), pickled(canary)
    four = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

    def only_pickle(folder: Path) -> None:
        (folder / numbers).unlink()
        (folder / "unet/diffusion_pytorch_model.bin").write_bytes(evil)

    def cut(folder: Path) -> None:
        (folder / numbers).write_bytes((folder / numbers).read_bytes()[:-100])

    return {
        "foreign module": (both(edit(index, unet=["evil", "Net"]), write("evil.py", code)), "unet"),
        "foreign module in its component": (
            both(edit(index, unet=["evil", "Net"]), write("unet/evil.py", code)),
            "unet",
        ),
        "module named as a library": (write("unet/diffusers.py", code), "unet/diffusers.py"),
        "pipeline.py": (write("pipeline.py", code), "pipeline.py"),
        "class of its own": (both(edit(index, _class_name=["evil", "Pipe"]), write("evil.py", code)), "_class_name"),
        "another pipeline": (edit(index, _class_name="ShapEPipeline"), "_class_name"),
        "no class": (edit(index, _class_name=None), "_class_name"),
        "standard library": (edit(index, unet=["os", "system"]), "unet"),
        "library's submodule": (edit(index, unet=["diffusers.utils", "load_image"]), "unet"),
        "function of a library": (edit(index, unet=["diffusers", "load_image"]), "unet"),
        "another network": (edit(index, unet=["diffusers", "UNet2DModel"]), "unet"),
        "class that unpickles": (edit(index, tokenizer=["transformers", "RagRetriever"]), "tokenizer"),
        "tokenizer of onnx": (edit(index, vae=["diffusers", "OnnxRuntimeModel"]), "vae"),
        "scheduler with a dot": (edit(index, scheduler=["diffusers", "os.EvilScheduler"]), "scheduler"),
        "unexpected component": (edit(index, evil=["diffusers", "AutoencoderKL"]), "evil"),
        "component outside": (edit(index, **{"../vae": ["diffusers", "AutoencoderKL"]}), "../vae"),
        "component as text": (edit(index, unet="UNet2DConditionModel"), "unet"),
        "component as object": (edit(index, unet={"diffusers": "UNet2DConditionModel"}), "unet"),
        "component of three": (edit(index, unet=["diffusers", "UNet2DConditionModel", "x"]), "unet"),
        "component of numbers": (edit(index, unet=[1, 2]), "unet"),
        "index cut off": (write(index, "{"), index),
        "index is a list": (write(index, "[]"), index),
        "index is empty": (write(index, ""), index),
        "index not UTF-8": (write(index, b'{"\xe9": 1}'), index),
        "index too deep": (write(index, "[" * 100_000), index),
        "index is a pickle": (write(index, evil), index),
        "config with code": (edit(text, auto_map={"AutoModel": "evil.Net"}), "auto_map"),
        "config with code, deeper": (edit(text, text_config={"a": [{"auto_map": {"AutoModel": "x"}}]}), "auto_map"),
        "tokenizer with code": (edit(tokens, auto_map={"AutoTokenizer": ["evil.Tok", None]}), "auto_map"),
        "custom pipeline": (edit(unet, custom_pipeline="evil"), "custom_pipeline"),
        "trust by itself": (edit(text, trust_remote_code=True), "trust_remote_code"),
        "quantizer": (edit(text, quantization_config={"quant_method": "evil"}), "quantization_config"),
        "kernel from the Hub": (edit(text, attn_implementation="evil/kernel"), "attn_implementation"),
        "kernel, inner key": (edit(text, _attn_implementation_internal="evil/kernel"), "_attn_implementation_internal"),
        "adapter": (
            write("text_encoder/adapter_config.json", '{"base_model_name_or_path": "evil/model"}'),
            "adapter_config.json",
        ),
        "foreign tokenizer": (edit(tokens, tokenizer_class="evil.Tokenizer"), "tokenizer_class"),
        "tokenizer as list": (edit(tokens, tokenizer_class=["evil", "Tok"]), "tokenizer_class"),
        "vocabulary elsewhere": (edit(tokens, vocab_file="/etc/passwd"), "vocab_file"),
        "vocabulary above": (edit(tokens, vocab_file="../../secret"), "vocab_file"),
        "tokenizer.json is a pickle": (write("tokenizer/tokenizer.json", evil), "tokenizer.json"),
        "tokenizer.json of nothing": (write("tokenizer/tokenizer.json", "{}"), "pipeline"),
        "weights elsewhere": (link(numbers, outside / "secret"), numbers),
        "config elsewhere": (link(unet, outside / "secret"), unet),
        "component elsewhere": (link("vae", outside), "vae"),
        "link to a device": (link(numbers, Path("/dev/zero")), numbers),
        "pickled weights alone": (only_pickle, "diffusion_pytorch_model.bin"),
        "pickle with another name": (write(numbers, evil), numbers),
        "weights cut off": (cut, numbers),
        "weights empty": (write(numbers, b""), numbers),
        "header of 2**63 bytes": (write(numbers, weights({}, length=2**63)), numbers),
        "header longer than the file": (write(numbers, weights({}, length=1000)), numbers),
        "header no JSON": (write(numbers, weights(b"\xff" * 32)), numbers),
        "header a list": (write(numbers, weights(b"[1]")), numbers),
        "header too deep": (write(numbers, weights(b"[" * 100_000)), numbers),
        "offsets beyond the end": (
            write(numbers, weights({"a": {**four, "data_offsets": [0, 400]}}, b"1234")),
            numbers,
        ),
        "offsets backwards": (write(numbers, weights({"a": {**four, "data_offsets": [4, 0]}}, b"1234")), numbers),
        "two tensors in one place": (write(numbers, weights({"a": four, "b": four}, b"1234")), numbers),
        "shape that doesn't fit": (write(numbers, weights({"a": {**four, "shape": [2**62, 8]}}, b"1234")), numbers),
        "unknown dtype": (write(numbers, weights({"a": {**four, "dtype": "EVIL"}}, b"1234")), numbers),
        "hidden bytes": (write(numbers, weights({"a": four}, b"1234" + evil)), numbers),
        "shards elsewhere": (
            write(
                "unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}'
            ),
            "weight_map",
        ),
        "shards that are pickles": (
            write("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "x.bin"}}'),
            "weight_map",
        ),
        "weights of another network": (
            lambda folder: shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / numbers),
            f"{numbers}: its weights are not those of the UNet2DConditionModel in config.json: it lacks conv_in.bias",
        ),
        "a weight is missing": (reweigh(numbers, one_less), f"{numbers}: its weights are not those of the UNet2DCondi"),
        "a weight too many": (reweigh(numbers, one_more), "it holds evil.weight"),
        "a weight of another shape": (reweigh(numbers, wider), "conv_in.bias"),
        "channels as text": (edit(unet, block_out_channels="evil"), "pipeline"),
        "negative channels": (edit(unet, block_out_channels=[-32, 64]), "pipeline"),
        "blocks by name": (edit(unet, down_block_types=["os.system", "x"]), "pipeline"),
        "defaults cut off": (write("defaults.json", "{"), "defaults.json"),
        "defaults of another kind": (write("defaults.json", '{"num_inference_steps": "rm"}'), "num_inference_steps"),
        "labels cut off": (write("labels.json", "{"), "labels.json"),
        "labels of another kind": (write("labels.json", '{"column": 1, "names": 2}'), "labels.json"),
        "prompts not UTF-8": (write("prompts.txt", b"caf\xe9"), "prompts.txt"),
    }
