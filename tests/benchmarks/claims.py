"""The papers' claims as data, and their verdicts, from what `bench_claims.py` has measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from harness import grouped
from torch import Tensor

from diffusers_msfp.evaluation.images.distances import mean_of

FULL_PRECISION = "full precision"
TRAINED = frozenset({"learned rounding", "one LoRA", "TALoRA", "TALoRA + DFA", "W4A4, recipe msfp"})
SEEDS = (0, 1, 2)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Seeds → 97.5 % quantile of Student's t with one degree of freedom less."""
MODELS = {
    "ddpm-fashion-mnist-32": "embedded",
    "cifar10-pixel": "`cifar10-pixel`",
    "cifar10-latent-dit": "`cifar10-latent-dit`",
    "cifar10-text": "`cifar10-text`",
}


@dataclass(frozen=True)
class Claim:
    """That one variant is better than another.

    Args:
        text (`str`): in words.
        paper (`str`): whose.
        better, than (`str`): names of variants. Than full precision none is better: then the claim is that it is as
            good, by Fréchet distances to real pictures.
        margin (`float`): of those, as a share: what still counts as equally good.
    """

    text: str
    paper: str
    better: str
    than: str
    margin: float = 0.0

    @property
    def trained(self) -> bool:
        """Whether seeds matter beside pictures."""
        return not TRAINED.isdisjoint((self.better, self.than))


MSFP, LOW_BITS, TFMQ = "MSFP", "2408.06995", "TFMQ-DM"
CLAIMS = (
    Claim("mixed signs beat signed formats", MSFP, "mixed sign", "signed"),
    *(
        Claim(f"… for inputs {place}", MSFP, "mixed sign", f"signed {place}")
        for place in ("behind SiLU", "behind GELU", "elsewhere")
    ),
    Claim("FP4 with zero points beats INT4", MSFP, "mixed sign", "INT"),
    *(
        Claim(f"… for inputs {place}", MSFP, "mixed sign", f"INT {place}")
        for place in ("behind SiLU", "behind GELU", "elsewhere")
    ),
    Claim("TALoRA beats one LoRA of equal bytes", MSFP, "TALoRA", "one LoRA"),
    Claim("DFA helps", MSFP, "TALoRA + DFA", "TALoRA"),
    Claim("W4A4 is near full precision (44 % further)", MSFP, "W4A4, recipe msfp", FULL_PRECISION, 0.44),
    Claim("6 bit, without fine-tuning, equal full precision (5 %)", MSFP, "6 bit", FULL_PRECISION, 0.05),
    Claim("FP8 loses nothing (5 %)", LOW_BITS, "FP8", FULL_PRECISION, 0.05),
    Claim("learned rounding helps", LOW_BITS, "learned rounding", "nearest rounding"),
    Claim("temporal features limit quality", TFMQ, "temporal features of full precision", "mixed sign"),
)
"""FID + 1.84 is what the MSFP paper has for W4A4 on CIFAR-10: 44 % of the 4.16 of DDIM (arXiv 2010.02502, table 1, 100
steps)."""


def seeds_of(variant: str) -> tuple[int, ...]:
    """Of calibration, training and noise: three where it, or what it is compared with, is trained."""
    return SEEDS if any(claim.trained for claim in CLAIMS if variant in (claim.better, claim.than)) else SEEDS[:1]


def over_seeds(each: Tensor) -> tuple[float, float, float]:
    """Mean of `(seeds, pictures)` and its 95 % interval: over pictures; of several seeds, Student's over their means.

    Pictures of a seed have what it calibrated and trained in common, so that only seeds tell how much that varies.

    Raises:
        ValueError: more seeds than `STUDENT` has.
    """
    seeds = len(each)
    if seeds == 1:
        own = mean_of(each[0])
        return own.value, own.low, own.high
    if seeds not in STUDENT:
        raise ValueError(
            f"Intervals must be over at most {max(STUDENT)} seeds, but got {seeds}: add theirs to `STUDENT`."
        )
    means = each.double().mean(1)
    reach = STUDENT[seeds] * (means.std() / seeds**0.5).item()
    value = means.mean().item()
    return value, value - reach, value + reach


def paired(better: Sequence[dict], than: Sequence[dict]) -> tuple[float, float, float]:
    """Mean difference of PSNR and its interval, see `over_seeds`."""
    pairs = zip(better, than, strict=True)
    differences = [torch.tensor(a["psnr_db_by_picture"]) - torch.tensor(b["psnr_db_by_picture"]) for a, b in pairs]
    return over_seeds(torch.stack(differences))


def found(claim: Claim, rows: Sequence[dict]) -> tuple[str, str] | None:
    """Verdict and figure on one model; None where it is not measured."""
    better, than = ([row for row in rows if row["variant"] == name] for name in (claim.better, claim.than))
    if claim.than == FULL_PRECISION:
        than = better
    if not better or len(better) != len(than) or (claim.trained and len(better) < len(SEEDS)):
        return None
    if any("psnr_db_by_picture" not in row for row in (*better, *than)):
        return "–", "no such inputs"
    if claim.than == FULL_PRECISION:
        values, lows, highs = zip(*(row["excess"] for row in better), strict=True)
        value, low, high = values[0], lows[0], highs[0]
        if len(values) > 1:
            value, low, high = over_seeds(torch.tensor(values)[:, None])
        verdict = "confirmed" if high < claim.margin else "refuted" if low > claim.margin else "undecided"
        return verdict, f"{100 * value:+.1f} % ({100 * low:+.1f} – {100 * high:+.1f})"
    value, low, high = paired(better, than)
    verdict = "confirmed" if low > 0 else "refuted" if high < 0 else "undecided"
    return verdict, f"{value:+.2f} dB ({low:+.2f} – {high:+.2f})"


def claims() -> Iterator[dict[str, str]]:
    """Each claim on each model that was measured."""
    models = grouped("claims", "model")
    for claim in CLAIMS:
        row = {"claim": claim.text, "paper": claim.paper}
        for model, label in MODELS.items():
            if model in models:
                verdict = found(claim, models[model])
                row[label] = "not measured" if verdict is None else "{}: {}".format(*verdict)
        yield row


def claims_shares() -> Iterator[dict[str, str]]:
    """What else rows say: exact zeros after learned rounding, the temporal features' share of the error."""
    for model, rows in grouped("claims", "model").items():
        by_name = {row["variant"]: row for row in rows}
        row = {"model": MODELS[model]}
        pair = [by_name.get(name, {}) for name in ("temporal features of full precision", "mixed sign")]
        if all("psnr_db_by_picture" in each for each in pair):
            without, plain = (sum(10 ** (-db / 10) for db in each["psnr_db_by_picture"]) for each in pair)
            row["share of temporal features in the squared error of pictures"] = f"{100 * (1 - without / plain):.0f} %"
        rounded = [each for each in rows if "zeros" in each]
        if rounded:
            before, after = (sum(each[key] for each in rounded) / len(rounded) for key in ("zeros_before", "zeros"))
            row["weights that are exactly 0"] = f"{100 * before:.1f} % → {100 * after:.1f} %"
        yield row
