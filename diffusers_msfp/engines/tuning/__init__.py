"""Which of several exact ways of computing something is the fastest here, measured on real shapes."""

from .measure import VARIABLE, allowed, fastest, forget, measured, store, text_of, threads_and_limit

__all__ = ["VARIABLE", "allowed", "fastest", "forget", "measured", "store", "text_of", "threads_and_limit"]
