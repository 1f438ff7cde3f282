"""Plays the environments of `verifiers` in an interpreter that has that library; process.py starts it.

It imports nothing of this package: `verifiers` and SGLang ask for other versions of the same libraries, so
that they have an environment each. Requests and answers are JSON, one a line: the first request holds
verifiers' own [env] block. It ends when its input does, so also when the process that started it is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import verifiers.v1 as vf


def environment(settings: dict[str, Any]) -> vf.Env:
    """The environment of an [env] block, played on this machine. ValueError where several agents would be.

    What verifiers would take for an agent that says nothing of it is a sandbox of a service for its runtime,
    and for its program one that runs the model's commands.
    """
    taskset = settings["taskset"]["id"]
    declared = vf.env_config_type(taskset, settings.get("id", ""))
    agents = {
        name: field.default
        for name, field in declared.model_fields.items()
        if isinstance(field.default, vf.AgentConfig)
    }
    settings = dict(settings)
    for name in agents:
        own = dict(settings.get(name) or {})
        own.setdefault("runtime", {"type": "subprocess"})
        if vf.default_harness_id(taskset) == "bash":
            own.setdefault("harness", {"id": "null"})
        settings[name] = own
    config = vf.resolve_env_config(settings)
    trained = [name for name in agents if getattr(config, name).client is None]
    if len(trained) != 1:
        raise ValueError(
            f"the policy plays one agent of an environment, and {config.env_id} leaves it {len(trained)} of "
            f"{', '.join(agents)}: give each other one a `client` and a `model` of its own"
        )
    return vf.load_environment(config)


def tasks(env: vf.Env, size: int | None) -> list[dict[str, Any]]:
    """What the taskset has, in its order: all, or the first `size`."""
    if size is None and not env.taskset.bounded:
        raise ValueError(f"{env.config.env_id} has tasks without end: say how many are to be taken (size)")
    chosen = env.taskset if size is None else env.taskset.take(size)
    return [task.data.model_dump(mode="json") for task in chosen]


async def play(env: vf.Env, number: int, order: dict[str, Any]) -> float:
    """One episode; its reward. RuntimeError where the environment or its program failed."""
    task_type = type(env.taskset).task_type()
    data = task_type.data_type().model_validate(order["task"])
    key = f"EPISODE_{number}_KEY"  # verifiers takes keys from the environment alone
    os.environ[key] = order["api_key"]
    try:
        client = vf.EvalClientConfig(base_url=order["base_url"], api_key_var=key)
        context = vf.ModelContext(client=client, model=order["model"], sampling=vf.SamplingConfig())
        (slot,) = env.slots(task_type(data, env.config.taskset.task))
        episode = await env.run_slot(slot, context)
    finally:
        del os.environ[key]
    if not episode.ok:
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors[:3]))
    return float(sum(trace.reward for trace in episode.traces if trace.agent.trainable))


async def main() -> None:
    """Answers every line of the input, several at a time."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is not an answer

    def answer(number: int, **words: Any) -> None:
        print(json.dumps({"number": number, **words}), file=answers, flush=True)

    loop, lines = asyncio.get_running_loop(), asyncio.StreamReader(limit=2**30)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    running: dict[int, asyncio.Task[None]] = {}
    try:
        env = environment(json.loads(await lines.readline()))
    except Exception as error:  # a package's own, of any kind
        answer(0, error=f"{type(error).__name__}: {error}")
        return

    async def handle(order: dict[str, Any]) -> None:
        number = order["number"]
        try:
            found = tasks(env, order["size"]) if "size" in order else await play(env, number, order)
            answer(number, value=found)
        except Exception as error:  # of the environment's code
            answer(number, error=f"{type(error).__name__}: {error}")
        finally:
            running.pop(number, None)

    async with env.serving():
        answer(0, value=None)
        while line := await lines.readline():
            order = json.loads(line)
            if "end" in order:
                if task := running.get(order["end"]):
                    task.cancel()
                continue
            running[order["number"]] = loop.create_task(handle(order))
        for task in [*running.values()]:
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
