"""A plan: one recipe on one set of machines, with its memory, its time, and whether it fits."""

from dataclasses import dataclass
from functools import cached_property

from tempo_em.plan import memory
from tempo_em.plan.layout import Layout, make_layout
from tempo_em.plan.machine import machine_named
from tempo_em.plan.memory import PhaseMemory
from tempo_em.plan.roofline import PhaseTime, times
from tempo_em.plan.sampling import Sampling, most_running, sampling
from tempo_em.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """Bytes are those of one rank; seconds are those of one iteration with every sample as long as it may be."""

    layout: Layout

    @cached_property
    def sampling(self) -> Sampling:
        return sampling(self.layout)

    @cached_property
    def phases(self) -> list[PhaseMemory]:
        return [self.sampling.memory, *memory.phases(self.layout)]

    @cached_property
    def times(self) -> list[PhaseTime]:
        return times(self.layout, self.sampling)

    @property
    def peak(self) -> PhaseMemory:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.peak.total)

    @property
    def free(self) -> float:
        """Bytes left of what is usable at the peak; negative when it does not fit."""
        return self.layout.machine.usable - self.peak.peak.total

    @cached_property
    def most_running(self) -> int:
        """Sequences that the engine's own sampler could decode at a time on each rank."""
        return most_running(self.layout)

    @property
    def host_bytes(self) -> float:
        """Shards in the host memory of one node, with offload."""
        if not self.layout.offloads:
            return 0.0
        shards = memory.held_shards(self.layout)
        gradients = shards["optimiser"] / 2
        return self.layout.per_node * (sum(shards.values()) + gradients)

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @property
    def slowest(self) -> PhaseTime:
        return max(self.times, key=lambda phase: phase.total)

    @property
    def seconds(self) -> float:
        return sum(phase.total for phase in self.times)

    @property
    def generated_tokens(self) -> int:
        return self.layout.sampled_rows * self.layout.response_tokens

    @property
    def trained_tokens(self) -> int:
        """Tokens, prompts included, of all forward and backward passes."""
        layout = self.layout
        rows = layout.policy_update().num_rows + (layout.critic_update().num_rows if layout.recalibrates else 0)
        return rows * layout.row_tokens


def make_plan(recipe: Recipe, *, gpu: str, per_node: int, nodes: int = 1) -> Plan:
    """Raises UserError for a recipe that could not run there at all; one that is too large gives a plan that does not fit."""
    return Plan(make_layout(recipe, machine_named(gpu, processes=per_node), per_node, nodes))
