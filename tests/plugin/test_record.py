"""Format version 2 of the record: its reserved places, what it refuses, and how short its digest is."""

import copy
import json
import zlib

import pytest
import torch
from conftest import make_unet
from diffusers import UNet2DModel

from diffusers_msfp import MSFPConfig
from diffusers_msfp.checkpoint.digest import Digest
from diffusers_msfp.errors import CheckpointError
from diffusers_msfp.plugin.quantize import quantize_model

RECORD = {"quant_method": "msfp", "format_version": 2, "scheme": "w4a4"}
PLAN = {"placement": "side", "num_adapters": 2, "num_timesteps": 9, "ranks": {}}
GROUP = {"weight": "fp4_e2m1", "input": None, "modules": ["conv_in"]}
SCALES = {"over": "timesteps", "entries": 20, "layers": ["conv_in"]}
DIGEST = {"algorithm": "crc32", "groups": [{"tensors": ["weight:uint8"], "modules": {"conv_in": "0123abcd"}}]}

RESERVED = {
    "scales by timestep": {"timestep_scales": SCALES},
    "scales over intervals": {"timestep_scales": SCALES | {"over": "intervals"}},
    "scales per input channel": {"channel_scales": {"layers": ["conv_in"], "power_of_two": True}},
    "another digest": {"digest": DIGEST | {"algorithm": "blake3"}},
}


@pytest.mark.parametrize("what", RESERVED)
def test_reserved_places_need_a_newer_package(what):
    with pytest.raises(CheckpointError, match="needs a newer package: `pip install -U|needs a newer package \\(`pip"):
        MSFPConfig.from_dict(RECORD | RESERVED[what])


MALFORMED = [
    ({"timestep_scales": SCALES | {"over": "weeks"}}, "`timestep_scales.over` in config.json must not be 'weeks'"),
    ({"timestep_scales": SCALES | {"entries": 0}}, "`timestep_scales.entries`"),
    ({"timestep_scales": SCALES | {"layers": "conv_in"}}, "`timestep_scales.layers`"),
    ({"timestep_scales": {"over": "timesteps"}}, "`timestep_scales` in config.json is malformed"),
    ({"timestep_scales": 5}, "`timestep_scales` in config.json must be an object"),
    ({"timestep_scales": SCALES | {"more": 1}}, "only known keys, but `timestep_scales` in config.json has more"),
    ({"output_correction": {"entries": 20, "channels": True}}, "`output_correction.channels`"),
    ({"layers": [GROUP | {"group_size": 1}]}, "whole number from 2 to .*, but got 1 for `fp4_e2m1`"),
    ({"layers": [GROUP | {"group_size": True}]}, "whole number from 2 to .*, but got True"),
    ({"layers": [GROUP | {"weight": "fp8_e4m3", "group_size": 32}]}, "must fit 8 bits, but got 32 for `fp8_e4m3`"),
    ({"format_version": 1, "layers": [GROUP | {"group_size": 32}]}, "belongs to format version 2, but it says 1"),
    ({"layers": [GROUP | {"surprise": 1}]}, "only known keys, but `layers` in config.json has surprise"),
    ({"calibration": {"state": "frozen", "mood": 1}}, "only known keys, but `calibration` in config.json has mood"),
    ({"channel_scales": {"layers": []}}, "`channel_scales.layers`"),
    ({"adapters": PLAN | {"reads": "minds"}}, "`reads` must be one of float, codes, but got 'minds'"),
    (
        {"adapters": PLAN | {"placement": "merged", "reads": "codes"}},
        "adapters that are merged read nothing, but `reads` is 'codes'",
    ),
    ({"surprise": 1}, "only known keys, but `quantization_config` in config.json has surprise"),
    ({"digest": 5}, "`digest` in config.json is malformed"),
    ({"digest": DIGEST | {"groups": [{"tensors": ["weight"], "modules": {"a": "01234567"}}]}}, "is malformed"),
    ({"digest": DIGEST | {"groups": [{"tensors": ["weight:uint8"], "modules": {"a": "0123"}}]}}, "is malformed"),
    ({"digest": DIGEST | {"more": 1}}, "is malformed"),
    ({"format_version": 3}, "up to format version 2, but got 3"),
]


@pytest.mark.parametrize(("changes", "reason"), MALFORMED, ids=[str(changes)[:60] for changes, _ in MALFORMED])
def test_malformed_records(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        MSFPConfig.from_dict(RECORD | changes)


def test_what_is_absent_or_the_default_is_read(caplog):
    for key in ("timestep_scales", "output_correction", "channel_scales", "digest"):
        MSFPConfig.from_dict(RECORD | {key: None})
    for said, reads in (({}, "float"), ({"reads": "float"}, "float"), ({"reads": "codes"}, "codes")):
        plan = MSFPConfig.from_dict(RECORD | {"adapters": PLAN | said}).record.parts["adapters"]
        assert plan.reads == reads
        assert plan.to_dict().get("reads", "float") == reads
    config = MSFPConfig.from_dict(RECORD | {"adapters": PLAN | {"reads": "float"}, "digest": DIGEST})
    assert config.record.digest.to_dict() == DIGEST == Digest.from_dict(DIGEST).to_dict()
    assert not caplog.text


def test_version_1_has_none_of_it(caplog):
    old = RECORD | {"format_version": 1, "timestep_scales": SCALES, "digest": DIGEST}
    config = MSFPConfig.from_dict(old)
    assert "digest, timestep_scales" in caplog.text
    assert (config.format_version, config.record.digest) == (1, None)
    with pytest.raises(CheckpointError, match="`adapters.reads` in config.json belongs to format version 2"):
        MSFPConfig.from_dict(RECORD | {"format_version": 1, "adapters": PLAN | {"reads": "float"}})
    assert MSFPConfig.from_dict({"quant_method": "msfp"}).format_version == 1
    assert config.without_record().format_version == MSFPConfig().format_version == 2


def test_version_1_stays_version_1_through_a_life(tmp_path):
    unet = make_unet(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
    quantize_model(unet, MSFPConfig("w4a16"))
    unet.config.quantization_config.format_version = 1
    unet.save_pretrained(tmp_path / "1")
    again = copy.deepcopy(UNet2DModel.from_pretrained(tmp_path / "1"))
    again.save_pretrained(tmp_path / "2")
    records = [json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in "12"]
    assert records[0] == records[1]
    assert "digest" not in records[0]
    again.dequantize()
    quantize_model(again, MSFPConfig("w4a16"))
    again.save_pretrained(tmp_path / "3")
    record = json.loads((tmp_path / "3" / "config.json").read_text())["quantization_config"]
    assert record["format_version"] == 2
    assert record["digest"]["algorithm"] == "crc32"
    assert UNet2DModel.from_pretrained(tmp_path / "3").config.quantization_config.record is None


def test_the_digest_is_of_names_dtypes_shapes_and_bytes():
    x = torch.arange(6, dtype=torch.uint8)
    tensors = {"a.x": x, "b.x": x, "a.y": x.view(2, 3), "a.z": x.view(torch.int8), "scalar": torch.tensor(1.5)}
    sums = Digest.of(tensors).sums
    assert len(set(sums.values())) == len(tensors)
    assert sums["a.x", "uint8"] == f"{zlib.crc32(b'a.x uint8 [6]' + bytes(range(6))):08x}"
    assert Digest.from_dict(json.loads(json.dumps(Digest.of(tensors).to_dict()))).sums == sums
    Digest.of({"empty": torch.empty(0, 3), "half": torch.ones(2, dtype=torch.bfloat16)}).check(
        {"empty": torch.empty(0, 3)}
    )


def test_variants_join_where_what_they_share_is_equal():
    packed = {"w": torch.arange(3, dtype=torch.uint8)}
    full, half = (Digest.of(packed | {"b": torch.ones(2, dtype=d)}) for d in (torch.float32, torch.float16))
    both = half.joined(full)
    assert len(both.sums) == 3
    assert full.joined(both).sums == both.sums
    other = Digest.of({"w": torch.zeros(3, dtype=torch.uint8), "b": torch.ones(2)})
    assert other.joined(both) == other
    assert full.joined(Digest({})) == full
