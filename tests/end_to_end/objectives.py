"""An objective for what goes wrong in an update."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

from megatron_pmd.objectives.pmd import Pmd


class Hanging(Pmd):
    """Rank 1 does not come out of it; the other waits for its gradients."""

    def loss(self, x: Any, constants: Any) -> Any:
        assert gc.get_freeze_count() > 100_000, "each save's collections look at all that is imported"
        if os.environ["RANK"] == "1":
            time.sleep(600)
        return super().loss(x, constants)
