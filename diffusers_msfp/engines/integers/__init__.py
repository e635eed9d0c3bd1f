"""Layers in 8-bit integers; see the engine `int8`."""
