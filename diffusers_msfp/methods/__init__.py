"""What improves a quantized model with its float original: a folder for each method, and what all of them need."""
