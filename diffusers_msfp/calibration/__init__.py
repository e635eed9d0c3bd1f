"""From values that were seen to `QParams`: the observer's sample, and the search."""

from .observer import Observation, observe
from .search import SearchResult, is_anomalous, search_activation, search_qparams, search_weight

__all__ = [
    "Observation",
    "SearchResult",
    "is_anomalous",
    "observe",
    "search_activation",
    "search_qparams",
    "search_weight",
]
