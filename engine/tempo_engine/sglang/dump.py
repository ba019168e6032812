"""What a server computes layer by layer: its own dumps of tensors, read without running anything that is in them.

SGLang writes a file a forward pass when it is started with `debug-tensor-dump-output-folder`: tensors by module name.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempo_engine.divergence import Outputs
from tempo_engine.model import Policy
from tempo_engine.samplers.sglang import SGLangSampler
from tempo_engine.sglang.client import Refused, Unreachable
from tempo_engine.sglang.receipt import Receipt
from tempo_engine.sglang.server import check_can_start
from tempo_engine.weights import whole_weights

# Added to the logit of the token that is to come next: no other one can.
CERTAIN = 1e4


def differing_weights(sampler: SGLangSampler, policy: Policy) -> list[str] | None:
    """Tensors that a server holds otherwise than the policy does now, by the server's names in the model's order; None where
    checksums cannot say."""
    receipt = Receipt()
    for name, weight in whole_weights(policy.model, policy.sharding.compute, policy.blocks.lora):
        receipt.add(name, weight)
    found: set[str] = set()
    try:
        answers = sampler.ask("/weights_checker", {"action": "checksum"})
    except Refused:
        return None
    for answer in answers:
        ranks = answer["ranks"] if answer else []
        if len(ranks) != 1 or not receipt.covers(ranks[0]["checksums"]):
            return None
        found |= set(receipt.differing(ranks[0]["checksums"]))
    return [name for name in receipt.expected if name in found]


def server_layers(
    sampler: SGLangSampler, policy: Policy, prompt_ids: Sequence[int], response_ids: Sequence[int], folder: Path
) -> Outputs:
    """What a server that is started for this, with the sampler's options, computes for prompt and response: name -> [N, D].

    The last token is decoded by itself, as while sampling, the ones before it in one piece. Raises UserError where sglang cannot
    be started, RuntimeError when there are no dumps.
    """
    dumps = folder / "dumps"
    dumps.mkdir(parents=True)
    arguments = {"debug-tensor-dump-output-folder": str(dumps), "disable-radix-cache": True}
    server = sampler.options.server
    server = replace(server, port=None, data_parallel=1, arguments={**server.arguments, **arguments})
    check_can_start(1, None)
    options = replace(sampler.options, server=server, urls=(), replicas=1, sync="disk", sync_folder=None, naps=False)
    one = SGLangSampler(options, stop_ids=[], decode=lambda ids: "", max_new_tokens=sampler.max_new_tokens)
    one.open(folder, policy)
    try:
        one.load(policy)
        one.ask("/generate", _forced(prompt_ids, response_ids))
    except (Refused, Unreachable) as error:
        raise RuntimeError(f"the server for dumps failed: {error}") from error
    finally:
        one.close()
    found = read_dump(dumps, [*prompt_ids, *response_ids])
    if server.tensor_parallel > 1:  # between the norms, a rank has only its part of a sum
        found = {name: x for name, x in found.items() if "norm" in name or name.rpartition(".")[2].isdigit()}
    return found


def _forced(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> dict[str, Any]:
    """A request upon which a server computes every given token: with a response, it has to choose the last one itself."""
    sampling: dict[str, Any] = {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True}
    ids = [*prompt_ids, *response_ids]
    if response_ids:
        sampling |= {"max_new_tokens": 2, "logit_bias": {str(ids.pop()): CERTAIN}}
    return {"input_ids": ids, "sampling_params": sampling}


def read_dump(folder: Path, sequence: Sequence[int]) -> Outputs:
    """Outputs of the passes that computed this sequence, joined: name -> [N, D]. Raises RuntimeError when there are none.

    Norms add the layer before to the residual stream and give out both: what enters a block's norm is what the block before gave.
    """
    passes: list[dict[str, Any]] = []
    missing = len(sequence)
    for file in sorted(folder.rglob("Pass*.pt"), key=lambda file: file.name, reverse=True):
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever is wrong with a file of somebody else's: it is not read
            raise RuntimeError(f"{file.name} holds more than tensors, or less") from error
        ids, positions = (_of_pass(tensors, name) for name in ("input_ids", "positions"))
        first = missing - len(ids)
        # From the last token backwards: passes of health checks lie between ours.
        if missing > first >= 0 and ids == list(sequence[first:missing]) and positions == list(range(first, missing)):
            passes.insert(0, tensors)
            missing = first
    if missing:
        raise RuntimeError(f"the server dumped no pass with these {len(sequence)} tokens")
    joined: Outputs = {}
    for name in passes[0]:
        parts = [tensors.get(name) for tensors in passes]
        joined |= _joined(name, parts)
    return joined


def _of_pass(tensors: dict[str, Any], name: str) -> list[int]:
    found = tensors.get(f"model.forward_batch_info.{name}")
    return found.tolist() if isinstance(found, Tensor) and found.ndim == 1 else []


def _joined(name: str, parts: list[Any]) -> Outputs:
    """One module's outputs over the passes, and that of the block before it where it is a norm that also gives the residual."""
    if all(isinstance(part, Tensor) for part in parts):
        return {name: torch.cat(parts)} if all(part.ndim == 2 for part in parts) else {}
    if not all(isinstance(part, list) and len(part) == 2 and part[0].shape == part[1].shape for part in parts):
        return {}
    found = {name: torch.cat([part[0] for part in parts])}
    if before := _block_before(name):
        found[before] = torch.cat([part[1] for part in parts])
    return found


def _block_before(norm: str) -> str | None:
    """`model.layers.4.input_layernorm` -> `model.layers.3`."""
    stem, _, leaf = norm.rpartition(".")
    parent, _, number = stem.rpartition(".")
    return f"{parent}.{int(number) - 1}" if leaf == "input_layernorm" and number.isdigit() and int(number) else None
