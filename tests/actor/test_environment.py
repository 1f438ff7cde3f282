import sys

import pytest

from megatron_pmd.actor.environment import complete_deepep
from megatron_pmd.errors import MissingPackage


def test_an_actor_that_asks_for_deepep_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(MissingPackage, match=r"dispatcher=deepep.*install sgl-deep-ep"):
        complete_deepep()
