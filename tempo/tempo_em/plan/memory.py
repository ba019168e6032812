"""What one rank holds at the fullest moments of each phase, item by item.

Of an update these moments can be the fullest, and the plan takes the largest:

    head     the backward begins: every block's activations are there, and the LM head's buffers beside them
    block    the last block's backward: beside them its recomputed activations, gradients of activations, of its largest matrix
    next     the backward of the block before it, while the gradients of the last block are on their way
    end      the backward is done but for embedding and head, whose gradients are the largest single ones
    step     AdamW, with all gradients and no activations
"""

from dataclasses import dataclass

from tempo_em.plan.activations import BlockActivations, block_activations, last_norm
from tempo_em.plan.gradients import Gradients
from tempo_em.plan.head import head_backward, head_forward
from tempo_em.plan.layout import Layout, Network, Pass

Items = dict[str, float]


@dataclass(frozen=True)
class Moment:
    """Bytes of one rank at one point of a phase, by what they are for."""

    name: str
    items: Items

    @property
    def total(self) -> float:
        return sum(self.items.values())


@dataclass(frozen=True)
class PhaseMemory:
    name: str
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


def resident(layout: Layout) -> Items:
    """Shards that never leave the device: weights, moments and the frozen reference. With offload they lie in host memory."""
    return {} if layout.offloads else held_shards(layout)


def held_shards(layout: Layout) -> Items:
    """Shards of one rank, wherever they lie."""
    each = layout.storage / layout.num_shards
    networks = [network for network in (layout.policy, layout.critic) if network]
    items = {
        "weights": sum(each * network.size + layout.storage * network.head for network in networks),
        "optimiser": sum(2 * (each * network.trained + layout.storage * network.head) for network in networks),
    }
    if layout.recipe.keeps_frozen_critic and layout.critic:
        items["frozen critic"] = each * layout.critic.size + layout.storage * layout.critic.head
    return items | ({"reference": each * layout.policy.size} if layout.has_reference else {})


def phases(layout: Layout) -> list[PhaseMemory]:
    """Every phase but the rollout, in the order of an iteration."""
    found = []
    if layout.critic:
        values = forward_phase(layout, layout.critic, layout.forward(layout.sampled_rows), "values", reads_logits=False)
        found += [values]
        if layout.recalibrates:
            found += [update_phase(layout, layout.critic, layout.critic_update(), "critic update", reads_logits=False)]
    logprobs = layout.forward(layout.policy_rows)
    if layout.recipe.mstep.old_logprob == "trainer":
        found += [forward_phase(layout, layout.policy, logprobs, "log-probs", reads_logits=True)]
    if layout.has_reference:
        found += [forward_phase(layout, layout.policy, logprobs, "reference log-probs", reads_logits=True)]
    return [*found, update_phase(layout, layout.policy, layout.policy_update(), "policy update", reads_logits=True)]


def forward_phase(layout: Layout, network: Network, work: Pass, name: str, *, reads_logits: bool) -> PhaseMemory:
    """A pass without gradients: one block's activations come and go, then the head's buffers."""
    tokens, responses = _tokens(layout, work)
    always = resident(layout) | {"gathered weights": gathered(layout, network)}
    hidden = layout.compute * layout.shape.hidden_size * tokens
    blocks = {"activations": activations(layout).forward * tokens}
    return PhaseMemory(
        name,
        (
            Moment("block", always | blocks),
            Moment("head", always | {"activations": hidden, **_head(layout, responses, reads_logits, is_update=False)}),
        ),
    )


def update_phase(layout: Layout, network: Network, work: Pass, name: str, *, reads_logits: bool) -> PhaseMemory:
    tokens, responses = _tokens(layout, work)
    always = resident(layout) | {"gathered weights": gathered(layout, network)}
    per_token = activations(layout)
    trunk_has_gradient = network.num_blocks > 0
    one = per_token.kept * tokens
    working = (per_token.again + per_token.backward) * tokens
    kept = layout.shape.num_layers * one
    at_head = kept + last_norm(layout.shape, layout.compute) * tokens
    if not trunk_has_gradient:  # a critic on the policy's trunk trains its head only
        at_head, kept, one, working = per_token.forward * tokens, 0.0, 0.0, 0.0
    head = _head(layout, responses, reads_logits, is_update=True)
    gradients = Gradients(layout, network, work, reads_logits)
    return PhaseMemory(
        name,
        (
            Moment("head", always | {"activations": at_head, **head, "gradients": gradients.at_head()}),
            Moment("block", always | {"activations": kept + working, "gradients": gradients.at_block()}),
            Moment("next", always | {"activations": kept - one + working, "gradients": gradients.at_next()}),
            Moment("end", always | {"gradients": gradients.at_end()}),
            Moment("step", resident(layout) | {"gradients": gradients.at_step()}),
        ),
    )


def activations(layout: Layout) -> BlockActivations:
    how, lora = layout.recipe.model, layout.recipe.model.lora
    return block_activations(
        layout.shape,
        compute=layout.compute,
        attention=how.attention,
        checkpointing=how.activation_checkpointing,
        row_tokens=layout.row_tokens,
        adapted=layout.shape.adapted(lora.targets) if lora else None,
        rank=lora.rank if lora else 0,
    )


def gathered(layout: Layout, network: Network) -> float:
    """Whole weights in the dtype of the computation: the root group, and either two groups (the running one and one on its way) or
    all of them."""
    if not layout.is_sharded:
        return 0.0
    network = layout.trunk_of(network)
    if layout.stays_gathered:
        on_its_way = network.largest_part if layout.world > 1 else 0
        return layout.compute * (network.size + on_its_way)
    return layout.compute * (network.root.size + 2 * network.largest_part)


def _tokens(layout: Layout, work: Pass) -> tuple[int, int]:
    """Tokens and response tokens of one micro-batch."""
    return work.micro_rows * layout.row_tokens, work.micro_rows * layout.response_tokens


def _head(layout: Layout, responses: int, reads_logits: bool, *, is_update: bool) -> Items:
    """Buffers of the LM head; of the value head: gathered hidden states, as they are and in float32, and their gradient."""
    D, itemsize = layout.shape.hidden_size, layout.compute
    if reads_logits:
        need = head_backward if is_update else head_forward
        return {"LM head": need(responses, D, layout.shape.vocab_size, itemsize, is_gpu=layout.machine.is_gpu)}
    copies = itemsize + (4 if itemsize < 4 else 0)
    return {"value head": float(copies * responses * D * (2 if is_update else 1))}
