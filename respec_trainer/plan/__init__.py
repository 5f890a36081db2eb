"""The plan of a run: the role and host of each rank, and its memory. Planning needs no GPU and no weights."""

from respec_trainer.plan.memory import GB, MemoryPlan, plan_memory
from respec_trainer.plan.places import Cluster, Layout, RankPlace, plan_layout

__all__ = ["GB", "Cluster", "Layout", "MemoryPlan", "RankPlace", "plan_layout", "plan_memory"]
