"""What several verbs need: loading, storing, options, progress, interrupts."""
