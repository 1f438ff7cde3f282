"""What can befall a checkpoint, on actor ranks: see tests/actor/launch.py."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from megatron_pmd.actor import checkpoint, checkpoint_writer
from megatron_pmd.actor.checkpoint_folders import STATE_FILE, latest, read_run_state
from tests.actor.actor_programs import Trial, message_of
from tests.actor.tiny_models import STEPS, config_for


def checkpoint_faults(path: Path, folder: Path) -> dict[str, Any]:
    """What saving and loading do when the disk is full, or files are not what was written."""
    trial = Trial(config_for(path))
    result: dict[str, Any] = {}
    complete = trial.save(folder, 1)
    servers = [p.pid for p in children_called(checkpoint_writer.RESULTS)]
    result["servers of queues"] = ["libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in servers]
    save = checkpoint.dist_checkpointing.save

    def disk_full(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.dist_checkpointing.save = disk_full
    result["disk full"] = message_of(lambda: trial.actor.save(folder, 2, {"iteration": 2}))
    result["disk full, first"] = message_of(lambda: trial.actor.save(folder / "none", 2, {"iteration": 2}))
    checkpoint.dist_checkpointing.save = save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    result["write begun"] = message_of(lambda: trial.actor.save(folder, 2, {"iteration": 2}))
    result["write refused"] = message_of(lambda: trial.actor.publish_checkpoint(wait=True))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    result["partial left"] = [p.name for p in folder.glob("*.partial")]
    result["latest after disk full"] = latest(folder)
    result["complete"] = complete
    result["complete loads"] = message_of(lambda: trial.actor.load(complete))
    # a partial folder with everything in it, as a crash between the last write and the renaming leaves
    partial = folder / "iteration-9.partial"
    partial.mkdir()
    (partial / STATE_FILE).write_text("{}")
    unfinished = folder / "iteration-8"
    unfinished.mkdir()
    result["latest beside partial"] = latest(folder)
    unfinished.rmdir()

    for iteration in (2, 3, 10):
        trial.save(folder, iteration)
    result["kept"] = sorted(p.name for p in folder.iterdir())
    result["latest of kept"] = latest(folder)
    result["run state"] = read_run_state(folder / "iteration-10")

    (folder / "iteration-10" / STATE_FILE).write_text("{")
    result["broken run state"] = message_of(lambda: read_run_state(folder / "iteration-10"))
    weight = next(p for p in trial.actor.chunks[0].parameters() if p.ndim == 2)
    needle = weight.detach().numpy().tobytes()[:64]
    for shard in (folder / "iteration-3").glob("*.distcp"):
        data = bytearray(shard.read_bytes())
        at = data.find(needle)
        while at >= 0:
            data[at] ^= 1
            at = data.find(needle, at + 1)
        shard.write_bytes(data)
    result["flipped bit"] = message_of(lambda: trial.actor.load(folder / "iteration-3"))
    for shard in (folder / "iteration-10").glob("*.distcp"):
        os.truncate(shard, shard.stat().st_size // 2)
    result["truncated"] = message_of(lambda: trial.actor.load(folder / "iteration-10"))
    result["missing"] = message_of(lambda: trial.actor.load(folder / "iteration-77"))
    for name, title in (
        ("writer killed", checkpoint_writer.WRITER),
        ("results killed", checkpoint_writer.RESULTS),
    ):
        result[name] = message_of(lambda title=title: save_and_kill(trial, folder, title))
    return result


def children_called(title: str) -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if " ".join(p.cmdline()).strip() == title]


def save_and_kill(trial: Trial, folder: Path, title: str) -> None:
    """A checkpoint whose writer is stopped until the process of this title is killed."""
    become = checkpoint_writer.become_helper

    def become_and_stop(title: str, parent: int) -> None:
        become(title, parent)
        os.kill(os.getpid(), signal.SIGSTOP)

    checkpoint_writer.become_helper = become_and_stop
    trial.actor.save(folder, 11, {"iteration": 11})
    checkpoint_writer.become_helper = become
    while True:
        writers = children_called(checkpoint_writer.WRITER)
        if writers and writers[0].status() == psutil.STATUS_STOPPED:
            break
        time.sleep(0.01)
    for process in children_called(title):
        process.kill()
    writers[0].resume()
    trial.actor.publish_checkpoint(wait=True)


def killed_while_saving(path: Path, folder: Path, pids: Path) -> None:
    """One complete checkpoint, a second begun, and the end of this process by SIGKILL."""
    trial = Trial(config_for(path))
    trial.save(folder, 1)
    write = checkpoint_writer.filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def never_done(*arguments: Any, **options: Any) -> None:
        time.sleep(600)
        write(*arguments, **options)

    checkpoint_writer.filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(never_done)
    trial.actor.save(folder, 2, {"iteration": 2})
    trial.actor.publish_checkpoint(wait=False)
    time.sleep(2)
    children = psutil.Process().children(recursive=True)
    pids.write_text(json.dumps({child.pid: child.create_time() for child in children}))
    os.kill(os.getpid(), signal.SIGKILL)


def bf16_resume(path: Path, folder: Path) -> list[Any]:
    """The step after a checkpoint, without and with loading it: bf16 weights, fp32 main parameters."""
    trial = Trial(config_for(path, precision="bf16"))
    trial.step(STEPS[0])
    saved = trial.save(folder)
    results = [(trial.step(STEPS[1]), trial.weights())]
    trial.actor.load(saved)
    return [*results, (trial.step(STEPS[1]), trial.weights())]


def save_and_load(path: Path, layout: dict[str, int], folder: Path) -> tuple[str, str]:
    trial = Trial(config_for(path, layout))
    trial.step(STEPS[0])
    saved = trial.save(folder)
    trial.step(STEPS[1])
    return message_of(lambda: trial.actor.load(saved))
