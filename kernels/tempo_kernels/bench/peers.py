"""Everybody who computes `linear_logprob`'s log-prob and entropy, each as a `Side`: us, bare products, PyTorch, TRL, Liger, Apple.

All get the same inputs and the same upstream gradients. A peer without entropy is compared with us on the log-prob alone, and the
case says so.
"""

# Shape letters: T = packed tokens, D = hidden size, V = vocabulary
from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from tempo_kernels.bench.measure import Run, Side, Tensors
from tempo_kernels.linear_logprob import linear_logprob

BENCH_EXTRA = "pip install 'tempo-engine[bench]'"


class HeadInputs(NamedTuple):
    hidden_TD: Tensor
    head_VD: Tensor
    target_T: Tensor
    g_T: Tensor
    g_entropy_T: Tensor

    def results(self, logprob_T: Tensor, entropy_T: Tensor | None = None, *, retain: bool = False) -> Tensors:
        """Outputs and gradients; every side gets the same upstream gradients."""
        outputs = {"logprob": logprob_T} if entropy_T is None else {"logprob": logprob_T, "entropy": entropy_T}
        upstream = [g.to(x.dtype) for x, g in zip(outputs.values(), (self.g_T, self.g_entropy_T), strict=False)]
        d_hidden, d_head = torch.autograd.grad(
            list(outputs.values()), [self.hidden_TD, self.head_VD], upstream, retain_graph=retain
        )
        return {name: x.detach() for name, x in outputs.items()} | {"d_hidden": d_hidden, "d_head": d_head}


def softmax_logprob(inputs: HeadInputs, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(logits in the dtype of hidden, log-prob, entropy) the plain way, by log_softmax over all logits in `dtype`."""
    logits_TV = inputs.hidden_TD @ inputs.head_VD.T
    logp_TV = logits_TV.to(dtype or torch.float32).log_softmax(-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    return logits_TV, logp_TV.gather(-1, inputs.target_T[:, None])[:, 0], entropy_T


def our_head(inputs: HeadInputs, name: str = "default", *, has_entropy: bool = True, **options: Any) -> Side:
    def run() -> Tensors:
        stats = linear_logprob(inputs.hidden_TD, inputs.head_VD, inputs.target_T, **options)
        return inputs.results(stats.logprob_T, stats.entropy_T if has_entropy else None)

    return Side(name, lambda: run)


def bare_products(inputs: HeadInputs, dlogits_TV: Tensor) -> Side:
    """h W^T, dz W and dz^T h with the true dz: what no exact way can do without."""

    def run() -> Tensors:
        with torch.no_grad():
            _ = inputs.hidden_TD @ inputs.head_VD.T
            return {"d_hidden": dlogits_TV @ inputs.head_VD, "d_head": dlogits_TV.T @ inputs.hidden_TD}

    return Side(f"three bare products, torch {torch.__version__}", lambda: run, returns=("d_hidden", "d_head"))


def float32_softmax(inputs: HeadInputs) -> Side:
    def run() -> Tensors:
        return inputs.results(*softmax_logprob(inputs)[1:])

    return Side(f"log_softmax of all logits in float32, torch {torch.__version__}", lambda: run)


def torch_chunks(inputs: HeadInputs, label: str, **options: Any) -> Side:
    """`F.linear_cross_entropy`; without options its reference path, which keeps all logits in the dtype of hidden."""

    chosen = LinearCrossEntropyOptions(**options) if label else None

    def run() -> Tensors:
        loss_T = F.linear_cross_entropy(
            inputs.hidden_TD, inputs.head_VD, inputs.target_T, reduction="none", options=chosen
        )
        return inputs.results(-loss_T)

    # torch.testing.assert_close's tolerance for bfloat16: its log-prob has that dtype
    tolerance = 1.6e-2 if inputs.hidden_TD.dtype == torch.bfloat16 else 0.0
    name = f"F.linear_cross_entropy{f', {label}' if label else ''}, torch {torch.__version__}"
    return Side(name, lambda: run, tolerance=tolerance)


def _versioned(name: str, distribution: str) -> str:
    try:
        package, _, function = name.partition(" ")
        return f"{package} {metadata.version(distribution)} {function}"
    except metadata.PackageNotFoundError:
        return name


def trl_chunks(inputs: HeadInputs) -> Side:
    def load() -> Run:
        function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
        # its backward pass imports this module, with all that TRL requires
        width = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

        def run() -> Tensors:
            logprob_T, entropy_T, *_ = function.apply(
                inputs.hidden_TD, inputs.head_VD, None, inputs.target_T, 1.0, width, None, 1.0, ("entropy",)
            )
            return inputs.results(logprob_T, entropy_T)

        return run

    return Side(_versioned("TRL ChunkedLogProbFunction", "trl"), load, BENCH_EXTRA)


def liger_chunks(inputs: HeadInputs) -> Side:
    """The log-prob inside Liger's chunked PPO and GRPO losses, without the loss around it."""

    def load() -> Run:
        module = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")

        def run() -> Tensors:
            logprob_1T = module.LigerFusedLinearPPOBase.chunk_forward(
                inputs.hidden_TD[None], inputs.head_VD, inputs.target_T[None]
            )
            return inputs.results(logprob_1T[0])

        return run

    return Side(_versioned("Liger LigerFusedLinearPPOBase.chunk_forward", "liger-kernel"), load, BENCH_EXTRA)


def liger_scaled(inputs: HeadInputs) -> Side:
    """Log-prob and entropy; in PyTorch by chunks of 512 tokens, on an H100 or H200 by kernels of its own."""

    def load() -> Run:
        module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")

        def run() -> Tensors:
            nll_T, entropy_T = module.LigerFusedLinearScaledCrossEntropyFunction.apply(
                inputs.hidden_TD, inputs.head_VD, inputs.target_T, 1.0, -100, 1, True
            )
            return inputs.results(-nll_T, entropy_T)

        return run

    name = _versioned("Liger LigerFusedLinearScaledCrossEntropyFunction", "liger-kernel")
    install = f"{BENCH_EXTRA} 'liger-kernel[cutedsl]'" if inputs.hidden_TD.is_cuda else BENCH_EXTRA
    # its tests of the forward pass: rtol 5e-2, for an entropy in bfloat16
    return Side(name, load, install, tolerance=5e-2 if inputs.hidden_TD.dtype == torch.bfloat16 else 0.0)


def liger_cross_entropy(inputs: HeadInputs) -> Side:
    def load() -> Run:
        module = importlib.import_module("liger_kernel.transformers.functional")

        def run() -> Tensors:
            return inputs.results(
                -module.liger_fused_linear_cross_entropy(
                    inputs.hidden_TD, inputs.head_VD, inputs.target_T, reduction="none"
                )
            )

        return run

    name = _versioned("Liger liger_fused_linear_cross_entropy", "liger-kernel")
    # its tests: rtol 5e-2 in bfloat16, 5e-4 in float32
    return Side(name, load, BENCH_EXTRA, tolerance=5e-2 if inputs.hidden_TD.dtype == torch.bfloat16 else 5e-4)


def cut_cross_entropy(inputs: HeadInputs) -> Side:
    def load() -> Run:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

        def run() -> Tensors:
            return inputs.results(-function(inputs.hidden_TD, inputs.head_VD, inputs.target_T, reduction="none"))

        return run

    name = _versioned("cut-cross-entropy linear_cross_entropy", "cut-cross-entropy")
    # its tests: 1e-2 in bfloat16, 5e-4 in float32
    install = "by hand, on a GPU: pip install cut-cross-entropy"
    return Side(name, load, install, tolerance=1e-2 if inputs.hidden_TD.dtype == torch.bfloat16 else 5e-4)
