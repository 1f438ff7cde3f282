"""Episodes of the library `verifiers`: for rollout.agent a program as any other."""

from __future__ import annotations

import asyncio

from megatron_pmd.environments.process import process_of
from megatron_pmd.errors import RolloutError
from megatron_pmd.rollout.agents.program import AgentTask


async def play(task: AgentTask) -> str:
    """Plays a problem's environment; what it gives, as the text that reward.name=environment reads.

    Raises RuntimeError where the environment failed, and RolloutError for a problem of another source, or
    when the process that plays ends.
    """
    try:
        played = task.problem.metadata["verifiers"]
    except KeyError:
        raise RolloutError(
            f"problem {task.problem.index} is of no environment: rollout.agent.function={__name__}:play "
            "plays those of a source of kind verifiers"
        ) from None
    process = await asyncio.to_thread(process_of, played["python"], played["settings"])
    number, reward = process.begin(
        task=played["task"], base_url=task.base_url, api_key=task.api_key, model=task.model
    )
    try:
        return repr(await asyncio.wrap_future(reward))
    except asyncio.CancelledError:
        process.end(number)
        raise
