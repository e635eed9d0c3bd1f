"""From file to file: quantize layer by layer, migrate to the newest format version."""
