"""Class agreement of conditional pipelines: what was asked, where it can be told, and where it cannot."""

import pytest
import torch
from conftest import make_dit_pipe
from diffusers import DDPMPipeline
from pipelines import make_small_pipe

from diffusers_msfp.errors import ConfigError
from diffusers_msfp.evaluation import Features, evaluate_pipelines
from diffusers_msfp.evaluation.compare import in_place_of
from diffusers_msfp.evaluation.images.agreement import asked_classes, class_agreement
from diffusers_msfp.evaluation.images.samples import draw_pictures
from diffusers_msfp.sampling.denoisers import labels_of
from diffusers_msfp.sampling.solvers import with_ddim

NAMES = ("ship", "dog", "frog")


class Classifier:
    """Takes the picture whose mean is highest in red, green or blue for a ship, a dog, a frog."""

    classes = NAMES

    def __call__(self, images):
        return Features(images.mean((2, 3)), logits=images.mean((2, 3)))


class Nameless(Classifier):
    classes = ()


def classifier():
    return Classifier()


@pytest.fixture(scope="module")
def dit():
    pipe = make_dit_pipe()
    pipe.labels = {"dog": 7, "frog": 3}
    return pipe


def asked(pipe, num_samples=6, seed=1, prompts=None, network=None, **arguments):
    return asked_classes(
        pipe, network or Classifier(), num_samples=num_samples, seed=seed, prompts=prompts, arguments=arguments
    )


def test_a_candidate_that_lost_its_labels_is_asked_for_the_same(dit):
    lost = make_dit_pipe()
    assert labels_of(lost) != labels_of(dit)
    assert labels_of(in_place_of(dit, lost)) == labels_of(dit)
    assert labels_of(in_place_of(lost, dit)) == labels_of(lost)
    assert dit.labels == {"dog": 7, "frog": 3}
    assert in_place_of(dit, dit) is dit


def test_labels_by_their_names(dit):
    classes, reason = asked(dit, num_samples=40)
    assert reason is None
    assert set(classes.tolist()) == {1, 2}
    twin = with_ddim(dit)
    assert twin.labels == dit.labels
    assert set(labels_of(twin)) == {3, 7}
    heard = []
    hook = dit.transformer.register_forward_pre_hook(
        lambda _, _args, kwargs: heard.extend(kwargs["class_labels"].tolist()[:3]), with_kwargs=True
    )
    draw_pictures(dit, num_samples=3, num_inference_steps=1, seed=1)
    hook.remove()
    assert [[None, None, None, 2, None, None, None, 1][label] for label in heard] == classes[:3].tolist()


def test_prompts_by_the_one_class_that_they_name():
    pipe = make_small_pipe()
    classes, reason = asked(pipe, prompts=["a photo of a Ship", "dog, frontal"], num_samples=3)
    assert (classes.tolist(), reason) == ([0, 1, 0], None)
    for prompts, word in (
        (["a ship", "a hot-dog with a frog"], "a hot-dog with a frog"),
        (["a ship", "shipyard"], "shipyard"),
    ):
        assert asked(pipe, prompts=prompts) == (
            None,
            f"1 of 2 prompts do not name one class of these features: {word}",
        )
    assert asked(pipe)[1].startswith("6 of 6 prompts do not name one class")
    with pytest.raises(ConfigError, match="prompts are given as"):
        asked(pipe, prompt="a ship")


def test_where_it_cannot_be_told(dit, tiny_pipe):
    assert asked(tiny_pipe) == (None, None)
    assert asked(dit, network=Nameless()) == (None, "these features do not name classes")
    unnamed = make_dit_pipe()
    assert asked(unnamed, num_samples=1)[1].startswith("1 of 1 labels do not name one class")
    unnamed.labels = {"ship": 2, "frog": 2}
    assert asked(unnamed)[1] == "1 of 1 labels do not name one class of these features: 2"
    settings = {"num_samples": 2, "seed": 0, "prompts": None, "arguments": {}}
    nothing = {"candidate": Features(torch.zeros(2, 3))}
    assert class_agreement(dit, Classifier(), nothing, **settings) == ({}, "these features have no logits")


def test_evaluate_reports_it(dit, tiny_pipe):
    run = {"num_samples": 6, "num_inference_steps": 1, "seed": 1, "features": f"{__name__}:classifier"}
    figures = evaluate_pipelines(dit, dit, **run).figures
    taken = draw_pictures(dit, num_samples=6, num_inference_steps=1, seed=1).float().mean((2, 3)).argmax(1)
    share = (taken == asked(dit)[0]).float().mean().item()
    assert figures["class_agreement"]["reference"] == figures["class_agreement"]["candidate"]
    assert figures["class_agreement"]["candidate"].value == pytest.approx(share)
    plain = evaluate_pipelines(tiny_pipe, DDPMPipeline(tiny_pipe.unet, tiny_pipe.scheduler), **run)
    assert "class_agreement" not in plain.figures | plain.omitted
    text = evaluate_pipelines(make_small_pipe(), make_small_pipe(), prompts=["a dog"], **run)
    assert set(text.figures["class_agreement"]) == {"reference", "candidate"}
