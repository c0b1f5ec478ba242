"""How torch, diffusers and transformers are imported: without looking for garbage meanwhile."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import road

from ldm.system.importing import collector_at_rest

COUNTED = """
import gc, sys
looks = []
gc.callbacks.append(lambda phase, told: looks.append(told) if phase == "start" and "torch" in sys.modules else None)
{statement}
assert "diffusers" in sys.modules and gc.isenabled() and gc.get_freeze_count() == 0
print(len(looks), len(gc.get_objects(generation=2)))
"""


def looks_for_garbage(statement: str) -> tuple[int, int]:
    """How often a fresh process looks for garbage in this statement, and how many old objects it has afterwards."""
    command = [sys.executable, "-c", COUNTED.format(statement=statement)]
    looks, old = subprocess.run(command, capture_output=True, text=True, check=True, cwd=road.ROOT).stdout.split()
    return int(looks), int(old)


def test_no_look_for_garbage_while_networks_are_imported() -> None:
    assert looks_for_garbage("import ldm.pipelines.text_to_image")[0] > 100  # as Python does it
    looks, old = looks_for_garbage("import ldm; ldm.LDMPipeline")
    assert looks <= 1  # perhaps afterwards
    assert old > 300_000  # the next look at the young ones doesn't go through what was imported


def test_the_import_says_nothing_and_transformers_speaks_afterwards() -> None:
    level = "from transformers.utils import logging; print(logging.get_verbosity())"
    spoken = f"import ldm; ldm.LDMPipeline; ldm.LDMUpscalePipeline; {level}"
    plain = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-c", spoken]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=road.ROOT, env=plain)
    assert (int(made.stdout), made.stderr) == (logging.WARNING, "")


@pytest.fixture
def collector() -> Iterator[None]:
    """Nothing is frozen before; whatever a test does to it, the collector is on afterwards, and as much is frozen."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    gc.enable()
    gc.unfreeze()
    if frozen:
        gc.freeze()


@pytest.mark.usefixtures("collector")
def test_the_collector_is_afterwards_as_it_was() -> None:
    with collector_at_rest():
        assert not gc.isenabled()
    assert gc.isenabled()

    with pytest.raises(ImportError), collector_at_rest():
        raise ImportError
    assert gc.isenabled()

    gc.disable()
    with collector_at_rest():
        pass
    assert not gc.isenabled()


@pytest.mark.usefixtures("collector")
def test_what_others_have_frozen_stays_frozen() -> None:
    mine: list[object] = []
    gc.freeze()
    with collector_at_rest():
        pass
    # not by their count: what other threads let go of leaves it, too
    assert not any(each is mine for each in gc.get_objects())
    gc.unfreeze()
    assert any(each is mine for each in gc.get_objects())


LEFT = """
import atexit, gc, sys
atexit.register(lambda: print("frozen:", gc.get_freeze_count() > 0))  # the first that is registered runs last
sys.argv[1:] = {words}
{statement}
"""
COMMANDS = {
    "ldm": ("from ldm.cli.main import main; main()", ["data", "check", "nowhere"]),
    "train": (
        "from ldm.cli.config import start; start(print, 'Train.')",
        ["--config", str(road.ROOT / "configs/demo.yaml")],
    ),
    "app": ("import runpy; runpy.run_path('app.py', run_name='__main__')", ["--model", "nowhere"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_our_own_commands_end_without_a_last_look_for_garbage(command: str) -> None:
    """Python's last look goes through all that was imported, for a second."""
    statement, words = COMMANDS[command]
    code = LEFT.format(statement=statement, words=words)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=road.ROOT)
    assert "frozen: True" in ended.stdout, ended.stderr


def test_other_people_s_processes_end_as_ever() -> None:
    code = LEFT.format(statement="import ldm; ldm.LDMPipeline", words=[])
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=road.ROOT)
    assert "frozen: False" in ended.stdout, ended.stderr
