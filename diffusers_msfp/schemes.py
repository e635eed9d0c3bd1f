"""Schemes as data: which formats may be tried in which place of a network.

A scheme names *candidates*; the search picks one weight format and one activation format per layer. Papers keep the
first and last layers and the time embedding at 8 bit (EfficientDM's modules 0, 1, 2 and -1), and so do all schemes
here. The activation of the input convolution stays float: near the end of sampling the noise still to be predicted is
smaller than an 8-bit step of the image (on the embedded model an 8-bit input alone would cost 12 % error there).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from .errors import ConfigError
from .formats import FORMATS, largest_multiplier
from .registry import Registry


def candidates(bits: int, *, signed: bool) -> tuple[str, ...]:
    """Formats of one width worth trying: all but those with so many exponent bits that they never won a search."""
    return tuple(
        name
        for name, fmt in FORMATS.items()
        if fmt.bits == bits and fmt.signed == signed and fmt.exponent_bits <= (4 if bits == 8 else 3)
    )


@dataclass(frozen=True)
class LayerScheme:
    """Candidate formats of one layer.

    Args:
        weight (`tuple[str, ...]`): names of signed formats, one scale per output channel.
        activation (`tuple[str, ...]`): names of signed and unsigned formats, one scale per tensor; empty leaves the
            input float. Unsigned ones are tried with a zero point, where the data allow it.
        residual (`tuple[str, ...]`): instead of `activation` where the input is a residual sum that no norm has scaled;
            empty for no difference.
        group_size (`int`, *optional*): so many consecutive weights of an output channel share a whole multiplier of its
            scale; None for one scale for the whole channel.
    """

    weight: tuple[str, ...]
    activation: tuple[str, ...] = ()
    residual: tuple[str, ...] = ()
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not self.weight:
            raise ConfigError("A scheme needs at least one weight format, but got none.")
        if self.group_size is not None and not (isinstance(self.group_size, int) and self.group_size >= 2):
            raise ConfigError(f"A group must have 2 weights or more, but got {self.group_size!r}.")
        for name in self.weight + self.activation + self.residual:
            fmt = FORMATS[name]
            if name in self.weight and not fmt.signed:
                raise ConfigError(f"Weights need signed formats, but `{name}` is unsigned. Use it for activations.")
            if name in self.weight and self.group_size and not largest_multiplier(fmt):
                raise ConfigError(f"Weights with group scales must fit 8 bits as integers, unlike `{name}`.")
        if self.activation and not any(FORMATS[name].signed for name in self.activation):
            raise ConfigError("Activations need at least one signed format, since any layer may see both signs.")


@dataclass(frozen=True)
class QuantScheme:
    """Candidates for every place of a network.

    Args:
        inner (`LayerScheme`): all layers but those below.
        edge (`LayerScheme`): output convolution and time-embedding linears.
        input (`LayerScheme`): the layer that reads the noisy sample.
    """

    inner: LayerScheme
    edge: LayerScheme
    input: LayerScheme

    def only(self, formats: Sequence[str]) -> "QuantScheme":
        """The same scheme with these of its candidates."""

        def reduced(layer: LayerScheme) -> LayerScheme:
            places = (layer.weight, layer.activation, layer.residual)
            weight, activation, residual = (tuple(name for name in names if name in formats) for names in places)
            return LayerScheme(weight, activation, residual, layer.group_size)

        return QuantScheme(reduced(self.inner), reduced(self.edge), reduced(self.input))


def _scheme(
    weight_bits: int,
    activation_bits: int | None,
    *,
    mixup: bool = True,
    wide: bool = False,
    pure: bool = False,
    group_size: int | None = None,
) -> QuantScheme:
    """A scheme by its bits.

    Args:
        mixup (`bool`): unsigned formats are candidates too.
        wide (`bool`): lattice integers of 8-bit formats need not fit one byte.
        pure (`bool`): residual sums get no more bits than other inputs.
        group_size (`int`, *optional*): of the inner layers' weights.
    """

    def narrow(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if wide or FORMATS[name].bits < EDGE_BITS or FORMATS[name].fits_byte)

    def layer(w: int, a: int | None) -> LayerScheme:
        def inputs(bits: int) -> tuple[str, ...]:
            return narrow(candidates(bits, signed=True) + (candidates(bits, signed=False) if mixup else ()))

        if a is None:
            return LayerScheme(candidates(w, signed=True))
        residual = () if pure or a >= EDGE_BITS else inputs(EDGE_BITS)
        return LayerScheme(narrow(candidates(w, signed=True)), inputs(a), residual)

    edge = layer(EDGE_BITS, EDGE_BITS if activation_bits else None)
    inner = layer(weight_bits, activation_bits)
    if group_size is not None:
        with_room = tuple(name for name in inner.weight if largest_multiplier(FORMATS[name]) > 1)
        inner = replace(inner, weight=with_room, group_size=group_size)
    return QuantScheme(inner, edge, replace(edge, activation=()))


EDGE_BITS = 8


class _SchemeRegistry(Registry[QuantScheme]):
    """Presets by name: `w{weight bits}a{activation bits}`; `a16` leaves activations float.

    Lattice integers of 8-bit formats fit one byte (E1M6, UE1M7), so that 8-bit products serve. `…-wide` also tries E2M5
    and E3M4, whose integers take two bytes, and E4M3, which runs as floats: less error, slower. Below 8 bits, layers
    that read a residual sum get 8-bit inputs, which adds no bytes to the weights;
    `…-pure`, for ablation, gives them no more bits than others. `w4g{group size}a{activation bits}`: weights with group
    scales. To compare with: `…-signed` has signed formats alone, `int-…` uniform grids. `…-int8` are former names.

    Example:
        >>> from diffusers_msfp import SCHEMES
        >>> SCHEMES["w4a4"].inner.weight
        ('fp4_e1m2', 'fp4_e2m1', 'fp4_e3m0')
    """


SCHEMES: Registry[QuantScheme] = _SchemeRegistry("scheme")
"""All schemes by name."""
_VERSION_1: dict[str, QuantScheme] = {}
_UNIFORM = tuple(name for name, fmt in FORMATS.items() if fmt.exponent_bits == 1)


def _add(
    name: str,
    weight_bits: int,
    activation_bits: int | None,
    *,
    formats: Sequence[str] | None = None,
    mixup: bool = True,
) -> None:
    def made(**more: bool) -> QuantScheme:
        scheme = _scheme(weight_bits, activation_bits, mixup=mixup, **more)
        return scheme if formats is None else scheme.only(formats)

    SCHEMES.add(name, made())
    _VERSION_1[name] = made(wide=True, pure=True)
    if activation_bits is not None and activation_bits < EDGE_BITS:
        SCHEMES.add(f"{name}-pure", made(pure=True))
    if formats is None and activation_bits == EDGE_BITS:
        SCHEMES.add(f"{name}-wide", made(wide=True))


for _w, _a in ((4, 4), (4, 6), (4, 8), (6, 6), (6, 8), (8, 8), (4, None), (6, None), (8, None)):
    _add(f"w{_w}a{_a or 16}", _w, _a)
# Baselines to compare with: signed formats only (as LLM-FP4), and uniform grids with the same search.
for _w, _a in ((4, 4), (4, 8), (6, 6), (8, 8)):
    _add(f"w{_w}a{_a}-signed", _w, _a, mixup=False)
    _add(f"int-w{_w}a{_a}", _w, _a, formats=_UNIFORM)
GROUP_SIZES = (16, 32, 64, 128)
for _g in GROUP_SIZES:
    for _a in (4, 8, None):
        SCHEMES.add(f"w4g{_g}a{_a or 16}", _scheme(4, _a, group_size=_g))
DEFAULT_SCHEME = "w4a8"

# What names meant in checkpoints of format version 1, which go on as they began.
for _name in ("w4a8", "w8a8"):
    _one_byte = ("fp4_e1m2", "fp4_e2m1", "fp4_e3m0", "fp8_e1m6", "fp8_ue1m7")
    _VERSION_1[f"{_name}-int8"] = _VERSION_1[_name].only(_one_byte)
    SCHEMES.add(f"{_name}-int8", SCHEMES[_name])  # their former name


def scheme_of(name: str, format_version: int | None = None) -> QuantScheme:
    """A scheme by its name, as a checkpoint of this format version means it; None for the newest."""
    return _VERSION_1[name] if format_version == 1 and name in _VERSION_1 else SCHEMES[name]


INPUT_PATTERNS = (
    *("conv_in", "encoder.conv_in", "decoder.conv_in", "preprocess_conv"),
    *("pos_embed.proj", "x_embedder", "x_embedder.proj", "all_x_embedder.*", "img_in", "proj_in"),
    *("patch_embed.proj", "patch_embedding", "patch_embedding.output_image_proj", "patch_embedder.proj"),
    *("visual_embeddings.in_layer", "embedding.1", "input_proj", "audio_proj_in"),
)
"""Names of the layers that read the noisy sample itself, in diffusers' models."""
EDGE_PATTERNS = (
    "conv_out",
    "encoder.conv_out",
    "decoder.conv_out",
    "proj_out",
    "proj_out_1",
    "proj_out_2",
    "audio_proj_out",
    "proj_to_clip_embeddings",
    "spec_out",
    "clf.1",
    "head.head",
    "norm_out.linear_2",  # of Lumina; what Cosmos calls so reads the time embedding
    "final_linear",
    "final_layer.linear",
    "out_layer.out_layer",
    "audio_out_layer.out_layer",
    "time_embedding.linear_*",
    "time_embedding.cond_proj",
    "class_embedding.linear_*",
    "time_proj.linear_*",
    "add_embedding.linear_*",
    "time_text_embed.*",
    "*timestep_embedder.linear_*",
)


def input_bits(scheme: str) -> int | None:
    """Bits of the inputs of a scheme's inner layers; None where they stay float."""
    return next((FORMATS[name].bits for name in SCHEMES[scheme].inner.activation), None)


def weights_only(scheme: str) -> str:
    """The scheme of equal weight bits that leaves activations float."""
    inner = SCHEMES[scheme].inner
    groups = f"g{inner.group_size}" if inner.group_size else ""
    return f"w{FORMATS[inner.weight[0]].bits}{groups}a16"


def as_patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def matches(pattern: str, name: str) -> bool:
    """Whether a module's name fits: a plain pattern as a substring, one with `*` as a glob over the whole name."""
    return fnmatchcase(name, pattern) if "*" in pattern else pattern in name


def resolve(name: str, scheme: str, overrides: Mapping[str, str], format_version: int | None = None) -> LayerScheme:
    """The candidates of one layer.

    Args:
        name (`str`): the layer's full name in the model.
        scheme (`str`): name in `SCHEMES`.
        overrides (`Mapping[str, str]`): pattern → scheme; the last one that matches wins and is taken at its word,
            also for edge and input layers.
        format_version (`int`, *optional*): see `scheme_of`.
    """
    wanted = scheme_of(scheme, format_version)
    for pattern, override in reversed([*overrides.items()]):
        if matches(pattern, name):
            return scheme_of(override, format_version).inner
    if any(fnmatchcase(name, pattern) for pattern in INPUT_PATTERNS):
        return wanted.input
    if any(fnmatchcase(name, pattern) for pattern in EDGE_PATTERNS):
        return wanted.edge
    return wanted.inner


def check_patterns(patterns: Sequence[str], names: Sequence[str], what: str) -> None:
    """Refuse a pattern that fits no module: a typing error would otherwise quantize what was to be left alone."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            some = ", ".join(names[:4])
            raise ConfigError(
                f"Every pattern in `{what}` must match a layer, but {pattern!r} matches none of {len(names)}. Layers "
                f"are called {some}, …; a plain name matches as a substring, with `*` as a glob over the whole name."
            )
