"""Learned rounding as one of the methods: it leaves other weights, and nothing else."""

from ..method import CORRECTED, Method
from .config import RoundingConfig
from .learn import learn_rounding

ROUNDING = Method(
    "rounding",
    RoundingConfig,
    learn_rounding,
    forbids={
        "correction": CORRECTED,
        "talora": "This model has adapters already. Start from the checkpoint that `quantize` wrote.",
    },
    reports=True,
)
