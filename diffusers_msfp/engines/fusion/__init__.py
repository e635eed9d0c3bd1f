"""Leaves and blocks of diffusers that do the work of several: norms that hand codes, attention."""
