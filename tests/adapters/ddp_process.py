"""Training of an adapter with `accelerate`, shared by two processes: `accelerate launch ddp_process.py OUT.pt`."""

import sys

import kinds
import torch
from accelerate import Accelerator
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_msfp.compat.accelerate import leave_process_group


def main() -> None:
    accelerator = Accelerator(cpu=True)
    net = kinds.make_net()
    torch.manual_seed(0)
    net.add_adapter(LoraConfig(r=4, target_modules=["linear", "conv", "grouped", "split_conv", "split_linear"]))
    kinds.randomise(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
    wrapped, optimizer = accelerator.prepare(net, optimizer)
    rank, losses = accelerator.process_index, []
    for _ in range(3):
        loss = (wrapped(kinds.inputs()[rank : rank + 1]) - 1).square().mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if accelerator.is_main_process:
        state = {"adapter": get_peft_model_state_dict(net), "losses": losses, "processes": accelerator.num_processes}
        torch.save(state, sys.argv[1])
    leave_process_group(accelerator)


if __name__ == "__main__":
    main()
