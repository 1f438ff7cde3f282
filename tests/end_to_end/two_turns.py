"""A rollout function for tests: whatever the model says, it is asked once more."""

from __future__ import annotations

from megatron_pmd.rollout.episode import Episode


async def rollout(episode: Episode) -> str:
    await episode.generate()
    await episode.insert_message("user", "again")
    return (await episode.generate()).text
