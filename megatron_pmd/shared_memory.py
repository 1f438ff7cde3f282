"""Where the ranks of a node share bulk data, and how a run's files there are named and found again."""

from __future__ import annotations

import hashlib
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "megatron-pmd-"


def shared_memory_key(folder: Path) -> str:
    """Names a run's buckets: always the same for one run folder, so that a killed run's can be found."""
    return hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
