"""Gradients of weights during an update: made group by group, added up over micro-batches, sent to where their shards belong."""

from dataclasses import dataclass

from tempo_em.plan.layout import Group, Layout, Network, Pass


@dataclass(frozen=True)
class Gradients:
    """Bytes of weights' gradients during one update.

    One process without FSDP2: whole gradients; when they are added up over micro-batches, the new one of a matrix lies beside its
    sum. FSDP2: a group's gradient appears in the dtype of the computation, is copied to float32 to travel, and leaves a shard;
    `whole` accumulation keeps whole float32 gradients until the step's last micro-batch.
    """

    layout: Layout
    network: Network
    work: Pass
    reads_logits: bool

    @property
    def whole(self) -> float:
        return self.layout.storage * self.network.trained

    @property
    def accumulates(self) -> bool:
        return self.work.micro_batches > 1

    @property
    def keeps_whole(self) -> bool:
        return self.accumulates and (not self.layout.is_sharded or self.layout.recipe.parallel.accumulate == "whole")

    @property
    def shards(self) -> float:
        return 0.0 if self.layout.offloads else self.whole / self.layout.num_shards

    @property
    def head(self) -> float:
        """The LM head's gradient, with which the backward begins."""
        return self.layout.compute * self.network.root.trained if self.reads_logits else 0.0

    def at_head(self) -> float:
        return self.head + self._accumulated()

    def at_block(self) -> float:
        return self._waiting + self._accumulated() + self._matrix

    def at_next(self) -> float:
        return self._waiting + self._accumulated() + self._travelling(self.network.block)

    def at_end(self) -> float:
        if not self.layout.is_sharded:
            return self.whole + self.layout.storage * self._last.trained * (
                self.accumulates or self.layout.shape.is_tied
            )
        done = self.whole if self.keeps_whole else self.shards
        return done + self.head + self._travelling(self._last)

    def at_step(self) -> float:
        return self.shards if self.layout.is_sharded else self.whole

    @property
    def _waiting(self) -> float:
        """The LM head's gradient until its group is done; one process adds it to its sum at once."""
        return 0.0 if self.accumulates and not self.layout.is_sharded else self.head

    def _accumulated(self) -> float:
        if self.keeps_whole:
            return self.whole
        return self.shards if self.accumulates else 0.0

    def _travelling(self, group: Group) -> float:
        """One group's new gradients as they were computed and as they travel; one process has a matrix of them at a time."""
        return (self.layout.compute + self.layout.storage) * group.trained if self.layout.is_sharded else self._matrix

    @property
    def _matrix(self) -> float:
        largest = max(inputs * outputs for inputs, outputs in self.layout.shape.linears.values())
        return self.layout.compute * min(largest, self.network.block.trained)

    @property
    def _last(self) -> Group:
        """The group whose gradient comes last: the embedding."""
        return self.network.embedding or self.network.root
