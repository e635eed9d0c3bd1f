"""Engines: ways to compute quantized layers."""
