"""Temporal feature maintenance (TFMQ-DM): find what depends on the timestep alone, keep it right by timestep."""

from .block import BlockLayer, TemporalBlock, find_block, find_upstream, root_inputs
from .finite_set import FeatureTable, FiniteSet, finite_set_search, quantize_rows, store_features
from .plan import SCOPES, TemporalPlan

__all__ = [
    "SCOPES",
    "BlockLayer",
    "FeatureTable",
    "FiniteSet",
    "TemporalBlock",
    "TemporalPlan",
    "find_block",
    "find_upstream",
    "finite_set_search",
    "quantize_rows",
    "root_inputs",
    "store_features",
]
