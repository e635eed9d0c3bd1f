"""Feature networks by name, and what they refuse."""

import inspect
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusers_msfp.assets import CIFAR10_FEATURES
from diffusers_msfp.errors import ConfigError, ShapeError, UnsupportedError
from diffusers_msfp.evaluation.images.features import FEATURES, Features, default_features, extract, feature_network


def flat_features():
    return lambda images: images.flatten(1)


def test_the_fashion_network():
    images = torch.rand(130, 1, 32, 32)
    network = feature_network("fashion")
    found = extract(network, images)
    assert [part.shape for part in (found.pooled, found.spatial, found.logits)] == [(130, 64), (130, 128), (130, 10)]
    assert found.pooled.dtype == torch.float64
    with torch.no_grad():
        alone = network(images[129:])
    torch.testing.assert_close(found.pooled[129:], alone.pooled.double(), atol=1e-5, rtol=1e-5)
    assert torch.equal(alone.spatial.view(1, 8, 4, 4).mean((2, 3)), alone.pooled[:, :8])
    torch.testing.assert_close(network.head(alone.pooled), alone.logits)
    with pytest.raises(ShapeError, match=r"`fashion` need pictures of shape \(1, 32, 32\), but got \(3, 8, 8\)"):
        network(torch.rand(2, 3, 8, 8))


def test_the_cifar10_network():
    images = torch.rand(5, 3, 32, 32)
    network = feature_network("cifar10-resnet56")
    found = extract(network, images)
    assert [part.shape for part in (found.pooled, found.spatial, found.logits)] == [(5, 64), (5, 128), (5, 10)]
    assert sum(parameter.numel() for parameter in network.parameters()) == 853_018
    assert torch.equal(network.state_dict()["bn1.running_var"], load_file(CIFAR10_FEATURES)["bn1.running_var"].float())
    torch.testing.assert_close(found.spatial.view(5, 8, 16).mean(2), found.pooled[:, :8])
    torch.testing.assert_close(network.linear(found.pooled.float()).double(), found.logits)
    licence = CIFAR10_FEATURES.with_suffix(".md").read_text(encoding="utf-8")
    assert "Yerlan Idelbayev" in licence
    assert "Redistributions in binary form must reproduce the above copyright notice" in licence
    with pytest.raises(ShapeError, match=r"need pictures of shape \(3, 32, 32\), but got \(1, 32, 32\)"):
        network(torch.rand(2, 1, 32, 32))


def test_names():
    assert set(FEATURES) == {"inception", "fashion", "cifar10-resnet56"}
    assert default_features((1, 32, 32)) == "fashion"
    assert default_features((3, 32, 32)) == "cifar10-resnet56"
    assert default_features((3, 64, 64)) == "inception"
    own = extract(feature_network(f"{__name__}:flat_features"), torch.rand(3, 3, 2, 2))
    assert own.pooled.shape == (3, 12)
    assert own.spatial is None
    assert own.logits is None
    with pytest.raises(ConfigError, match="Unknown feature network 'vgg'. Known: inception, fashion, cifar10-resnet56"):
        feature_network("vgg")
    for name in ("no_such_module:f", f"{__name__}:no_such_function"):
        with pytest.raises(ConfigError, match="must be a `module:function` that can be imported"):
            feature_network(name)
    with pytest.raises(ShapeError, match="a row of features for each of 2 pictures"):
        extract(lambda images: images, torch.rand(2, 1, 2, 2))


class StandIn(nn.Module):
    """With the parts of torch-fidelity's network that are used."""

    def __init__(self, name, features_list, weights):
        super().__init__()
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 1)

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        self.Mixed_6d.branch1x1(pixels.float())
        return pixels.float().mean((2, 3)), pixels.float().amax((2, 3))


def test_inception_where_its_weights_are(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    module = SimpleNamespace(FeatureExtractorInceptionV3=StandIn)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    with pytest.raises(UnsupportedError, match="pip install torch-fidelity`, and download https://github.com/toshas"):
        feature_network("inception")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").touch()
    found = extract(feature_network("inception"), torch.full((2, 1, 4, 4), 0.5))
    assert isinstance(found, Features)
    assert found.pooled.tolist() == [[128, 128, 128]] * 2
    assert found.spatial.shape == (2, 7 * 16)
    assert found.logits.shape == (2, 3)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UnsupportedError, match="need the package torch-fidelity"):
        feature_network("inception")


def test_own_features_lie_in_the_working_directory(tmp_path, monkeypatch):
    """The lines of the documentation, as the installed program finds them: without the folder in `sys.path`."""
    lines = inspect.getdoc(feature_network).partition("```py\n")[2].partition("```")[0]
    (tmp_path / "my_own_features.py").write_text(textwrap.dedent(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    before = list(sys.path)
    found = extract(feature_network("my_own_features:network"), torch.rand(4, 3, 8, 8))
    assert found.pooled.shape == (4, 3)
    assert sys.path == before


def takes_pictures(images):
    return images.mean((2, 3))


def fails():
    raise KeyError("weights")


def returns_none():
    return None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("takes_pictures", r"without any: missing a required argument: 'images'"),
        ("fails", "it fails: KeyError: 'weights'"),
        ("returns_none", "it returned NoneType"),
        ("__name__", "it cannot be called without any: .* is not a callable object"),
    ],
)
def test_what_is_no_factory_of_features_is_told_the_contract(name, message):
    contract = r"must be a function without arguments that returns a network: a callable that takes pictures .*; but "
    with pytest.raises(ConfigError, match=f"{contract}.*{message}"):
        feature_network(f"{__name__}:{name}")


def test_features_must_be_tensors():
    with pytest.raises(ShapeError, match="must give a tensor of features, but got list"):
        extract(lambda images: [0.0] * len(images), torch.rand(2, 1, 2, 2))
