"""What the papers' claims are put to the test with differs in one thing, and verdicts hold for every seed."""

import sys
from pathlib import Path

import pytest
from conftest import make_dit_pipe, make_unet
from diffusers import DDIMScheduler, DDPMPipeline

from diffusers_msfp.formats import FORMATS
from diffusers_msfp.sampling.denoisers import denoiser_of
from diffusers_msfp.schemes import SCHEMES

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import bench_claims  # noqa: E402
from claims import FULL_PRECISION, Claim, found  # noqa: E402


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
    [([0.30, 0.40, 0.59], "undecided"), ([0.30, 0.35, 0.38], "confirmed"), ([0.60, 0.5, 0.7], "refuted")],
)
def test_a_verdict_holds_for_every_seed(excess, verdict):
    claim = Claim("near", "MSFP", "TALoRA", FULL_PRECISION, 0.44)
    rows = [{"variant": "TALoRA", "psnr_db_by_picture": [], "excess": [e, e - 0.03, e + 0.03]} for e in excess]
    assert found(claim, rows)[0] == verdict
