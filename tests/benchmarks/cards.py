"""Write the cards of the package's own checkpoints from their results.

    python tests/benchmarks/cards.py

`model_cards/<name>/` is the repository of a checkpoint without its weights and configs. `bench_cards.py` makes the
results; a test compares the cards with what is generated here.
"""

import json

from harness import ROOT

from diffusers_msfp.hub.prepare import pages
from diffusers_msfp.hub.results import CHECKPOINT, read_results

if __name__ == "__main__":
    for facts in sorted(ROOT.glob(f"model_cards/*/{CHECKPOINT}")):
        folder = facts.parents[1]
        for place, content in pages(json.loads(facts.read_text(encoding="utf-8")), read_results(folder)).items():
            (folder / place).write_bytes(content)
