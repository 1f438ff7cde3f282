"""What `megatron-pmd train` and `convert` import: tests fork such commands from a process that has done so.

A command that starts as a user starts it spends 9 s of a core on this; those of tests/slurm and tutorials do.
"""

from __future__ import annotations

import reasoning_gym  # noqa: F401

from megatron_pmd.cli import main  # noqa: F401
from megatron_pmd.convert import session, to_hugging_face, to_megatron  # noqa: F401
from megatron_pmd.node.worker import import_what_ranks_need
from megatron_pmd.observe import report  # noqa: F401

import_what_ranks_need()
