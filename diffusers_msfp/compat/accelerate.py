"""Internals of accelerate (all since 1.0)."""

SET_BY_HOOKS = ("_hf_hook", "_old_forward", "forward")
"""Attributes that a hook sets on a module and binds to it: a copy of another class must not have them."""
