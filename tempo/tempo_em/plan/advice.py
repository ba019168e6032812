"""What to change when a plan does not fit. Every change is planned in its turn; what comes out of it is reported, not guessed."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tempo_em.plan.plan import Plan

# Processes are doubled, and responses halved, at most so many times.
MOST_DOUBLINGS = 10
GPUS_OF_A_NODE = 8


class Change(NamedTuple):
    """Settings as --set takes them, and how many processes there are with them."""

    settings: tuple[str, ...] = ()
    per_node: int | None = None
    nodes: int | None = None

    def __str__(self) -> str:
        words = [f"--set {setting}" for setting in self.settings]
        words += [f"--{name} {n}" for name, n in (("gpus", self.per_node), ("nodes", self.nodes)) if n is not None]
        return " ".join(words)

    def joined(self, other: "Change") -> "Change":
        return Change(self.settings + other.settings, other.per_node or self.per_node, other.nodes or self.nodes)


class Trial(NamedTuple):
    """A change and the plan with it."""

    change: Change
    plan: Plan


def advice(plan: Plan, replan: Callable[[Change], Plan]) -> list[Trial]:
    """Each single change and what it gives; when none of them is enough, also the changes without cost put together, then with
    those that have one, with as many processes as it takes, and at last with as short responses."""

    def least(changes: Iterator[Change]) -> list[Change]:
        """The first that is enough, if any is."""
        return next(([change] for change in changes if replan(change).fits), [])

    kinds = list(_without_cost(plan))
    singles = [*(change for kind in kinds for change in kind), *_with_cost(plan), *least(_more_processes(plan))]
    trials = [Trial(change, replan(change)) for change in singles]
    if any(trial.plan.fits for trial in trials):
        return trials
    together = functools.reduce(Change.joined, (kind[-1] for kind in kinds), Change())
    joined = [together, *map(together.joined, _with_cost(plan))]
    joined += least(map(together.joined, _more_processes(plan)))
    joined += least(map(together.joined, _shorter_responses(plan)))
    tried = [Change(), *singles]
    for change in (change for change in joined if change not in tried):
        trials.append(Trial(change, replan(change)))
        if trials[-1].plan.fits:
            break
    return trials


def _without_cost(plan: Plan) -> Iterator[list[Change]]:
    """Changes that leave every result as it is and cost some time at most; of each kind the strongest last."""
    recipe, layout = plan.layout.recipe, plan.layout
    if layout.machine.is_gpu and recipe.model.dtype != "bfloat16":
        yield [Change(("model.dtype=bfloat16", "model.attention=flash_attention_2"))]
    elif recipe.model.attention == "eager":
        yield [Change(("model.attention=sdpa",))]
    stronger = {"off": ["selective", "full"], "selective": ["full"], "full": []}
    if modes := stronger[recipe.model.activation_checkpointing]:
        yield [Change((f"model.activation_checkpointing={mode}",)) for mode in modes]
    if layout.is_sharded and recipe.parallel.accumulate == "whole":
        yield [Change(("parallel.accumulate=sharded",))]
    if recipe.micro_batch_tokens >= 2 * layout.row_tokens:
        yield [Change((f"micro_batch_tokens={layout.row_tokens}",))]
    if plan.sampling.is_local and plan.sampling.running > recipe.em.group_size:
        yield [Change((f"rollout.max_running={max(plan.sampling.running // 4, recipe.em.group_size)}",))]


def _with_cost(plan: Plan) -> list[Change]:
    """Changes that cost much time, or some of what can be learned."""
    recipe = plan.layout.recipe
    found = [Change(("parallel.offload=true",))] if plan.layout.machine.is_gpu and not recipe.parallel.offload else []
    return found + ([] if recipe.model.lora else [Change(("model.lora.rank=16",))])


def _more_processes(plan: Plan) -> Iterator[Change]:
    """Twice as many, and twice again; a node is filled first. On a CPU processes share one memory: more of them help nobody."""
    per_node, nodes = plan.layout.per_node, plan.layout.nodes
    for _ in range(MOST_DOUBLINGS if plan.layout.machine.is_gpu else 0):
        per_node, nodes = (per_node * 2, nodes) if per_node < GPUS_OF_A_NODE else (per_node, nodes * 2)
        yield Change((), per_node, nodes)


def _shorter_responses(plan: Plan) -> Iterator[Change]:
    for halvings in range(1, MOST_DOUBLINGS + 1):
        yield Change((f"rollout.max_new_tokens={max(plan.layout.response_tokens >> halvings, 1)}",))
