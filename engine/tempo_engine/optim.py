"""AdamW with a learning-rate schedule, gradient clipping and a guard against non-finite gradients."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULE_FLOOR = 0.05  # linear and cosine end at this share of the peak


def schedule_factor(step: int, *, warmup: int, schedule: Schedule, total: int) -> float:
    """The learning rate's factor at 0-based `step`: linear warm-up, then constant, or a decay to 5% at `total` steps."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return SCHEDULE_FLOOR + (1 - SCHEDULE_FLOOR) * shape


class Optimizer:
    """AdamW over named parameters. `step()` clips, guards, steps and clears the gradients.

    Parameters in half precision have float32 masters, which are what AdamW moves: a step of 1e-6 would vanish in bfloat16.
    """

    def __init__(
        self,
        parameters: list[tuple[str, nn.Parameter]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_grad_norm: float = 1.0,
        factor: Callable[[int], float] = lambda step: 1.0,
    ) -> None:
        self.named = dict(parameters)
        half = (torch.bfloat16, torch.float16)
        self.masters = {n: nn.Parameter(p.detach().float()) for n, p in self.named.items() if p.dtype in half}
        self.stepped = {**self.named, **self.masters}
        self.lr = lr
        self.factor = factor
        self.max_grad_norm = max_grad_norm
        self.num_steps = 0
        self.num_skipped = 0
        # Vectors (norms, biases, the value head) are not decayed: decay is for matrices that act on features.
        groups = [
            {"params": [p for p in self.stepped.values() if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.stepped.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self) -> float:
        """One update; returns the gradient norm before clipping. A non-finite norm skips the update and is counted."""
        for name, master in self.masters.items():
            parameter = self.named[name]
            if self.num_steps == 0:  # the weights may have been loaded or trained otherwise since this was built
                master.copy_(parameter)
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self.stepped.values(), self.max_grad_norm))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = self.lr * self.factor(self.num_steps)
            self.adamw.step()
            for name, master in self.masters.items():
                self.named[name].copy_(master)
        else:
            self.num_skipped += 1
        self.num_steps += 1
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly, as flat named tensors."""
        tensors = {"num_steps": torch.tensor([self.num_steps, self.num_skipped])}
        tensors |= {f"{name}/master": master.detach() for name, master in self.masters.items()}
        for name, parameter in self.stepped.items():
            for key, value in self.adamw.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.num_steps, self.num_skipped = tensors["num_steps"].tolist()
        for name, master in self.masters.items():
            master.copy_(tensors[f"{name}/master"])
        self.adamw.state.clear()
        for name, parameter in self.stepped.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in tensors]
            if keys:
                moments = {key: tensors[f"{name}/{key}"].to(parameter.device, copy=True) for key in keys}
                self.adamw.state[parameter] = moments
