"""Floating-point formats without infinities and NaN, derived from their names.

A name reads `fp{bits}_[u]e{E}m{M}`: width, optional `u` for unsigned, exponent bits, mantissa bits; `fp4_e2m1` is
E2M1, `fp4_ue2m2` is UE2M2. Every code is a finite number, so `fp8_e4m3` reaches 480 and is not `torch.float8_e4m3fn`.

Bit layout, from the top: sign (signed formats only), exponent, mantissa. With bias `2**(E-1) - 1` a code is worth
`m * 2**(1-bias-M)` for exponent 0 and `(2**M + m) * 2**(e-bias-M)` above: whole multiples of the smallest subnormal.
These whole numbers are the format's *lattice*; they are what engines compute with. A code without its sign bit is the
index of its magnitude in the sorted lattice.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from .errors import FormatError
from .registry import Registry

WIDTHS = (4, 6, 8)
INT8_MAX, UINT8_MAX = 127, 255
MAX_EXPONENT_BITS = 5

ALIASES = {"float4_e2m1fn": "fp4_e2m1", "float6_e2m3fn": "fp6_e2m3", "float6_e3m2fn": "fp6_e3m2"}
"""Names of `ml_dtypes` for formats that are identical, code by code."""

_NAME = re.compile(r"fp(\d+)_(u?)e(\d+)m(\d+)")


@dataclass(frozen=True)
class FPFormat:
    """A floating-point format; everything follows from its name.

    Args:
        name (`str`): e.g. `"fp4_e2m1"` or, unsigned, `"fp4_ue2m2"`.

    Raises:
        FormatError: the name is not of this form or its numbers contradict each other.

    Example:
        >>> FPFormat("fp4_e2m1").grid[-8:]
        (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """

    name: str

    def __post_init__(self) -> None:
        match = _NAME.fullmatch(self.name) if isinstance(self.name, str) else None
        if match is None:
            raise FormatError(
                f"A format's name must read `fp<bits>_[u]e<exponent bits>m<mantissa bits>`, like `fp4_e2m1` or "
                f"`fp4_ue2m2`, but got {self.name!r}."
            )
        bits, exponent_bits, mantissa_bits = (int(match[i]) for i in (1, 3, 4))
        parts = ([] if match[2] else [1]) + [exponent_bits, mantissa_bits]
        if bits not in WIDTHS:
            raise FormatError(f"Formats have {', '.join(map(str, WIDTHS))} bits, but `{self.name}` says {bits}.")
        if not 1 <= exponent_bits <= MAX_EXPONENT_BITS:
            raise FormatError(
                f"Formats have 1 to {MAX_EXPONENT_BITS} exponent bits, but `{self.name}` says {exponent_bits}. "
                f"An integer grid is `e1`: `fp4_e1m2` has the values of symmetric INT4."
            )
        if sum(parts) != bits:
            total = " + ".join(map(str, parts))
            hint = ", ".join(n for n in FORMATS if n.startswith(f"fp{bits}_{match[2]}e"))
            raise FormatError(f"`{self.name}` has {total} = {sum(parts)} bits, but its name says {bits}. Try: {hint}.")

    @cached_property
    def _fields(self) -> tuple[int, bool, int, int]:
        match = cast("re.Match[str]", _NAME.fullmatch(self.name))  # __post_init__ has looked
        return int(match[1]), not match[2], int(match[3]), int(match[4])

    @property
    def bits(self) -> int:
        """Width of a code in bits."""
        return self._fields[0]

    @property
    def signed(self) -> bool:
        """Whether the top bit is a sign."""
        return self._fields[1]

    @property
    def exponent_bits(self) -> int:
        """Stored exponent bits."""
        return self._fields[2]

    @property
    def mantissa_bits(self) -> int:
        """Stored mantissa bits, without the implicit one."""
        return self._fields[3]

    @property
    def exponent_bias(self) -> int:
        """Subtracted from the exponent field: `2**(E-1) - 1`."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def step(self) -> float:
        """The smallest positive value of the grid: the real size of one lattice step at scale 1."""
        return 2.0 ** (1 - self.exponent_bias - self.mantissa_bits)

    @cached_property
    def magnitudes(self) -> tuple[int, ...]:
        """Lattice integers ≥ 0 in ascending order; the index is the code without its sign bit."""
        m_count = 2**self.mantissa_bits
        subnormal = list(range(m_count))
        normal = [(m_count + m) << (e - 1) for e in range(1, 2**self.exponent_bits) for m in range(m_count)]
        return tuple(subnormal + normal)

    @cached_property
    def lattice(self) -> tuple[int, ...]:
        """All values as whole multiples of `step`, ascending, zero once."""
        negative = [-q for q in reversed(self.magnitudes[1:])] if self.signed else []
        return tuple(negative) + self.magnitudes

    @cached_property
    def grid(self) -> tuple[float, ...]:
        """All values at scale 1, ascending, zero once."""
        return tuple(q * self.step for q in self.lattice)

    @property
    def lattice_max(self) -> int:
        """The largest lattice integer."""
        return self.magnitudes[-1]

    @property
    def max(self) -> float:
        """The largest value at scale 1."""
        return self.lattice_max * self.step

    @property
    def fits_byte(self) -> bool:
        """Whether all lattice integers fit one byte, signed or unsigned as the format is; 8-bit products want that."""
        return self.lattice_max <= (INT8_MAX if self.signed else UINT8_MAX)

    @cached_property
    def code_values(self) -> tuple[int, ...]:
        """Lattice integer of every code `0 … 2**bits - 1`; the code of -0 is worth 0."""
        return self.magnitudes + (tuple(-q for q in self.magnitudes) if self.signed else ())

    def __str__(self) -> str:
        return self.name


MULTIPLIER_BITS = 4


def largest_multiplier(fmt: FPFormat) -> int:
    """Up to which `lattice_max * multiplier` fits a signed byte, and the multiplier 4 bits; 0 where none does."""
    return min(2**MULTIPLIER_BITS - 1, INT8_MAX // fmt.lattice_max)


def largest_integer(fmt: FPFormat, *, grouped: bool) -> int:
    """What no integer of a weight can exceed, its group's multiplier included."""
    return fmt.lattice_max * (largest_multiplier(fmt) if grouped else 1)


class _FormatRegistry(Registry[FPFormat]):
    """Formats by name; also understands the names of `ml_dtypes`, and explains names that make no sense.

    Example:
        >>> from diffusers_msfp import FORMATS
        >>> FORMATS["fp4_e2m1"].bits
        4
    """

    def __getitem__(self, name: str) -> FPFormat:
        name = ALIASES.get(name, name)
        if name not in self:
            FPFormat(name)  # says what is wrong with it
        return super().__getitem__(name)


FORMATS: Registry[FPFormat] = _FormatRegistry("format", FormatError)
"""All formats by name."""

for _bits in WIDTHS:
    for _sign, _sign_bits in (("", 1), ("u", 0)):
        for _e in range(1, min(MAX_EXPONENT_BITS, _bits - _sign_bits) + 1):
            _name = f"fp{_bits}_{_sign}e{_e}m{_bits - _sign_bits - _e}"
            FORMATS.add(_name, FPFormat(_name))
