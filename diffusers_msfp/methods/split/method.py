"""Splitting as one of the methods: layers in parts."""

from ..method import CORRECTED, Method, Part
from .shortcuts import SplitConfig, split_shortcuts
from .skeleton import read_split, require_complete, split_of, split_skeleton

SPLIT = Method(
    "split",
    SplitConfig,
    split_shortcuts,
    Part(
        key="split",
        read=read_split,
        write=lambda split: {name: list(sizes) for name, sizes in split.items()},
        record_of=split_of,
        reshape=split_skeleton,
        require_float=require_complete,
        forbids_fusing="Its shortcuts are split, each part with a grid of its own. Fuse the LoRA into the float model "
        "and quantize that, or `dequantize` this one first.",
    ),
    forbids={
        "correction": CORRECTED,
        "talora": "Layers are split before fine-tuning, but this model has adapters already. Start from the checkpoint "
        "that `quantize` wrote.",
        "temporal": "Layers are split before temporal maintenance. Start from the quantized model.",
    },
    resumes=False,
)
