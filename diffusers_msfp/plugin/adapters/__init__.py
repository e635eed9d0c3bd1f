"""Adapters: users' own through PEFT, and files of timestep-aware ones."""
