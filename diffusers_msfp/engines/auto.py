"""Choose an engine for each layer: the first of a list that runs it exactly."""

import logging
from collections.abc import Sequence
from functools import lru_cache

from ..layers import QuantLayer
from . import tuning
from .engine import Engine, PreparedLayer, kind_of

logger = logging.getLogger(__name__)


class AutoEngine(Engine):
    """The first engine that does not refuse a layer.

    Args:
        engines (`Sequence[Engine]`): in order of preference; the last one refuses nothing.
    """

    name = "auto"

    def __init__(self, engines: Sequence[Engine]) -> None:
        super().__init__(engines[0].memory)
        self.engines = tuple(engines)

    def choose(self, layer: QuantLayer) -> tuple[Engine, dict[str, str]]:
        """The engine for a layer, and why those before it refused it."""
        refused = {}
        for engine in self.engines:
            reason = engine.refusal(layer)
            if reason is None:
                break
            refused[engine.name] = reason
        return engine, refused

    def refusal(self, layer: QuantLayer) -> str | None:
        """See `Engine.refusal`."""
        return self.engines[-1].refusal(layer)

    def prepare(self, layer: QuantLayer) -> PreparedLayer | None:
        """See `Engine.prepare`; of a kind of device that was never measured it is said, once."""
        kind = kind_of(layer.packed_weight.device)
        if not any(kind in engine.measured_on for engine in self.engines):
            _say_unmeasured(kind)
        return self.choose(layer)[0].prepare(layer)

    def check_inputs(self, *call: object) -> None:
        """See `Engine.check_inputs`; what was measured in the call goes to disk."""
        tuning.store()
        for engine in self.engines:
            engine.check_inputs(*call)


@lru_cache(maxsize=16)
def _say_unmeasured(kind: str) -> None:
    logger.warning(
        "This kind of device (%s) was never measured: results are the reference's, at unknown speed. "
        "`diffusers-msfp doctor` times a layer, `diffusers-msfp bench` a step.",
        kind,
    )
