"""How fast the loop is beside the bare parts it is made of; figures and goals are in docs/benchmarks.md.

    python -m tools.bench.loop RECIPE [--run runs/NAME] [--repetitions 3] [--output bench.json] [--only TOPIC]

Prints Markdown tables. Without --run it makes a short run of the recipe, for what is read from a ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import psutil
import typer

from megatron_pmd.batch import RolloutBatch
from megatron_pmd.config import RunConfig
from megatron_pmd.data.prompts import prompt_source, tokenize
from megatron_pmd.data.sources import problems_of
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.router import RouterProcess, RouterSpec
from megatron_pmd.engine.server import free_port
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec
from megatron_pmd.errors import PmdError
from megatron_pmd.files import read_records
from megatron_pmd.node.ranks import LOCK
from megatron_pmd.node.worker import prepare_model
from megatron_pmd.observe.versions import versions
from megatron_pmd.rewards.pool import RewardPool
from megatron_pmd.rollout.generate_client import Endpoint
from megatron_pmd.rollout.groups import DrawSettings, RolloutGroups
from megatron_pmd.rollout.sampler import Limits, Sampler, stop_tokens
from megatron_pmd.rollout_file import write_rollout
from recipes import configuration
from tools.bench import update as bench_update_sides

ROOT = Path(__file__).parents[2]
LOOP_PHASES = ("rollout", "release", "anchor", "update", "save", "sync", "resume")
WORK_PHASES = ("rollout", "anchor", "update")
TOPICS = ("rollout", "update", "sync", "outside", "first_rollout")

Row = dict[str, Any]
"""One line of a table: what, value, unit, and where it applies ratio and goal."""


def row(what: str, values: list[float], unit: str, **more: Any) -> Row:
    middle = statistics.median(values)
    return {"what": what, "value": middle, "unit": unit, "all": [round(v, 4) for v in values], **more}


def compared(ours: Row, reference: Row, goal: float) -> list[Row]:
    """The two rows, ours with its ratio to the reference and the goal for it."""
    return [reference, ours | {"ratio": ours["value"] / reference["value"], "goal": f"≥ {goal:g}"}]


# rollout


@dataclass(frozen=True)
class Served:
    """Engines with the model folder's weights as version 0, and the router before them."""

    engines: list[EngineProcess]
    router: RouterProcess
    headers: dict[str, str]

    def flush(self) -> None:
        """As after every sync: no prefix is known from an earlier repetition."""
        for engine in self.engines:
            with EngineControl(engine.spec, 60) as control:
                control.flush_cache()


@contextlib.contextmanager
def served(config: RunConfig, folder: Path) -> Iterator[Served]:
    """The recipe's engines, started as the fleet starts them."""
    import torch

    keys = Keys(api=secrets.token_hex(24))
    with contextlib.ExitStack() as cleanup:
        engines = []
        for number in range(config.engines):
            spec = EngineSpec(
                number=number, model=config.model, rollout=config.rollout, port=free_port(),
                log=folder / f"engine-{number}.log", seed=number, cpu=not torch.cuda.is_available(),
                keys=keys, first_gpu=number * config.ranks_per_engine, load_model_weights=True,
            )  # fmt: skip
            engines.append(EngineProcess(spec))
            cleanup.callback(engines[-1].stop)
        for engine in engines:
            engine.wait_ready(config.rollout.start_timeout_seconds)
            with EngineControl(engine.spec, 60) as control:
                control.begin_update()
                control.end_update(0)
        router = RouterProcess(
            RouterSpec([e.url for e in engines], free_port(), folder / "router.log", 600.0, api_key=keys.api)
        )
        cleanup.callback(router.stop)
        router.wait_ready(60)
        yield Served(engines, router, keys.headers)


def bench_rollout(config: RunConfig, repetitions: int, folder: Path) -> list[Row]:
    """The driver's way (router, rewards, rollout file, packed batch) against a client that only posts."""
    from megatron_pmd.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    (source,) = config.problem_sources("train")
    problems = problems_of(source)
    kept, _ = tokenize(problems, tokenizer, config.batch.max_prompt_tokens)
    chosen = prompt_source(kept, config.seed, config.data.sampling).take(config.batch.prompts_per_rollout)
    stops = stop_tokens(tokenizer, config.model.path)
    loop, bare = [], []
    with served(config, folder) as engines, RewardPool(config.reward) as rewards:
        sampler = Sampler(
            Endpoint(engines.router.url, (), engines.headers, 600.0, 0, any_engine_alive=lambda: True),
            tokenizer, stops, Limits(config.batch.max_response_tokens), rewards,
        )  # fmt: skip
        for turn in range(repetitions + 1):
            settings = DrawSettings(
                config.batch.samples_per_prompt, turn, 0, config.rollout.temperature, config.rollout.top_p,
                config.seed,
            )  # fmt: skip
            rollout = RolloutGroups(chosen, settings)
            requests = _requests(rollout, stops, config.batch.max_response_tokens)
            engines.flush()
            loop.append(_through_the_loop(sampler, rollout, folder / "rollout.parquet"))
            engines.flush()
            bare.append(asyncio.run(_posted(engines, requests)))
    # the first turn warms the engines up
    return compared(
        row("through the loop: driver, router, rewards, file", loop[1:], "tokens/s"),
        row("the same requests posted to the engines", bare[1:], "tokens/s"),
        0.9,
    )


def _through_the_loop(sampler: Sampler, rollout: RolloutGroups, file: Path) -> float:
    """Tokens per second of what the driver does in the rollout phase."""
    begun = time.perf_counter()
    sampler.run(rollout)
    samples = rollout.samples(sampler.tokenizer)
    write_rollout(file, samples, rollout.settings.iteration)
    batch = RolloutBatch.pack(samples, rollout.settings.temperature)
    return float(batch.samples.response_lengths.sum()) / (time.perf_counter() - begun)


def _requests(rollout: RolloutGroups, stops: list[int], max_tokens: int) -> list[Row]:
    return [
        {
            "input_ids": member.tokens,
            "sampling_params": {
                "max_new_tokens": max_tokens, "temperature": rollout.settings.temperature,
                "top_p": rollout.settings.top_p, "stop_token_ids": stops,
                "sampling_seed": member.seed,
            },
            "return_logprob": True,
        }
        for group in rollout.groups
        for member in group.members
    ]  # fmt: skip


async def _posted(served: Served, requests: list[Row]) -> float:
    """Tokens per second of all requests at once, each engine given an equal share."""
    urls = [engine.url + "/generate" for engine in served.engines]
    share = -(-len(requests) // len(urls))

    async def post(number: int, request: Row) -> int:
        async with session.post(urls[number // share], json=request) as reply:
            return len((await reply.json())["output_ids"])

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    begun = time.perf_counter()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=served.headers) as session:
        tokens = await asyncio.gather(*(post(n, request) for n, request in enumerate(requests)))
    return sum(tokens) / (time.perf_counter() - begun)


# update


def bench_update(config: RunConfig, repetitions: int, folder: Path, rollout: Path) -> list[Row]:
    """The actor against one transformers process on as many threads; the first turn does not count.

    An optimizer step, then the anchor's pass. In each what the second clock gives stands also on a busy
    machine.
    """
    ranks, threads = config.layout.ranks, config.actor.threads_per_rank
    rates = bench_update_sides.take_turns(config, 2 * repetitions + 1, folder, rollout)
    plain, ours = f"transformers, {ranks * threads} threads", f"actor, {ranks} ranks x {threads} threads"
    names = {
        "plain": f"step: {plain}",
        "ours": f"step: {ours}",
        "plain_responses_only": "step: transformers, output layer on the responses only",
        "plain_anchor": f"anchor: {plain}",
        "ours_anchor": f"anchor: {ours}",
    }
    rows = []
    for clock, unit in enumerate(("tokens/s", "tokens/core-s")):
        told = {s: row(names[s], [turn[clock] for turn in rates[s][1:]], unit) for s in names}
        rows += [*compared(told["ours"], told["plain"], 1.0), told["plain_responses_only"]]
        rows += compared(told["ours_anchor"], told["plain_anchor"], 1.0)
    rows += [row(f"{names[s]}, peak memory", [turn[2] / 1e9 for turn in rates[s][1:]], "GB") for s in names]
    return rows


# from a run's ledger


def bench_sync(run: Path, repetitions: int) -> list[Row]:
    """Bytes per second of the sync phase against numpy's copy of as many bytes, on one core."""
    rows = [line for line in read_records(run / "ledger.jsonl") if line["phase"] == "sync"]
    if not rows:
        raise PmdError(f"{run / 'ledger.jsonl'} has no sync; give --run a run with engines")
    total = rows[0]["bytes"]
    source = np.ones(total, np.uint8)
    touched, copies = np.ones(total, np.uint8), {"fresh": [], "touched": []}  # type: ignore[var-annotated]
    for _ in range(repetitions):
        for kind in copies:
            target = touched if kind == "touched" else np.empty(total, np.uint8)
            begun = time.perf_counter()
            np.copyto(target, source)
            copies[kind].append(total / (time.perf_counter() - begun) / 1e9)
    sync = row(f"sync of {total / 1e6:,.0f} MB", [r["bytes"] / r["seconds"] / 1e9 for r in rows], "GB/s")
    fresh = row("memcpy into fresh pages", copies["fresh"], "GB/s")
    return [
        fresh,
        *compared(sync, row("memcpy into touched pages", copies["touched"], "GB/s"), 0.3),
        sync | {"what": "sync, against fresh pages", "ratio": sync["value"] / fresh["value"]},
    ]


def bench_outside(run: Path) -> list[Row]:
    """Share of an iteration that is not rollout, anchor or update, with and without checkpoint iterations."""
    ledger, files = read_records(run / "ledger.jsonl"), run / "rollouts"
    by_iteration: dict[int, dict[str, float]] = {}
    for line in ledger:
        if line["phase"] in LOOP_PHASES:
            by_iteration.setdefault(line["iteration"], {})[line["phase"]] = line["seconds"]
    complete = {t: phases for t, phases in by_iteration.items() if "resume" in phases}
    # a rollout's file is written at the end of its phase: between two files lies one whole iteration
    written = {
        t: (files / f"{t}.parquet").stat().st_mtime for t in by_iteration if (files / f"{t}.parquet").exists()
    }

    def share(iterations: list[int]) -> list[float]:
        sums = [(sum(complete[t][p] for p in WORK_PHASES), sum(complete[t].values())) for t in iterations]
        return [100 * (1 - work / whole) for work, whole in sums]

    def on_the_clock(iterations: list[int]) -> list[float]:
        return [
            100 * (1 - (complete[t]["anchor"] + complete[t]["update"] + by_iteration[t + 1]["rollout"])
                   / (written[t + 1] - written[t]))
            for t in iterations if t in written and t + 1 in written
        ]  # fmt: skip

    seconds = [(p, phases[p]) for phases in complete.values() for p in phases]
    together = 100 * (1 - sum(s for p, s in seconds if p in WORK_PHASES) / sum(s for _, s in seconds))
    quiet = [t for t in complete if "save" not in complete[t]]
    rows = []
    for name, values in (
        ("phases of the ledger, iterations without a checkpoint", share(quiet)),
        ("phases of the ledger, all iterations together", [together]),
        ("wall clock, iterations without a checkpoint", on_the_clock(quiet)),
    ):
        if values:
            rows.append(row(name, values, "%", goal="≤ 10 %"))
    return rows


def bench_first_rollout(run: Path, begun: float | None) -> list[Row]:
    """Where the time goes until the first rollout is on disk; begun: when the command was given, if known."""
    started = (run / LOCK).stat().st_mtime
    rows = [row("command: Python and its imports", [started - begun if begun else _import_seconds()], "s")]
    earlier = started
    for what, mark in (
        ("ranks: imports, process groups, run folder", run / "config.json"),
        ("problems, reward workers", run / "logs" / "engine-0.log.yaml"),
    ):
        rows.append(row(what, [mark.stat().st_mtime - earlier], "s"))
        earlier = mark.stat().st_mtime
    names = {
        "warm_start": "warm start",
        "start": "what is left of the engines' start; their first weights",
        "evaluate": "first evaluation",
        "rollout": "rollout",
    }
    ledger = [line for line in read_records(run / "ledger.jsonl") if line["iteration"] == 0]
    timed = [row(names[p["phase"]], [p["seconds"]], "s") for p in ledger if p["phase"] in names]
    end = (run / "rollouts" / "0.parquet").stat().st_mtime
    model = end - earlier - sum(r["value"] for r in timed)
    rows += [row("model built and loaded, while the engines start", [model], "s"), *timed]
    if min(r["value"] for r in rows) < -0.1:
        raise PmdError(f"{run} was resumed, and when it first began is not on record; give one that was not")
    return [*rows, row("command to first rollout", [sum(r["value"] for r in rows)], "s")]


def _import_seconds() -> float:
    """What the command does before it starts the ranks; a run has no record of it."""
    modules = "megatron_pmd.cli.main, megatron_pmd.node.ranks, megatron_pmd.observe.report"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, cwd=ROOT)
    return time.perf_counter() - begun


def short_run(recipe: str, folder: Path) -> tuple[Path, float]:
    """Three iterations of the recipe in a folder of its own, and when the command was given."""
    begun = time.time()
    settings = ["name=short", "iterations=3", "checkpoint.every=2", "checkpoint.hf_export=false"]
    subprocess.run(
        [sys.executable, "-m", "megatron_pmd.cli.main", "train", recipe, *settings, "--runs", str(folder)],
        check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return folder / "short", begun


# output


def machine() -> Row:
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    date = datetime.now().astimezone().isoformat(timespec="minutes")
    # what else runs on the machine spoils every figure: a quiet one is at 0.1 or below
    return versions() | {"memory": memory, "date": date, "load_before": os.getloadavg()[0]}


def markdown(topic: str, rows: list[Row]) -> str:
    lines = [
        f"## {topic.replace('_', ' ')}",
        "| | median | lowest–highest | ratio | goal |",
        "| --- | --: | --: | --: | --: |",
    ]
    for r in rows:
        spread = f"{min(r['all']):.3g}–{max(r['all']):.3g}" if len(r["all"]) > 1 else ""
        ratio = f"{r['ratio']:.2f}" if "ratio" in r else ""
        lines.append(
            f"| {r['what']} | {r['value']:.3g} {r['unit']} | {spread} | {ratio} | {r.get('goal', '')} |"
        )
    return "\n".join(lines) + "\n"


def main(
    recipe: Annotated[str, typer.Argument(help="a recipe's name, or a config.json")] = "smollm2_135m_cpu",
    run: Annotated[
        Path | None, typer.Option(help="a finished run of the recipe, of several iterations")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="all figures as JSON")] = Path("bench.json"),
    only: Annotated[list[str] | None, typer.Option(help=f"some of {', '.join(TOPICS)}")] = None,
) -> None:
    """Measure, print Markdown tables, write JSON."""
    if unknown := set(only or ()) - set(TOPICS):
        raise typer.BadParameter(f"--only {', '.join(unknown)}: choose from {', '.join(TOPICS)}")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder, begun = Path(name), None
        if run is None:
            run, begun = short_run(recipe, folder)
        config = configuration(recipe, [])  # not the run's own: an older run's may not be readable any more
        prepare_model(config)
        measures: dict[str, Callable[[], list[Row]]] = {
            "rollout": lambda: bench_rollout(config, repetitions, folder),
            "update": lambda: bench_update(config, repetitions, folder, run / "rollouts" / "0.parquet"),
            "sync": lambda: bench_sync(run, 3 * repetitions),
            "outside": lambda: bench_outside(run),
            "first_rollout": lambda: bench_first_rollout(run, begun),
        }
        results: dict[str, Any] = {"machine": machine(), "recipe": config.name, "run": str(run)}
        for topic in only or TOPICS:
            results[topic] = measures[topic]()
            print(markdown(topic, results[topic]), flush=True)
            output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        typer.run(main)
    except PmdError as error:
        sys.exit(f"{type(error).__name__}: {error}")
