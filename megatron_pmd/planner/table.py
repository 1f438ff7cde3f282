"""A plan on the screen."""

from __future__ import annotations

from dataclasses import fields

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from megatron_pmd.config import RunConfig
from megatron_pmd.engine.placement import sampled_by
from megatron_pmd.planner.memory import Owners, microbatches_per_step
from megatron_pmd.planner.planning import Plan, difference, gigabytes
from megatron_pmd.planner.split import iteration_seconds, split_of


def show(plan: Plan, console: Console | None = None) -> None:
    """Print everything the plan knows, its assumptions last."""
    console = console or Console()
    tables = [_run(plan), _devices(plan), _hosts(plan), _time(plan)]
    if plan.sampled_by == "engines":
        tables = [*tables[:3], _engines(plan), tables[3], _apart(plan)]
    console.print(Group(*tables, _assumed(plan)))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def batch_arithmetic(config: RunConfig, *, replay: bool) -> list[tuple[str, str]]:
    """The numbers that follow from the batch settings, in words."""
    batch = config.batch
    prompts = f"{batch.prompts_per_rollout} prompts x {batch.samples_per_prompt}"
    return [
        ("samples per rollout", f"{prompts} = {batch.samples_per_rollout:,}"),
        ("optimizer steps per rollout", f"{batch.steps_per_rollout} of {batch.samples_per_step:,} samples"),
        ("micro-batches per step", f"about {microbatches_per_step(config)} on each rank"),
        ("actor ranks", f"{config.layout.ranks}, {layout_words(config)}"),
        ("engines", _engine_words(config, replay=replay)),
    ]


def _engine_words(config: RunConfig, *, replay: bool) -> str:
    sampler = sampled_by(config, replay=replay)
    if sampler is None:
        return "none"
    if sampler == "servers":
        return f"none; {len(config.rollout.servers)} server(s) of others"
    nodes = config.layout.engine_nodes
    if not nodes:
        return f"{config.engines} of {config.ranks_per_engine} ranks"
    return f"{config.engines}, {config.engines_per_node} on each of {nodes} nodes of their own"


def layout_words(config: RunConfig) -> str:
    """The sizes of the ranks' layout that are not 1."""
    sizes = [
        (key, value)
        for key, value in config.layout.model_dump().items()
        if isinstance(value, int) and value > 1 and key != "engine_nodes"
    ]
    return " x ".join(f"{key} {value}" for key, value in sizes) or "one of everything"


def _run(plan: Plan) -> Table:
    shape, machines = plan.shape, plan.machines
    where = f"{plan.nodes} node(s) of {machines.devices_per_node} x {machines.device.name}"
    table = _table(f"{plan.config.name} on {where}", "", "")
    table.show_header = False
    rows = [
        ("model", f"{shape.name}: {shape.total:,} parameters, {shape.active:,} active"),
        ("shape from", shape.source),
        *batch_arithmetic(plan.config, replay=plan.replay),
        ("checkpoint", gigabytes(plan.checkpoint_bytes)),
    ]
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _devices(plan: Plan) -> Table:
    device = plan.machines.device
    title = f"memory of the fullest {device.name}" + (
        "" if plan.machines.shares_host_memory else f" ({gigabytes(device.memory_bytes)})"
    )
    return _by_phase(title, plan.phases)


def _by_phase(title: str, phases: dict[str, Owners]) -> Table:
    """Owners in rows, phases in columns."""
    table = _table(title, "owner", *phases)
    for owner in dict.fromkeys(owner for phase in phases.values() for owner in phase):
        table.add_row(owner, *(_cell(phase.get(owner)) for phase in phases.values()))
    table.add_row("[bold]together", *(_cell(sum(phase.values())) for phase in phases.values()))
    return table


def _cell(size: float | None) -> str:
    if size is None:
        return ""
    return gigabytes(size) if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _hosts(plan: Plan) -> Table:
    title = f"host memory of a node ({gigabytes(plan.machines.host_memory_bytes)})"
    return _by_phase(title, plan.host)


def _engines(plan: Plan) -> Table:
    table = _table("an engine's KV cache", "", "")
    table.show_header = False
    table.add_row("tokens", f"{plan.cache.tokens:,}")
    table.add_row("samples of the greatest length", f"{plan.cache.longest_samples:,}")
    table.add_row("requests decoded at one time", f"{plan.cache.running:,}")
    return table


def _time(plan: Plan) -> Table:
    cost = plan.cost
    table = _table("one iteration, estimated", "phase", "seconds")
    beside = "beside other phases" if plan.config.checkpoint.asynchronous else "training waits"
    names = {
        "save": "save: training stands still, when due",
        "write": f"a checkpoint to the disk: {beside}",
    }
    for phase, seconds in cost.seconds.items():
        table.add_row(names.get(phase, phase), f"{seconds:,.1f}")
    seconds, config, servers = iteration_seconds(plan), plan.config, plan.sampled_by == "servers"
    separate = plan.sampled_by == "engines" and config.rollout.placement == "separate"
    whole = "sampling beside training" if separate else "together"
    without = "a rollout and a checkpoint" if servers else "a checkpoint"
    table.add_row(f"[bold]{whole}, without {without}", f"{seconds:,.1f}")
    table.add_row(
        "operations of anchor and update", f"{(cost.anchor_flops + cost.update_flops) / 1e15:,.1f} PFLOP"
    )
    if not servers:
        rate = cost.response_tokens / seconds / config.devices
        table.add_row("response tokens per second and device", f"{rate:,.0f}")
    return table


def _apart(plan: Plan) -> Table:
    """Engines on devices of their own, that sample while the trainer trains."""
    separate, split = plan.config.rollout.placement == "separate", split_of(plan)
    how = "as the recipe has it" if separate else "balanced"
    table = _table(f"engines on devices of their own, {how}", "", "")
    table.show_header = False
    if split is None:
        table.add_row("no part of these devices", "holds the trainer alone")
        return table
    device = plan.machines.device.name
    engines = f"{split.engines} of {plan.config.rollout.tensor_parallel} {device}"
    table.add_row(f"engines: {engines}, which sample a rollout in", f"{split.sampling_seconds:,.1f} s")
    layout = split.trainer.config.layout
    trainer = f"{layout.ranks} {device}"
    table.add_row(f"trainer: {trainer}, anchor and update in", f"{split.training_seconds:,.1f} s")
    table.add_row("sync, in which both stand still", f"{split.sync_seconds:,.1f} s")
    table.add_row("[bold]one iteration, overlapped", f"{split.iteration_seconds:,.1f} s")
    if not separate:
        table.add_row("settings", " ".join(difference(plan.config, split.trainer.config)))
    return table


def _assumed(plan: Plan) -> Text:
    values = [
        f"{field.name.replace('_', ' ')} {getattr(plan.assumptions, field.name):g}"
        for field in fields(plan.assumptions)
    ]
    return Text("Assumed, not measured here: " + ", ".join(values) + ".", style="dim")
