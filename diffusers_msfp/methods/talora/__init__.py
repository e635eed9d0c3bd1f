"""TALoRA: several low-rank adapters per layer, and a router that gives every timestep its adapter."""

from .adapters import AdapterBank, FullUpdate, adapter_rank
from .plan import AdapterPlan
from .router import TimestepRouter
from .routing import Route, RoutingTable
from .trainee import PLACEMENTS, Gate, Trainee

__all__ = [
    "PLACEMENTS",
    "AdapterBank",
    "AdapterPlan",
    "FullUpdate",
    "Gate",
    "Route",
    "RoutingTable",
    "TimestepRouter",
    "Trainee",
    "adapter_rank",
]
