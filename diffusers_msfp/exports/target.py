"""What every kind of file is to `export`: a name and a suffix, needed packages, its layers, and how it is written."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from ..engines.openvino.layers import Inputs
from ..engines.openvino.record import Recorder
from ..errors import SEE_DOCTOR, ConfigError
from ..layers import QuantLayer


@dataclass(frozen=True)
class Ports:
    """Names of what a graph takes and gives, in order.

    Args:
        inputs (`Mapping[str, Tensor]`): with an example of each, whose shape and dtype are the graph's.
        outputs (`list[str]`).
    """

    inputs: Mapping[str, Tensor]
    outputs: list[str]


class Target(ABC):
    """Abstract base of the kinds of files."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    """To be imported when such a file is made."""
    extra: ClassVar[str] = ""
    """That brings the packages."""
    unpacked: ClassVar[str]
    """Why weights take more bytes in the file than packed."""

    def require(self) -> None:
        """Refuse to go on without the packages.

        Raises:
            ConfigError: one is not installed.
        """
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"An export to {self.name} needs {' and '.join(f'`{name}`' for name in missing)}, but it is not "
                f'installed: `pip install "diffusers-msfp[{self.extra}]"`. {SEE_DOCTOR}'
            )

    @abstractmethod
    def layer_in_graph(self, layer: QuantLayer, inputs: Inputs) -> nn.Module:
        """What stands in the graph for a quantized layer."""

    @abstractmethod
    def weight_bytes(self, layer: QuantLayer) -> int:
        """What a layer's weight takes in the file, without its scales."""

    @abstractmethod
    def in_integers(self, layer: QuantLayer) -> bool:
        """Whether the graph multiplies a layer's integers as such; otherwise as floats that hold them exactly."""

    @abstractmethod
    def write(self, recorder: Recorder, ports: Ports, path: Path) -> None:
        """Write the file, and what belongs to it beside it.

        Raises:
            UnsupportedError: the model cannot be recorded.
        """
