"""What the Xids of NVIDIA's driver are called (docs.nvidia.com/deploy/xid-errors), as of 2025-10-29."""

from __future__ import annotations

from collections.abc import Mapping

XID_NAMES: Mapping[int, str] = {
    13: "graphics exception",
    31: "GPU page fault",
    43: "GPU stopped processing",
    45: "a process was torn down after an earlier error",
    48: "double-bit ECC error",
    54: "auxiliary power is not connected",
    62: "internal micro-controller halt",
    63: "a row is marked for remapping",
    64: "a row remap failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "high rate of single-bit errors",
    94: "contained ECC error",
    95: "uncontained ECC error",
    109: "context switch timeout",
    119: "GSP RPC timeout",
    120: "GSP error",
    121: "C2C link error",
    136: "link training failed",
    140: "unrecovered ECC error",
    143: "GPU initialization error",
    154: "the driver's recovery action changed",
    156: "resource retirement",
    157: "resource retirement failed",
    158: "fatal timeout",
}
