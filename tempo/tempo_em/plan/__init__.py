"""`tempo-engine plan`: memory, work and time of a run, predicted from its configs before anything is loaded.

A plan reads top to bottom: `shape` (what a model's config says), `layout` (who holds what, and how much at a time), `memory`
(what exists at the fullest moments of each phase), `sampling` (the rollout's share of it), `roofline` (operations, bytes and
seconds), `advice` (what to change when it doesn't fit), `report` (the page). Nothing here imports torch.
"""

from tempo_em.plan.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
