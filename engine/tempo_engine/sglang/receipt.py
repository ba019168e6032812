"""What a server must hold after an update: the checksum of each of its tensors, from the trainer's own.

Servers keep some weights joined (query, key and value in one) and pad the vocabulary; the checksums are of what they keep.
"""

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Several weights that a server keeps as one, in the order in which it joins them along their first dimension.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PART_OF = {part: (whole, number) for whole, parts in JOINED.items() for number, part in enumerate(parts)}
VOCABULARY = re.compile(r"(embed_tokens|lm_head)\.weight$")
# Rows of embedding and LM head are a multiple of this, the last ones zero.
PADDING = 64


class Receipt:
    """Fed with every weight of an update by its name in a file; `expected` then has the checksum of every tensor of a server."""

    def __init__(self) -> None:
        self.expected: dict[str, str] = {}
        self._parts: dict[str, dict[int, Tensor]] = {}

    def add(self, name: str, weight: Tensor) -> None:
        stem, _, leaf = name.rpartition(".")
        parent, _, layer = stem.rpartition(".")
        if layer not in PART_OF:
            self.expected[name] = checksum(_padded(name, weight))
            return
        whole, number = PART_OF[layer]
        joined = f"{parent}.{whole}.{leaf}"
        parts = self._parts.setdefault(joined, {})
        parts[number] = weight
        if len(parts) == len(JOINED[whole]):
            self.expected[joined] = checksum(torch.cat([parts[i] for i in range(len(parts))]))
            del self._parts[joined]

    def covers(self, checksums: Mapping[str, str]) -> bool:
        """Whether the server has just the tensors that were foreseen; if not, it keeps its weights in another way."""
        return checksums.keys() == self.expected.keys() and not self._parts

    def differing(self, checksums: Mapping[str, str]) -> list[str]:
        """Names of the server's tensors that are not what they must be."""
        return sorted(name for name, value in self.expected.items() if checksums.get(name) != value)


def _padded(name: str, weight: Tensor) -> Tensor:
    missing = -len(weight) % PADDING if VOCABULARY.search(name) else 0
    return torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])]) if missing else weight


def checksum(x: Tensor) -> str:
    """SGLang's own: on a CPU the first 8 bytes of SHA-256 of the bytes, on a GPU a hash computed there."""
    if x.is_cuda:
        from sglang.srt.managers.mm_utils import tensor_hash  # pyright: ignore[reportMissingImports]

        return f"{tensor_hash(x):016x}"
    data = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()[:16]
