"""Machines: what their data sheets say, and how much of it programs really get."""

import os
from dataclasses import dataclass

from tempo_engine.errors import UserError

GB, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Machine:
    """One accelerator (or the CPU) and its links. Rates per second: `flops` dense bfloat16 operations, `wide_flops` float32 ones
    outside tensor cores, `bandwidth` bytes of its memory, `link` bytes one way to the others of its node, `network` bytes one way
    to other nodes, `host_link` bytes to host memory.

    Peaks never come true: `product_share`, `memory_share` and `link_share` are what plans count on. They are assumptions, not
    measurements: a run's own log (perf/throughput) is the judge.
    """

    name: str
    memory: float
    flops: float
    wide_flops: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    # CUDA contexts of trainer and sampler, NCCL's buffers, cuBLAS workspaces
    reserve: float = 3 * GIB
    # blocks the caching allocator holds but cannot use for what is asked next
    fragmentation: float = 0.05
    product_share: float = 0.5
    memory_share: float = 0.7
    link_share: float = 0.7

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"

    def product_rate(self, itemsize: int) -> float:
        """Operations per second that matrix products of numbers of so many bytes get."""
        return self.product_share * (self.flops if itemsize < 4 else self.wide_flops)

    @property
    def memory_rate(self) -> float:
        return self.memory_share * self.bandwidth

    @property
    def usable(self) -> float:
        return (self.memory - self.reserve) * (1 - self.fragmentation)


# name, memory (what is sold as GB is 2^30 bytes each), dense bf16 and float32 TFLOP/s, memory TB/s, NVLink or Infinity Fabric
# GB/s one way, network GB/s, PCIe GB/s. The network is that of the vendors' reference systems: one adapter for each accelerator.
_GPUS = (
    # NVIDIA A100 80GB SXM data sheet: 2,039 GB/s, NVLink 600 GB/s both ways; DGX A100: 8 x 200 Gb/s, PCIe 4.0 x16
    ("a100", 80, 312, 19.5, 2.039, 300, 25, 32),
    # NVIDIA H100 SXM data sheet: 989 TFLOP/s without sparsity, 3.35 TB/s, NVLink 900 GB/s; DGX H100: 8 x 400 Gb/s, PCIe 5.0 x16
    ("h100", 80, 989, 67, 3.35, 450, 50, 64),
    # NVIDIA H200 SXM data sheet: 141 GB, 4.8 TB/s, else as the H100
    ("h200", 141, 989, 67, 4.8, 450, 50, 64),
    # NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 18 PFLOP/s dense bf16, 64 TB/s, NVLink 1.8 TB/s, 8 x 400 Gb/s
    ("b200", 180, 2250, 75, 8.0, 900, 50, 64),
    # AMD Instinct MI300X data sheet: 192 GB, 1,307 TFLOP/s, 5.3 TB/s, 7 links of 128 GB/s both ways; 8 x 400 Gb/s, PCIe 5.0 x16
    ("mi300x", 192, 1307, 163.4, 5.3, 448, 50, 64),
)
GPUS = {
    name: Machine(name, gb * GIB, tf * 1e12, wide * 1e12, tb * 1e12, *(x * GB for x in links))
    for name, gb, tf, wide, tb, *links in _GPUS
}
MACHINES = (*GPUS, "cpu")
# A core with two 256-bit units for fused multiply-adds at 2.5 GHz; a memory channel shared by four cores.
CORE_FLOPS, CORE_BANDWIDTH = 2 * 2 * 8 * 2.5e9, 6e9
# Interpreter, torch and transformers before any model: about 450 MB.
PROCESS_BYTES = 450e6


def machine_named(name: str, *, processes: int) -> Machine:
    """The GPU of that name; or this computer's share for one of so many processes on it. Raises UserError for another name."""
    if name in GPUS:
        return GPUS[name]
    if name != "cpu":
        raise UserError(f"--gpu {name} is not known; plan knows {', '.join(MACHINES)}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    cores = max((os.cpu_count() or 1) / processes, 1)
    flops, bandwidth = cores * CORE_FLOPS, cores * CORE_BANDWIDTH
    return Machine(
        "cpu", memory, flops, flops, bandwidth, bandwidth, bandwidth, bandwidth, PROCESS_BYTES, fragmentation=0.02
    )
