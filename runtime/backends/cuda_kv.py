"""Keys and values on a PyTorch device: one growing tensor a cache, with the interface of `runtime.kv.KV`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from halfbyte.formats import kv_modes
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.kv import KV
from halfbyte.runtime.kv_page import decode, encode


class DeviceKV(KV):
    """The caches of one session as float32 [kv_heads, capacity, dim], each value rounded as its mode stores it.

    Keys of two stages have 2 * k_dim columns, as `KV.read` gives them. Packed modes go through the law of `kv_page`
    on the host: right, and slow. Windows keep all their positions.
    """

    def __init__(self, caches: np.ndarray, mode: str, device: torch.device):
        self.caches, self.mode, self.device = caches, mode, device
        self.modes = kv_modes.by_cache(mode, len(caches))
        self.held = [
            [
                torch.zeros(int(c["kv_heads"]), 0, stages * int(c[d]), device=device)
                for d, stages in (("k_dim", mode.k.stages), ("v_dim", 1))
            ]
            for c, mode in zip(caches, self.modes)
        ]

    def __getattr__(self, name: str) -> Any:
        if name in ("pages", "table", "words"):
            raise UsageError("a session of the cuda backend cannot be saved or loaded; use another backend")
        raise AttributeError(name)

    def reserve(self, end: int, start: int = 0) -> None:
        """Make positions below `end` writable."""
        for sides in self.held:
            for i, x in enumerate(sides):
                if x.shape[1] < end:
                    grown = torch.zeros(len(x), max(end, 2 * x.shape[1]), x.shape[2], device=self.device)
                    grown[:, : x.shape[1]] = x
                    sides[i] = grown

    def truncate(self, length: int) -> None:
        """Positions from `length` on are written again before they are read."""

    def holds(self, length: int) -> bool:
        """Nothing is ever given up."""
        return True

    def fork(self, length: int) -> DeviceKV:
        """A copy of the first `length` positions."""
        other = DeviceKV(self.caches, self.mode, self.device)
        other.held = [[x[:, :length].clone() for x in sides] for sides in self.held]
        return other

    def put_tensors(self, cache: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k [kv_heads, n, k_dim] and v [kv_heads, n, v_dim] at positions from `start` on."""
        mode = self.modes[cache]
        for held, x, own, first in zip(self.held[cache], (k, v), (mode.k, mode.v), mode.at(0)):
            if own.packed:
                split = max(0, min(kv_modes.PAGE - start, x.shape[1]))  # the first page has a form of its own
                host = x.cpu().numpy()
                parts = [_rounded(host[:, :split], first), _rounded(host[:, split:], own)]
                parts = [np.pad(p, ((0, 0), (0, 0), (0, held.shape[2] - p.shape[2]))) for p in parts]
                x = torch.from_numpy(np.concatenate(parts, axis=1)).to(self.device)
            elif own.bits == 16:
                x = x.half().float()
            held[:, start : start + x.shape[1]] = x

    def tensors(self, cache: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [kv_heads, end - start, dim] keys and values, views."""
        k, v = self.held[cache]
        return k[:, start:end], v[:, start:end]

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(x.nbytes for sides in self.held for x in sides)


def _rounded(x: np.ndarray, side: kv_modes.Side) -> np.ndarray:
    """What a page of this side gives back for float32 x [heads, n, dim]."""
    if not x.size:
        return x
    return decode(encode(x, side), side).astype(np.float32)
