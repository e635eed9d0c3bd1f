"""Damage to a checkpoint's files: each function takes a folder of a packed model and a `random.Random`.

It returns what it did, for a failing test to say.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILE = "diffusion_pytorch_model.safetensors"
VALUES = (
    None,
    True,
    -1,
    0,
    2**31,
    10**30,
    1.5,
    "",
    "x",
    "fp4_e9m9",
    "fp4_ue2m2",
    "fp8_e4m3",
    "observing",
    [],
    [None],
    {},
    {"a": {"a": {"a": []}}},
)


def _places(value: object, path: tuple = ()):
    """Paths of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from _places(part, (*path, key))


def _edit_json(file: Path, rng: random.Random, below: str | None = None) -> str:
    content = json.loads(file.read_text())
    target = content[below] if below else content
    *path, key = rng.choice([place for place in _places(target) if "quant_method" not in place])
    for step in path:
        target = target[step]
    if rng.random() < 0.25:
        del target[key]
        done = f"without {path} {key}"
    else:
        value = rng.choice(VALUES)
        target[key] = value
        done = f"{path} {key} = {value!r}"
    file.write_text(json.dumps(content))
    return f"{file.name}: {done}"


def record(folder: Path, rng: random.Random) -> str:
    """One value of our record in config.json."""
    return _edit_json(folder / "config.json", rng, "quantization_config")


def config(folder: Path, rng: random.Random) -> str:
    """One value of config.json, mostly diffusers' own."""
    return _edit_json(folder / "config.json", rng)


def nested(folder: Path, rng: random.Random) -> str:
    """A record as deep as the parser allows, or deeper."""
    content = json.loads((folder / "config.json").read_text())
    key, depth = (
        rng.choice(["layers", "calibration", "adapters", "scheme_overrides"]),
        rng.choice([20, 200, 900, 10**5]),
    )
    content["quantization_config"][key] = "HERE"
    text = json.dumps(content).replace('"HERE"', "[" * depth + "]" * depth)
    (folder / "config.json").write_text(text)
    return f"config.json: {key} nested {depth} deep"


def text(folder: Path, rng: random.Random) -> str:
    """Some bytes of config.json."""
    return _flip(folder / "config.json", rng, 0, None)


def header(folder: Path, rng: random.Random) -> str:
    """Some bytes of the tensors' header."""
    length = int.from_bytes((folder / FILE).read_bytes()[:8], "little")
    return _flip(folder / FILE, rng, 0, 8 + length)


def codes(folder: Path, rng: random.Random) -> str:
    """Some bytes of the tensors."""
    length = int.from_bytes((folder / FILE).read_bytes()[:8], "little")
    return _flip(folder / FILE, rng, 8 + length, None)


def _flip(file: Path, rng: random.Random, start: int, end: int | None) -> str:
    data = bytearray(file.read_bytes())
    places = [rng.randrange(start, end or len(data)) for _ in range(rng.choice([1, 1, 4]))]
    for place in places:
        data[place] = rng.randrange(256)
    file.write_bytes(data)
    return f"{file.name}: bytes {places}"


def truncation(folder: Path, rng: random.Random) -> str:
    """A file that ends early, or goes on."""
    file = folder / FILE
    data = file.read_bytes()
    size = rng.randrange(len(data) + 100)
    file.write_bytes((data + bytes(100))[:size])
    return f"{FILE}: {size} of {len(data)} bytes"


def tensor(folder: Path, rng: random.Random) -> str:
    """One tensor of another shape, dtype or value, under another name, or gone."""
    tensors = load_file(folder / FILE)
    name, other = rng.sample(sorted(tensors), 2)
    value = tensors[name]
    bad = torch.full_like(value.float(), rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e38]))
    changes = {
        "dtype": value.to(rng.choice([torch.float16, torch.int64, torch.uint8, torch.float64])),
        "shape": value.reshape(-1)[: max(1, value.numel() // 2)],
        "axes": value.unsqueeze(0),
        "larger": torch.cat([value.reshape(-1)] * 2),
        "values": bad.to(value.dtype),
        "floats": bad,
        "other": tensors[other],
        "empty": value.new_empty(0),
    }
    kind = rng.choice([*changes, "gone", "renamed"])
    if kind in changes:
        tensors[name] = changes[kind].clone().contiguous()
    else:
        del tensors[name]
        if kind == "renamed":
            tensors[f"{name}.x"] = value
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return f"{name}: {kind}"


def index(folder: Path, rng: random.Random) -> str:
    """An index of shards that leads elsewhere."""
    names = list(load_file(folder / FILE))
    target = rng.choice(["../x.safetensors", "/etc/passwd", "no.safetensors", "config.json", 5, None, FILE])
    content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, target)}
    (folder / f"{FILE}.index.json").write_text(json.dumps(content))
    if rng.random() < 0.5 or target == FILE:
        return _edit_json(folder / f"{FILE}.index.json", rng)
    return f"index: {target}"


MUTATIONS = (record, config, nested, text, header, codes, truncation, tensor, index)
OURS = (record, nested, header, codes, truncation, tensor)
"""Damage to our own part, whose errors must be clear; a config of diffusers' own may fail in diffusers' way."""
