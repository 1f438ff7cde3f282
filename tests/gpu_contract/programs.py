"""Starts the programs of this folder, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
DEADLINE_SECONDS = 300


def run(module: str, result: Path, *words: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a program of this folder leaves in `result`; fails with its last words."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.gpu_contract.{module}", str(result), *words]
    started = {**(environment or os.environ), "PYTHONPATH": _path(environment)}
    done = subprocess.run(
        command, cwd=PROJECT, env=started, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def _path(environment: dict[str, str] | None) -> str:
    return os.pathsep.join([str(PROJECT), *filter(None, [(environment or os.environ).get("PYTHONPATH")])])
