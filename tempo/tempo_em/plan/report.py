"""A plan as a page for people and as JSON for programs."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tempo_em.plan.advice import Trial
from tempo_em.plan.machine import GIB
from tempo_em.plan.plan import Plan

MIB = 2**20
STYLE: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "pad_edge": False}
MOMENTS = {
    "head": "as the backward begins",
    "block": "in the last block's backward",
    "next": "in a block's backward, while gradients travel",
    "end": "as the embedding's gradient is made",
    "step": "in the optimiser's step",
    "prefill": "while prompts are read",
    "decode": "while responses are sampled",
}
PARTS = {
    "compute": "compute",
    "memory": "memory bandwidth",
    "links": "the links inside a node",
    "network": "the network between nodes",
    "host link": "the link to host memory",
}


def print_plan(name: str, plan: Plan, trials: Sequence[Trial]) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    layout = plan.layout
    console.print(
        f"{name}: {layout.nodes} x {layout.per_node} {layout.machine.name}, {layout.recipe.model.dtype}, {_spread(plan)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_parameters(plan), highlight=False, soft_wrap=True)
    for table in (_memory_table(plan), _time_table(plan)):
        console.print(table)
    for line in _conclusions(plan):
        console.print(line, highlight=False, soft_wrap=True)
    if trials:
        console.print(_advice_table(trials))


def _spread(plan: Plan) -> str:
    layout = plan.layout
    if not layout.is_sharded:
        return "one process, whole weights"
    replicas = layout.recipe.parallel.replicas
    spread = f"FSDP2 over {layout.num_shards} shards" + (f" x {replicas} replicas" if replicas > 1 else "")
    return spread + (", offloaded" if layout.offloads else "")


def _parameters(plan: Plan) -> str:
    shape, layout = plan.layout.shape, plan.layout
    parts = f"{shape.num_layers} blocks of {_count(shape.block)}, embedding {_count(shape.embedding)}"
    parts += ", tied to the LM head" if shape.is_tied else f", LM head {_count(shape.embedding)}"
    active = f", {_count(shape.active)} active for a token" if shape.num_experts else ""
    networks = [network for network in (layout.policy, layout.critic) if network]
    critic = f"{_count(layout.critic.size + layout.critic.head)}" if layout.critic else "none"
    trained = sum(network.trained + network.head for network in networks)
    reference = f"; reference {_count(shape.total)}" if layout.has_reference else ""
    return f"parameters: policy {_count(shape.total)} ({parts}{active}); critic {critic}{reference}; trained {_count(trained)}"


def _memory_table(plan: Plan) -> Table:
    unit, label = (GIB, "GiB") if plan.peak.peak.total > GIB else (MIB, "MiB")
    longest = f"{plan.layout.prompt_tokens:,} + {plan.layout.response_tokens:,} tokens"
    table = Table(title=f"Peak memory of one process at the longest sample ({longest}), {label}", min_width=90, **STYLE)
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    items = dict.fromkeys(item for phase in plan.phases for item in phase.peak.items)
    for item in items:
        cells = [phase.peak.items.get(item, 0.0) / unit for phase in plan.phases]
        if any(cells):
            table.add_row(item, *(f"{cell:,.2f}" if cell else "" for cell in cells))
    table.add_section()
    table.add_row("total", *(f"{phase.peak.total / unit:,.2f}" for phase in plan.phases), style="bold")
    return table


def _time_table(plan: Plan) -> Table:
    parts = [part for part in PARTS if any(part in phase.seconds for phase in plan.times)]
    table = Table(
        title="Work and least time of one iteration, every sample as long as it may be", min_width=90, **STYLE
    )
    table.add_column("")
    for heading in ("TFLOP", *(f"{part} s" for part in parts)):
        table.add_column(heading, justify="right")
    table.add_column("bound by")
    for phase in plan.times:
        seconds = [_number(phase.seconds[part]) if part in phase.seconds else "" for part in parts]
        table.add_row(phase.name, _number(phase.flops / 1e12), *seconds, PARTS[phase.bound])
    return table


def _conclusions(plan: Plan) -> Iterable[str]:
    layout, machine, peak = plan.layout, plan.layout.machine, plan.peak
    yield f"rollouts: {plan.sampling.description}"
    if not plan.sampling.is_local:
        own = f"rollout.max_running up to {plan.most_running}" if plan.most_running else "not even one group fits"
        yield f"          without servers, by the engine's own sampler on each GPU: {own}"
    usable = f"{_size(machine.usable)} usable of {_size(machine.memory)}"
    left = f"{_size(plan.free)} left" if plan.fits else f"too large by {_size(-plan.free)}"
    yield f"memory: {_size(peak.peak.total)} in {peak.name}, {MOMENTS[peak.peak.name]}; {usable}: {left}"
    if layout.offloads:
        yield f"host memory: {_size(plan.host_bytes)} of a node for shards, gradients and moments"
    tokens = plan.generated_tokens
    yield (
        f"an iteration: {layout.sampled_rows:,} responses, {_count(tokens)} tokens sampled, "
        f"{_count(plan.trained_tokens)} trained on, at least {_number(plan.seconds)} s "
        f"({tokens / plan.seconds:,.0f} sampled tokens/s)"
    )
    slowest = plan.slowest
    yield (
        f"bottleneck: {slowest.name}, {slowest.total / plan.seconds:.0%} of the time, bound by {PARTS[slowest.bound]}"
    )
    shares = f"{machine.product_share:.0%} of peak operations, {machine.memory_share:.0%} of memory bandwidth"
    yield f"assumed, not measured: {shares}, {machine.link_share:.0%} of link bandwidth; transfers overlap with products"


def _advice_table(trials: Sequence[Trial]) -> Table:
    table = Table(title="It does not fit. Changes, each planned:", **STYLE)
    table.add_column("change")
    for heading in ("peak", "left", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for change, plan in trials:
        verdict = "[green]fits" if plan.fits else f"[red]{plan.peak.name} is too large"
        table.add_row(str(change), _size(plan.peak.peak.total), _size(plan.free), _number(plan.seconds), verdict)
    return table


def as_json(name: str, plan: Plan, trials: Sequence[Trial]) -> dict[str, Any]:
    """Bytes of one process, seconds and operations of one iteration."""
    layout, shape = plan.layout, plan.layout.shape
    return {
        "recipe": name,
        "machine": layout.machine.name,
        "nodes": layout.nodes,
        "per_node": layout.per_node,
        "fits": plan.fits,
        "parameters": {
            "total": shape.total,
            "active": shape.active,
            "embedding": shape.embedding,
            "block": shape.block,
            "critic": layout.critic.size + layout.critic.head if layout.critic else 0,
        },
        "memory": {
            "capacity": layout.machine.memory,
            "usable": layout.machine.usable,
            "peak_phase": plan.peak.name,
            "peak": plan.peak.peak.total,
            "free": plan.free,
            "host": plan.host_bytes,
            "phases": {
                phase.name: {"moment": phase.peak.name, "total": phase.peak.total, "items": phase.peak.items}
                for phase in plan.phases
            },
        },
        "sampler": {
            "kind": "local" if plan.sampling.is_local else "sglang",
            "servers": plan.sampling.servers,
            "tensor_parallel": plan.sampling.tensor_parallel,
            "running": plan.sampling.running,
        },
        "tokens": {"generated": plan.generated_tokens, "trained": plan.trained_tokens},
        "time": {
            "seconds": plan.seconds,
            "bottleneck": plan.slowest.name,
            "bound": plan.slowest.bound,
            "phases": {phase.name: {"flops": phase.flops, "seconds": phase.seconds} for phase in plan.times},
        },
        "advice": [
            {"change": str(trial.change), "fits": trial.plan.fits, "peak": trial.plan.peak.peak.total,
             "free": trial.plan.free, "seconds": trial.plan.seconds}
            for trial in trials
        ],
    }  # fmt: skip


def _count(number: float) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if abs(size) >= GIB else f"{size / MIB:,.0f} MiB"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
