"""What the papers' claims are put to the test with differs in one thing, and verdicts hold for every seed."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import make_dit_pipe, make_unet
from diffusers import DDIMScheduler, DDPMPipeline

from diffusers_msfp.formats import FORMATS
from diffusers_msfp.sampling.denoisers import denoiser_of
from diffusers_msfp.schemes import SCHEMES

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import bench_claims  # noqa: E402
from claims import FULL_PRECISION, Claim, found, over_seeds  # noqa: E402


@pytest.mark.parametrize(("kind", "places"), [("UNet", {"SiLU"}), ("DiT", {"SiLU", "GELU"})])
def test_variants_of_one_place_have_equal_bits_everywhere(kind, places, monkeypatch):
    monkeypatch.setattr(SCHEMES, "_items", dict(SCHEMES._items))  # variants add schemes of their own
    reference = DDPMPipeline(make_unet(), DDIMScheduler()) if kind == "UNet" else make_dit_pipe()
    assert set(bench_claims.inner_places_of(reference).values()) == places
    bits = {}
    for name in ("mixed sign", *(f"signed {place}" for place in ("behind SiLU", "behind GELU", "elsewhere"))):
        config = bench_claims.config_of(reference, bench_claims.VARIANTS[name])
        if config is not None:
            layers = config.plan(denoiser_of(reference)).layers
            bits[name] = {layer: bits_of(scheme) for layer, scheme in layers.items()}
    assert ("signed behind GELU" in bits) == ("GELU" in places)
    assert all(each == bits["mixed sign"] for each in bits.values())
    assert {(8, 8), (4, 4)} <= set(bits["mixed sign"].values())


def bits_of(scheme) -> tuple[int, int | None]:
    inputs = {FORMATS[name].bits for name in scheme.activation}
    return FORMATS[scheme.weight[0]].bits, *(inputs or [None])


@pytest.mark.parametrize(
    ("excess", "verdict"),
    [([0.30, 0.40, 0.59], "undecided"), ([0.33, 0.35, 0.37], "confirmed"), ([0.58, 0.6, 0.62], "refuted")],
)
def test_a_verdict_on_distances_holds_over_seeds(excess, verdict):
    claim = Claim("near", "MSFP", "TALoRA", FULL_PRECISION, 0.44)
    rows = [{"variant": "TALoRA", "psnr_db_by_picture": [], "excess": [e, e - 0.03, e + 0.03]} for e in excess]
    assert found(claim, rows)[0] == verdict


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([1.73, 3.87, 2.30], "undecided"),
        ([2.1, 2.5, 2.3], "confirmed"),
        ([-2.1, -2.5, -2.3], "refuted"),
        ([2.0], "confirmed"),
    ],
)
def test_three_seeds_have_the_interval_of_three_numbers(gains, verdict):
    """Pictures of one seed share its training: that there are many of them makes no seed more certain."""
    name = "learned rounding" if len(gains) > 1 else "mixed sign"
    claim = Claim("helps", "2408.06995", name, "nearest")
    rows = [{"variant": "nearest", "psnr_db_by_picture": [20.0] * 64} for _ in gains]
    rows += [{"variant": name, "psnr_db_by_picture": [20.0 + gain] * 64} for gain in gains]
    assert found(claim, rows)[0] == verdict


def test_more_seeds_than_have_a_quantile_are_refused():
    assert over_seeds(torch.ones(6, 4)) == (1, 1, 1)
    with pytest.raises(ValueError, match="over at most 10 seeds, but got 11"):
        over_seeds(torch.ones(11, 4))
