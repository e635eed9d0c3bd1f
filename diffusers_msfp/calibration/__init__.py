"""From values that were seen to `QParams`: the observer's sample, and the search."""

from .groups import search_groups
from .observer import Observation, observe
from .search import SearchResult, is_skewed, search_activation, search_qparams, search_weight

__all__ = [
    "Observation",
    "SearchResult",
    "is_skewed",
    "observe",
    "search_activation",
    "search_groups",
    "search_qparams",
    "search_weight",
]
