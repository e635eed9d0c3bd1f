"""Everything of other packages that they do not document, once, with one line on why and since which version.

Each has a canary in `tests/compat/`, which fails with a sentence when a new version changes it.
"""
