"""The page that shows a quantized model beside full precision, and the writer of a Hugging Face Space with it.

What is here knows pipelines, not where they come from: `cli/space.py` loads them.
"""

from .candidate import Candidate, require_comparable
from .page import build_page, launch, require_gradio
from .writer import is_space, write_space

__all__ = ["Candidate", "build_page", "is_space", "launch", "require_comparable", "require_gradio", "write_space"]
