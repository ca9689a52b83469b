"""What a plane between GPUs should give, and the verdict on what it gave: every known failure is silent slowness."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from baton.node.telemetry import log_event

logger = logging.getLogger("kvtransfer.self_test")

PROBE_BYTES = 64 << 20
SMALLEST_PROBE_BYTES = 16 << 20
"""Less than that measures latency; it is reported and not judged."""
GB_S_A_CTA = 16.5
"""Of NCCL between two H200s at 32 to 64 MiB, where it uses half of the CTAs that it may."""

_PEER_GB_S = {"NVIDIA H200": {"cuda_ipc": 385.0, "nccl": 340.0}, "NVIDIA H100 80GB HBM3": {"cuda_ipc": 347.0}}
"""Measured at 64 MiB over NVLink, the H200's by bare copies and bare NCCL; what is not here is measured, not judged."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The verdict for planes of one GPU. `nccl_ctas`: how many CTAs NCCL may use, 0 for as many as it likes."""

    gpu_name: str
    nccl_ctas: int = 0

    def expected_gb_s(self, plane: str) -> float:
        """0 where nothing is known."""
        most = _PEER_GB_S.get(self.gpu_name, {}).get(plane, 0.0)
        if plane == "nccl" and self.nccl_ctas:
            return min(most, self.nccl_ctas * GB_S_A_CTA)
        return most

    def report(self, plane: str, size_bytes: int, duration_s: float) -> bool:
        """Log the speed; False, and a warning, if it is under half of what is expected."""
        gb_s = size_bytes / duration_s / 1e9 if duration_s > 0 else 0.0
        expected = self.expected_gb_s(plane)
        slow = size_bytes >= SMALLEST_PROBE_BYTES and gb_s < expected / 2
        log_event(
            logger,
            "plane_slow" if slow else "plane_measured",
            level=logging.WARNING if slow else logging.INFO,
            plane=plane,
            gb_s=round(gb_s, 1),
            expected_gb_s=expected,
            probe_mib=round(size_bytes / (1 << 20), 2),
        )
        return not slow
