"""AdamW with a learning-rate schedule, gradient clipping and a guard against non-finite gradients."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from tempo_engine import parallel

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
    """AdamW over named parameters, whole or shards. `step()` clips, guards, steps and clears the gradients.

    A step whose gradient is not finite is skipped; `skipped_in_a_row` tells when that has become the rule.
    """

    def __init__(
        self,
        parameters: list[tuple[str, nn.Parameter]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_grad_norm: float = 1.0,
        max_skipped: int = 3,
        factor: Callable[[int], float] = lambda step: 1.0,
    ) -> None:
        self.named = dict(parameters)
        self.lr = lr
        self.factor = factor
        self.max_grad_norm = max_grad_norm
        self.max_skipped = max_skipped
        self.num_steps = 0
        self.num_skipped = 0
        self.skipped_in_a_row = 0
        # Vectors (norms, biases, the value head) are not decayed: decay is for matrices that act on features.
        groups = [
            {"params": [p for p in self.named.values() if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.named.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)

    def step(self) -> float:
        """One update; returns the norm of the whole gradient before clipping. All ranks must step."""
        norm = float(parallel.whole(torch.nn.utils.clip_grad_norm_(self.named.values(), self.max_grad_norm)))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = self.lr * self.factor(self.num_steps)
            self.adamw.step()
            self.skipped_in_a_row = 0
        else:
            self.num_skipped += 1
            self.skipped_in_a_row += 1
        self.num_steps += 1
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly, as flat named tensors."""
        tensors = {"num_steps": torch.tensor([self.num_steps, self.num_skipped, self.skipped_in_a_row])}
        for name, parameter in self.named.items():
            for key, value in self.adamw.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        return tensors

    def blank_state(self) -> dict[str, Tensor]:
        """Room for a saved state with all of its moments: tensors to read into, and then to give to `load_state`."""
        tensors = {"num_steps": torch.zeros(3, dtype=torch.int64)}
        for name, parameter in self.named.items():
            moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            tensors |= {f"{name}/{key}": value for key, value in moments.items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a saved state, whose tensors it takes over; parameters without moments in it never had a gradient."""
        self.num_steps, self.num_skipped, self.skipped_in_a_row = tensors["num_steps"].tolist()
        self.adamw.state.clear()
        for name, parameter in self.named.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in tensors]
            if keys:
                self.adamw.state[parameter] = {key: tensors[f"{name}/{key}"] for key in keys}
