"""Hardware: the rates of a GPU and its links by data sheet, and the share of them that is assumed to be reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One GPU of a cluster. Rates are those reached in practice, in bytes or operations a second.

    `within` is the link to the other GPUs of the host, `across` the GPU's share of the network, each in one direction.
    """

    name: str
    memory: int  # bytes
    bandwidth: float  # of its own memory
    flops: float  # bf16, dense
    within: float
    across: float
    gpus_per_host: int = 8
    launch: float = 1.0e-3  # seconds of a decode step besides arithmetic: scheduling, sampling, graph launch
    hop: float = 1.0e-5  # seconds of one small all-reduce between the GPUs of a host


# H100 SXM: 80 GB, 3.35 TB/s, 989 TFLOP/s in bf16, NVLink 450 GB/s a direction, one 400 Gb/s port per GPU. The rates are
# assumed to reach 70 %, 50 %, 70 % and 80 % of these, in this order. They were not measured.
H100 = Hardware("H100", 80 << 30, 0.7 * 3.35e12, 0.5 * 989e12, 0.7 * 450e9, 0.8 * 50e9)
