"""Training on the student's own trajectories: what it is called with as it samples, and the teacher's answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from diffusers_msfp.methods.talora.finetuner import Finetuner
from diffusers_msfp.sampling.denoisers import denoiser_of, model_output
from diffusers_msfp.sampling.trajectory import Trajectories, rollout
from diffusers_msfp.sampling.used_output import used_part


@contextmanager
def by_the_student(share: float) -> Iterator[None]:
    """In this context a share of the rollouts of every `Finetuner` is the student's; the first is the teacher's.

    Args:
        share (`float`): 0 to 1; rollouts of both kinds are spread evenly.
    """
    run, roll, runs = Finetuner.run, Trajectories._roll, []

    def watched(self):
        runs.append(self)
        return run(self)

    def rolled(self, number: int) -> None:
        if not runs or int((number + 1) * share) == int(number * share):
            return roll(self, number)
        self._number, self._first = number, number * self.batch_size + self.rank * self.share
        pipe, teacher = runs[-1]._previewed, denoiser_of(self.pipe)
        with runs[-1].student.routed():
            steps = rollout(pipe, self.make_arguments, self._first, self.share, self.seed)
        with torch.no_grad():
            answers = [model_output(teacher(*step.args, **step.kwargs)) for step in steps]
        self._steps = [
            replace(step, output=used_part(self.pipe, answer, step.args, step.kwargs))
            for step, answer in zip(steps, answers, strict=True)
        ]

    with mock.patch.object(Finetuner, "run", watched), mock.patch.object(Trajectories, "_roll", rolled):
        yield
