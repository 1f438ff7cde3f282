"""The keys of a run's engines: one to generate with, one to change or abort something with."""

from __future__ import annotations

import secrets
from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """What a call to an engine has to carry as `Authorization: Bearer <key>`; None: nothing."""

    api: str | None = None
    """To generate, and to ask an engine how it is. The router has this one, too."""
    admin: str | None = None
    """To change weights or memory, or to abort; None: the same as `api`. The router, which makes none of
    these calls, does not have it: the update endpoint unpickles what it is sent."""

    @classmethod
    def random(cls) -> Keys:
        """Two that nobody else knows."""
        return cls(secrets.token_hex(24), secrets.token_hex(24))

    @property
    def headers(self) -> dict[str, str]:
        return _bearer(self.api)

    @property
    def admin_headers(self) -> dict[str, str]:
        return _bearer(self.admin or self.api)


NO_KEYS = Keys()


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
