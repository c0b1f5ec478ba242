"""A tiny training to break: forked from a warm process, killed at will, compared with a run that nothing happened to.

The process that imports this never runs a backward pass or starts a thread, so that it can fork: a child costs
milliseconds where a fresh Python costs seconds.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import road
import tiny
import torch
import torch.utils.tensorboard
from accelerate import Accelerator  # noqa: F401

import ldm.pipelines.text_to_image  # noqa: F401
from ldm.cli import config as command_line
from ldm.data.dataset import read_captioned
from ldm.models.lora import WEIGHTS
from ldm.models.vae import VAEConfig, build_vae, normalize
from ldm.system.hashing import fault, sha256
from ldm.training import normalization, trainer
from ldm.training.checkpoint import checkpoint_folder, checkpoints, step_of
from ldm.training.config import Config
from ldm.training.run import train
from ldm.training.tasks import classifier, diffusion, distillation, upscaling
from ldm.training.tasks.autoencoder import Autoencoder

torch.set_num_threads(1)
HANG = 240.0  # seconds after which a child counts as hanging
STEPS, SAVE_EVERY = 9, 3
PHASES = ("start", "cache", "training", "saving", "exporting", "evaluating", "previewing")
#: kind of training => its task
KINDS = {"cached": "ldm", "vae": "vae", "workers": "ldm", "classifier": "classifier", "inpaint": "ldm",
         "lora": "ldm", "distill": "distill", "upscale": "ldm", "buckets": "ldm"}  # fmt: skip
#: task => the file that it leaves in its run
RESULTS = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "ldm": "pipeline/unet/diffusion_pytorch_model.safetensors",
    "distill": "pipeline/unet/diffusion_pytorch_model.safetensors",
    "classifier": "classifier/model.safetensors",
}


def result(kind: str) -> str:
    """The file that a kind of training leaves in its run."""
    return f"lora/{WEIGHTS}" if kind == "lora" else RESULTS[KINDS[kind]]


class Board:
    """What a child is doing, in memory that it shares with its parent: the phase and the step that is running."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def write(self, phase: str | None = None, step: int | None = None) -> None:
        if phase is not None:
            self.memory[0:1] = bytes([PHASES.index(phase)])
        if step is not None:
            self.memory[8:16] = struct.pack("q", step)

    @property
    def phase(self) -> str:
        return PHASES[self.memory[0]]

    @property
    def step(self) -> int:
        return int(struct.unpack("q", self.memory[8:16])[0])


@dataclass
class Child:
    """A forked process."""

    pid: int
    said: Path
    board: Board

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it is over, without taking its exit code."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, most: float = HANG) -> int | None:
        """Its exit code, -9 for SIGKILL, or None if it hung and had to be killed."""
        until = time.monotonic() + most
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        self.kill()
        os.waitpid(self.pid, 0)
        return None

    @property
    def words(self) -> str:
        return self.said.read_text("utf-8", errors="replace")


def fork(action: Callable[[], object], said: Path, board: Board | None = None, **environment: str) -> Child:
    """Run `action` in a child whose output goes to a file; exits with 0, a SystemExit's code, or 99 for a traceback."""
    board = board or Board()
    board.write("start", 0)
    said.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Child(pid, said, board)
    code = 99
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        watched(board)
        action()
        code = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def watched(board: Board) -> None:
    """Write on the board what the training does."""

    def announce(owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            board.write(phase)
            try:
                return original(*args, **kwargs)
            finally:
                board.write("training")

        setattr(owner, name, wrapper)

    announce(trainer, "save_checkpoint", "saving")
    for module in (diffusion, classifier):
        announce(module, "build_cache", "cache")
    announce(upscaling, "build_small_pictures", "cache")
    for task in (Autoencoder, diffusion.Diffusion, upscaling.Upscaling, classifier.Classifier):
        for method, phase in {"export": "exporting", "validate": "evaluating", "preview": "previewing"}.items():
            announce(task, method, phase)
    announce(distillation.Distillation, "validate", "evaluating")  # its own
    step = trainer.Trainer.step

    def counted(self: Any, number: int, *args: Any) -> Any:
        board.write("training", number + 1)
        return step(self, number, *args)

    trainer.Trainer.step = counted


class World:
    """A folder of pictures, a text encoder and a VAE, and recipes that train on them for a second or two."""

    def __init__(self, home: Path) -> None:
        self.home = home
        child = fork(self.build, home / "said" / "building")  # accelerate's state is made at its first use, for good
        assert child.wait() == 0, child.words

    def build(self) -> None:
        """Make what the trainings start from."""
        home = self.home
        road.draw_folder(home / "data")
        road.cut_folder(home / "data", home / "shapes")
        tiny.save_text_encoder(home / "text", "bert", width=16)
        torch.manual_seed(0)
        pictures = read_captioned(home / "data", progress=False)
        vae = build_vae(VAEConfig(channels=(16, 16), layers=1)).eval().requires_grad_(False)
        normalize(vae, *normalization.measure_latents(vae, pictures, tiny.SIZE, 24))
        vae.save_pretrained(home / "vae")
        tiny.pipeline(home / "encoder").save_pretrained(home / "model")
        base = tiny.pipeline(home / "base-text", vae_config=VAEConfig(channels=(16, 16), layers=1))
        base.unet.register_to_config(sample_size=tiny.SIZE // 4)  # of pictures that are half as large
        base.save_pretrained(home / "base")

    def recipe(self, kind: str, run: Path, **words: Any) -> Config:
        """The config of one kind of training."""
        shared: dict[str, Any] = {
            "run": str(run),
            "vae": str(self.home / "vae"),
            "vae_model__channels": [16, 16],
            "vae_training__steps": STEPS,
            "vae_training__checkpoint_every": SAVE_EVERY,
            "vae_training__log_every": 1,
            "vae_training__adversarial": 0.1,
            "vae_training__adversarial_start": 4,
            "classifier__channels": [8, 16],
            "classifier_training__steps": STEPS,
            "classifier_training__batch_size": 8,
            "classifier_training__checkpoint_every": SAVE_EVERY,
            "classifier_training__log_every": 1,
            "unet__channels": [32, 32],
            "optim__decay": "cosine",
            "loop__steps": STEPS,
            "loop__log_every": 1,
            "loop__checkpoint_every": SAVE_EVERY,
            "loop__evaluate_every": 4,
            "loop__sample_every": STEPS,
            "loop__evaluation_pictures": 4,
            "loop__prompts": ["red heart"],
        }
        kinds: dict[str, dict[str, Any]] = {
            "cached": {"loop__accumulation": 2},
            "workers": {"data__cache": "off", "data__workers": 2, "data__flip": "true"},
            "vae": {"vae": "null", "data__workers": 2},
            "classifier": {"data__label_column": "color", "data__flip": "true"},
            "inpaint": {"data__inpaint": "true", "data__workers": 2},
            "lora": {"init": str(self.home / "model"), "unet__channels": [32, 64], "lora__rank": 2, **road.OF_INIT},
            "distill": {"init": str(self.home / "model"), "unet__channels": [32, 64], **road.OF_INIT},
            "upscale": {"upscale__factor": 2, "upscale__crop": 8, "upscale__base": str(self.home / "base")},
            "buckets": {"data__source": str(self.home / "shapes"), "data__buckets": "true", "data__size": 32},
        }
        return road.recipe(self.home, **{**shared, **kinds[kind], **words})

    def train(
        self, kind: str, config: Config, board: Board | None = None, before: Callable[[], object] = lambda: None,
        **environment: str
    ) -> Child:  # fmt: skip
        """Fork a training as its command would run it, exit codes included; `before` may break something first."""

        def command() -> None:
            before()
            command_line.parse_config = lambda *_: config
            command_line.start(partial(train, KINDS[kind]), "")

        rank = environment.get("RANK", "0")
        return fork(command, self.home / "said" / f"{Path(config.run).name}-{rank}", board, **environment)

    def train_two(self, kind: str, config: Config) -> list[Child]:
        """The same in two processes with gloo, as torchrun would start them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared["ACCELERATE_USE_CPU"] = "true"
        return [self.train(kind, config, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]


def saved_in(kind: str, config: Config) -> Path:
    """Where a run of this kind keeps its checkpoints."""
    return checkpoint_folder(config.run, KINDS[kind])


def newest_step(kind: str, config: Config) -> int:
    """The step of the newest checkpoint, 0 if there is none; a broken one is an error here."""
    found = checkpoints(saved_in(kind, config))
    for path in found:
        assert fault(path) is None, (path, fault(path))
    return step_of(found[-1]) if found else 0


def losses(config: Config) -> list[tuple[int, str]]:
    """Every logged (step, loss), in order, the loss as it is written, to the last digit."""
    import json

    rows = []
    for line in (Path(config.run) / "log.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line, parse_float=str)
        rows += [(row["step"], str(row[name])) for task in RESULTS if (name := f"{task}/loss") in row]
    return rows


def hashes(kind: str, config: Config) -> dict[str, str]:
    """The hashes of the last checkpoint's tensors and of what is handed on."""
    last = checkpoints(saved_in(kind, config))[-1]
    found = {path.name: sha256(path) for path in sorted(last.glob("*.safetensors"))}
    left = result(kind)
    return {**found, "step": last.name, left: sha256(Path(config.run) / left)}


@dataclass
class Reference:
    """The run that nothing happened to."""

    losses: dict[int, str]
    hashes: dict[str, str]
    seconds: float

    def differing(self, config: Config) -> tuple[int, int]:
        """How many logged losses differ from the reference's, and of how many; a step without a loss differs."""
        found = losses(config)
        wrong = sum(self.losses[step] != loss for step, loss in found)
        return wrong + len(self.losses.keys() - {step for step, _ in found}), len(found)


def reference(world: World, kind: str, processes: int = 1) -> Reference:
    """Run it once without trouble."""
    config = world.recipe(kind, world.home / f"reference-{kind}-{processes}")
    start = time.monotonic()
    children = [world.train(kind, config)] if processes == 1 else world.train_two(kind, config)
    for child in children:
        assert child.wait() == 0, child.words[-4000:]
    return Reference(dict(losses(config)), hashes(kind, config), time.monotonic() - start)


@contextlib.contextmanager
def clean(config: Config) -> Iterator[None]:
    """Delete a run's folder afterwards: two hundred of them would fill the disk."""
    import shutil

    try:
        yield
    finally:
        shutil.rmtree(config.run, ignore_errors=True)
