"""The plan of a run: which rank does what where, and what memory that takes; made without a GPU and without weights."""

from respec_trainer.plan.memory import GB, MemoryPlan, plan_memory
from respec_trainer.plan.places import Cluster, Layout, RankPlace, plan_layout

__all__ = ["GB", "Cluster", "Layout", "MemoryPlan", "RankPlace", "plan_layout", "plan_memory"]
