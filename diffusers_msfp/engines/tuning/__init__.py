"""Which of several exact ways of computing something is the fastest here, measured on real shapes."""

from .measure import (
    VARIABLE,
    about,
    allowed,
    chosen,
    fastest,
    forget,
    from_environment,
    is_steady,
    measured,
    measured_for,
    store,
    text_of,
    threads_and_limit,
)

__all__ = [
    "VARIABLE",
    "about",
    "allowed",
    "chosen",
    "fastest",
    "forget",
    "from_environment",
    "is_steady",
    "measured",
    "measured_for",
    "store",
    "text_of",
    "threads_and_limit",
]
