"""Pictures of an evaluation: fixed noise, kept, resumed, shared."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_dit_pipe, make_unet
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from pipelines import make_sdxl, make_small_pipe, make_small_wan, small_wan

from diffusers_msfp import set_engine
from diffusers_msfp.errors import ConfigError, StateError
from diffusers_msfp.evaluation.images import samples
from diffusers_msfp.evaluation.images.samples import draw_pictures, noise_generator


@pytest.fixture
def pipe(monkeypatch) -> DDPMPipeline:
    """Makes pictures two at a time."""
    monkeypatch.setattr(samples, "batch_size_for", lambda *_: 1)
    return DDPMPipeline(make_unet(), DDIMScheduler())


def calls(pipe, **arguments) -> tuple[torch.Tensor, int]:
    steps = []
    arguments = {
        "num_samples": 5,
        "num_inference_steps": 3,
        "on_progress": lambda *step: steps.append(step),
    } | arguments
    return draw_pictures(pipe, **arguments), len(steps)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=0)


def test_noise_depends_on_seed_and_index_alone(pipe, monkeypatch):
    pictures = draw_pictures(pipe, num_samples=5, num_inference_steps=3, seed=4)
    assert pictures.dtype == torch.float16
    assert pictures.shape == (5, 3, 8, 8)
    noise = torch.stack([torch.randn(3, 8, 8, generator=noise_generator(4, i)) for i in range(5)])
    x, scheduler = noise, DDIMScheduler()
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, timestep).sample, timestep, x).prev_sample
    close(pictures, (x / 2 + 0.5).clamp(0, 1))
    monkeypatch.setattr(samples, "batch_size_for", lambda *_: 8)
    close(draw_pictures(pipe, num_samples=3, num_inference_steps=3, seed=4), pictures[:3])
    assert not torch.equal(draw_pictures(pipe, num_samples=5, num_inference_steps=3, seed=5), pictures)
    noises = {tuple(torch.randn(2, generator=noise_generator(s, i)).tolist()) for s in range(20) for i in range(50)}
    assert len(noises) == 1000


def test_reduced_precision_and_older_outputs(pipe):
    pictures = draw_pictures(pipe, num_samples=2, num_inference_steps=3)
    half = DDPMPipeline(copy.deepcopy(pipe.unet).to(torch.bfloat16), pipe.scheduler)
    close(draw_pictures(half, num_samples=2, num_inference_steps=3), pictures, 0.06)
    arrays = DDIMPipeline(pipe.unet, pipe.scheduler)  # knows no `pt`
    close(draw_pictures(arrays, num_samples=2, num_inference_steps=3), pictures)


def test_labels_belong_to_pictures_too(pipe):
    labelled = make_dit_pipe()
    whole = draw_pictures(labelled, num_samples=3, num_inference_steps=2)
    assert whole.shape == (3, 3, 8, 8)
    assert torch.equal(
        torch.cat([draw_pictures(labelled, num_samples=3, num_inference_steps=2, share=(i, 2)) for i in (0, 1)]), whole
    )
    close(draw_pictures(labelled, num_samples=2, num_inference_steps=2), whole[:2])


def test_shares_make_the_whole_bit_for_bit(pipe, tmp_path):
    whole = draw_pictures(pipe, num_samples=5, num_inference_steps=3)
    one, two = (
        draw_pictures(pipe, num_samples=5, num_inference_steps=3, folder=tmp_path, share=(i, 2)) for i in (0, 1)
    )
    assert torch.equal(torch.cat([one[:2], two, one[2:]]), whole)
    found, steps = calls(pipe, folder=tmp_path)
    assert steps == 0
    assert torch.equal(found, whole)
    assert draw_pictures(pipe, num_samples=2, num_inference_steps=3, share=(1, 2)).numel() == 0


def test_a_killed_run_goes_on_and_more_pictures_are_added(pipe, tmp_path):
    whole, steps = calls(pipe, folder=tmp_path)
    assert steps == 9
    files = sorted(tmp_path.rglob("*.npy"))
    assert [file.name for file in files] == [f"{a:07}-{b:07}.npy" for a, b in ((0, 2), (2, 4), (4, 5))]
    files[1].unlink()
    (files[1].parent / "2-99.part").write_bytes(b"half")
    assert calls(pipe, folder=tmp_path)[1] == 3
    files[0].write_bytes(files[0].read_bytes()[:200])  # damaged
    again, steps = calls(pipe, folder=tmp_path)
    assert steps == 3
    assert torch.equal(again, whole)
    more, steps = calls(pipe, folder=tmp_path, num_samples=8)
    assert steps == 6
    assert torch.equal(more[:4], whole[:4])


def test_what_others_keep_in_attributes_counts(pipe, tmp_path):
    unet = copy.deepcopy(pipe.unet)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False), unet)
    other = DDPMPipeline(unet, pipe.scheduler)
    calls(other, folder=tmp_path)
    assert calls(other, folder=tmp_path)[1] == 0
    for layer in (each for each in unet.modules() if isinstance(each, BaseTunerLayer)):
        layer.scale_layer(0.5)
    assert calls(other, folder=tmp_path)[1] > 0
    for layer in (each for each in unet.modules() if isinstance(each, BaseTunerLayer)):
        layer.enable_adapters(False)
    assert calls(other, folder=tmp_path)[1] > 0


def test_other_arguments_and_changed_checkpoints_begin_anew(pipe, tmp_path, packed_pipe):
    calls(pipe, folder=tmp_path)
    for change in ({"seed": 1}, {"num_inference_steps": 2}):
        assert calls(pipe, folder=tmp_path, **change)[1] > 0
    other = DDPMPipeline(copy.deepcopy(pipe.unet), DDIMScheduler())
    other.scheduler.register_to_config(_use_default_values=["in", "any", "order"])
    assert calls(other, folder=tmp_path)[1] == 0
    assert calls(DDPMPipeline(pipe.unet, DDIMScheduler(beta_end=0.03)), folder=tmp_path)[1] == 9
    other.unet.conv_out.bias.data[0] += 1e-3
    assert calls(other, folder=tmp_path)[1] == 9
    set_engine(packed_pipe, "auto")
    calls(packed_pipe, folder=tmp_path)
    set_engine(packed_pipe, "reference")
    assert calls(packed_pipe, folder=tmp_path)[1] == 9
    assert len(list(tmp_path.iterdir())) == 7


def test_the_pipelines_config_and_versions_count(pipe, tmp_path, monkeypatch):
    sdxl, found = make_sdxl(), set()
    for forced in (True, False, True):
        sdxl.register_to_config(force_zeros_for_empty_prompt=forced)
        found.add(samples._identity(sdxl, 2, 0, None, {}))
    assert len(found) == 2
    calls(pipe, folder=tmp_path)
    monkeypatch.setattr(samples, "version", lambda _: "another")
    assert calls(pipe, folder=tmp_path)[1] == 9


def test_what_no_name_can_tell_is_not_kept(tmp_path):
    run = {"num_samples": 2, "num_inference_steps": 1, "folder": tmp_path}
    with pytest.raises(ConfigError, match="but `callback_on_step_end` is a function"):
        draw_pictures(make_small_pipe(), **run, callback_on_step_end=lambda *_: {})
    with pytest.raises(StateError, match="but those of `unet` are not in memory. Leave `folder` out"):
        draw_pictures(DDPMPipeline(make_unet().to("meta"), DDIMScheduler()), **run)
    assert not list(tmp_path.iterdir())


def test_videos_are_kept_too(tmp_path):
    wan = make_small_wan()
    wan.set_progress_bar_config(disable=True)
    run = {"num_samples": 1, "num_inference_steps": 2, "folder": tmp_path, **small_wan()}
    videos, steps = calls(wan, **run)
    assert videos.ndim == 5
    assert steps
    again, steps = calls(wan, **run)
    assert steps == 0
    assert torch.equal(again, videos)


def test_a_full_disk_leaves_nothing_half_written(pipe, tmp_path, monkeypatch):
    save = np.save

    def full(file, images):
        if len(list(tmp_path.rglob("*.npy"))):
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(file, images)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        calls(pipe, folder=tmp_path)
    assert [file.name for file in tmp_path.rglob("*.*")] == ["0000000-0000002.npy"]
    monkeypatch.undo()
    monkeypatch.setattr(samples, "batch_size_for", lambda *_: 1)
    assert calls(pipe, folder=tmp_path)[1] == 6


@pytest.mark.parametrize(
    "kind", [torch.from_numpy, np.array, lambda mask: Image.fromarray((255 * mask).astype(np.uint8))]
)
def test_pictures_of_another_mask_are_others(pipe, kind):
    """What the text of a large tensor, or the address of a picture, does not tell."""
    mask = np.zeros((64, 64))
    other = mask.copy()
    other[20:40, 20:40] = 1
    one, same, another = (samples._identity(pipe, 2, 0, None, {"mask": kind(m)}) for m in (mask, mask.copy(), other))
    assert one == same
    assert one != another
