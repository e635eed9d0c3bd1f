"""How fast a step is, beside what it could be."""
