"""Shortcut splitting after Q-Diffusion."""
