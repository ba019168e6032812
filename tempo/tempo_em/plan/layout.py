"""Who holds what, and how much is worked on at a time: a recipe on so many processes of a machine.

It mirrors the engine: `tempo_engine.parallel` (FSDP2 groups), `model` (policy, critic, reference), `packing` (micro-batches).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tempo_engine.errors import UserError

from tempo_em.plan.configs import model_config
from tempo_em.plan.machine import Machine
from tempo_em.plan.shape import Shape, shape_of
from tempo_em.recipe import Recipe

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float64": 8}


class Group(NamedTuple):
    """Weights that are gathered, computed with and freed together: their number, and how many of them are trained."""

    size: int
    trained: int


@dataclass(frozen=True)
class Network:
    """A model as FSDP2 groups it: blocks that are all alike, an embedding of its own unless it is tied, and the rest (last norm, LM
    head, tied embedding), which stays gathered from forward to backward."""

    num_blocks: int
    block: Group
    embedding: Group | None
    root: Group
    head: int

    @property
    def groups(self) -> list[Group]:
        return [*[self.block] * self.num_blocks, *([self.embedding] if self.embedding else []), self.root]

    @property
    def size(self) -> int:
        return sum(group.size for group in self.groups)

    @property
    def trained(self) -> int:
        return sum(group.trained for group in self.groups)

    @property
    def largest_part(self) -> int:
        """The largest group that is gathered for a while only."""
        return max(self.block.size, self.embedding.size if self.embedding else 0)


class Pass(NamedTuple):
    """A forward pass, and with `is_update` the backward one, over rows in micro-batches, as one rank sees it."""

    num_rows: int  # of all ranks, in all steps
    rank_rows: int  # of the rank that has most
    num_steps: int  # optimiser steps; 1 for a forward pass
    micro_batches: int  # in one step
    micro_rows: int  # in one micro-batch
    is_update: bool


@dataclass(frozen=True)
class Layout:
    """One EM iteration of `recipe` on `nodes` x `per_node` processes, every prompt and response as long as it may be."""

    recipe: Recipe
    shape: Shape
    machine: Machine
    per_node: int
    nodes: int

    @property
    def world(self) -> int:
        return self.per_node * self.nodes

    @property
    def num_shards(self) -> int:
        return self.world // self.recipe.parallel.replicas if self.is_sharded else 1

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 is at work: on many processes, or for mixed precision (see `tempo_engine.parallel.Sharding`)."""
        return self.world > 1 or self.recipe.model.dtype == "bfloat16"

    @property
    def offloads(self) -> bool:
        return self.recipe.parallel.offload and self.is_sharded

    @property
    def stays_gathered(self) -> bool:
        """Whether weights stay gathered between forward and backward; without FSDP2 there is nothing to gather."""
        return self.is_sharded and (self.world == 1 or not self.recipe.parallel.reshard_after_forward)

    @property
    def compute(self) -> int:
        """Bytes of a number in the computation."""
        return ITEMSIZE[self.recipe.model.dtype]

    @property
    def storage(self) -> int:
        """Bytes of a kept weight, of its gradient and of each of its two moments: bfloat16 is kept in float32."""
        return max(self.compute, 4)

    @property
    def is_packed(self) -> bool:
        return self.recipe.model.attention == "flash_attention_2"

    @property
    def prompt_tokens(self) -> int:
        return self.recipe.rollout.max_prompt_tokens

    @property
    def response_tokens(self) -> int:
        return self.recipe.rollout.max_new_tokens

    @property
    def row_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    # --- Models --------------------------------------------------------------------------------------------------------------

    @cached_property
    def policy(self) -> Network:
        shape = self.shape
        embedding = None if shape.is_tied else self._group(shape.embedding)
        return Network(shape.num_layers, self._block, embedding, self._group(shape.embedding + shape.hidden_size), 0)

    @cached_property
    def critic(self) -> Network | None:
        """None when the method needs no critic. On a shared backbone it is a value head."""
        if not self.recipe.uses_critic:
            return None
        shape, head = self.shape, (self.shape.hidden_size + 1) * self.recipe.critic.heads
        if self.recipe.critic.backbone == "shared":
            return Network(0, Group(0, 0), None, Group(0, 0), head)
        return Network(
            shape.num_layers, self._block, self._group(shape.embedding), self._group(shape.hidden_size), head
        )

    @property
    def has_reference(self) -> bool:
        return self.recipe.mstep.kl_coef > 0

    @cached_property
    def _block(self) -> Group:
        lora = self.recipe.model.lora
        if lora is None:
            return Group(self.shape.block, self.shape.block)
        adapters = self.shape.adapters(lora.rank, lora.targets)
        return Group(self.shape.block + adapters, adapters)

    def _group(self, size: int) -> Group:
        return Group(size, 0 if self.recipe.model.lora else size)

    def trunk_of(self, network: Network) -> Network:
        """The network whose blocks it reads: its own, or on a shared backbone the policy's."""
        return network if network.num_blocks else self.policy

    # --- Work ----------------------------------------------------------------------------------------------------------------

    @cached_property
    def labelled_rows(self) -> int:
        return self.recipe.groups(self.recipe.em.labelled_share)[0] * self.recipe.em.labelled_group_size

    @cached_property
    def unlabelled_rows(self) -> int:
        return self.recipe.groups(self.recipe.em.labelled_share)[1] * self.recipe.em.group_size

    @property
    def voting_rows(self) -> int:
        """Unlabelled responses that are sampled: those that are trained on, and those that only vote."""
        return self.unlabelled_rows // self.recipe.em.group_size * self.recipe.em.samples

    @property
    def sampled_rows(self) -> int:
        return self.labelled_rows + self.voting_rows

    @property
    def policy_rows(self) -> int:
        """Rows of the M-step."""
        return self.unlabelled_rows + self.labelled_rows * self.recipe.em.train_policy_on_labelled

    @property
    def recalibrates(self) -> bool:
        return self.critic is not None and self.recipe.estep.every > 0 and self.labelled_rows > 0

    def forward(self, rows: int) -> Pass:
        return self._pass(rows, epochs=1, minibatches=1, is_update=False)

    def critic_update(self) -> Pass:
        how = self.recipe.estep
        return self._pass(self.labelled_rows, how.epochs, how.minibatches, is_update=True)

    def policy_update(self) -> Pass:
        how = self.recipe.mstep
        return self._pass(self.policy_rows, how.epochs, how.minibatches, is_update=True)

    def _pass(self, rows: int, epochs: int, minibatches: int, *, is_update: bool) -> Pass:
        steps = max(min(minibatches, rows), 1)
        rows_of_step = max(math.ceil(math.ceil(rows / steps) / self.world), 1)
        micro_rows = min(max(1, self.recipe.micro_batch_tokens // self.row_tokens), rows_of_step)
        num_steps = epochs * steps
        micro_batches = math.ceil(rows_of_step / micro_rows)
        return Pass(rows * epochs, num_steps * rows_of_step, num_steps, micro_batches, micro_rows, is_update)


def make_layout(recipe: Recipe, machine: Machine, per_node: int, nodes: int) -> Layout:
    """Raises UserError for what could not run there at all, before any question of size."""
    config, where = model_config(recipe)
    shape = shape_of(config, where)
    layout = Layout(recipe, shape, machine, per_node, nodes)
    if layout.world % recipe.parallel.replicas:
        raise UserError(
            f"parallel.replicas is {recipe.parallel.replicas}, which does not divide {layout.world} processes"
        )
    if recipe.model.attention == "flash_attention_2" and not machine.is_gpu:
        raise UserError(
            "model.attention flash_attention_2 needs a GPU; add --set model.attention=sdpa, or plan for a GPU"
        )
    check_positions(layout.row_tokens, shape.max_positions)
    return layout


def check_positions(row_tokens: int, limit: int | None) -> None:
    """Raises UserError when the longest sample has more tokens than the model has positions."""
    if limit is not None and row_tokens > limit:
        raise UserError(
            f"rollout.max_prompt_tokens + max_new_tokens is {row_tokens}, but the model takes {limit} positions; lower one of them"
        )
