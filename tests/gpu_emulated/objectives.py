"""An objective for what goes wrong in an update."""

from __future__ import annotations

import os
import signal
from typing import Any

from megatron_pmd.objectives.pmd import Pmd


class Dying(Pmd):
    """Rank 1 is killed in it; the other waits for its gradients, in a collective of NCCL."""

    def loss(self, x: Any, constants: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(x, constants)
