"""Fake-quantised activations, keys and values: rounded forward as the runtime does, straight through backward."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from halfbyte.formats import kv_modes
from halfbyte.formats.kv_modes import PAGE, Mode, Side

GROUP = 32  # columns that share an activation scale under policy i8g32 (SPEC.md section 10)
TINY = 2.0**-100  # activations below this are zero


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` forward, the gradient of x backward."""
    return x + (rounded - x).detach()


def round_activations(x: Tensor) -> Tensor:
    """float32[..., K] as policy i8g32 sees them: int8 per 32 columns, d = amax / 127."""
    with torch.no_grad():
        K = x.shape[-1]
        g = pad(x, (0, -K % GROUP)).unflatten(-1, (-1, GROUP))
        top = g.abs().amax(dim=-1, keepdim=True)
        live = top >= TINY
        inverse = torch.where(live, 127 / torch.where(live, top, torch.ones_like(top)), torch.zeros_like(top))
        d = torch.where(live, top / 127, torch.zeros_like(top))
        rounded = (torch.round(g * inverse).clamp(-127, 127) * d).flatten(-2)[..., :K]
    return straight_through(x, rounded)


def round_cache(x: Tensor, mode: Mode, values: bool) -> Tensor:
    """Keys, or `values`, float32[batch, heads, T, n] of positions 0 to T - 1, as read from a cache of that mode."""
    with torch.no_grad():
        parts = [
            _stored(x[:, :, at : at + PAGE], mode.at(at // PAGE)[values]) for at in range(0, x.shape[2], PAGE)
        ]
    return straight_through(x, torch.cat(parts, dim=2))


def _stored(x: Tensor, side: Side, seed: int = kv_modes.SIGN_SEED) -> Tensor:
    if not side.packed:
        return x.half().float() if side.name == "f16" else x
    n = x.shape[-1]
    signs = torch.from_numpy(kv_modes.signs(n, seed))
    y = hadamard(x * signs, kv_modes.run_of(n))
    size = y.abs().amax(dim=-1) if side.rule == "amax" else y.square().mean(dim=-1).sqrt()
    codes = kv_modes.e5m3(np.float32(side.factor) * size.numpy(), up=not side.levels)
    scale = torch.from_numpy(kv_modes.e5m3_value(codes))[..., None]
    u = torch.where(scale > 0, y / torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(y))
    if side.levels:
        levels = torch.tensor(side.levels, dtype=torch.float32)
        u = levels[torch.bucketize(u, (levels[1:] + levels[:-1]) / 2)]
    else:
        u = torch.round(u).clamp(-127, 127)
    near = u * scale
    if side.second:
        near += _stored(y - near, side.second, kv_modes.REST_SEED)
    return hadamard(near, kv_modes.run_of(n)) * signs


def hadamard(x: Tensor, run: int) -> Tensor:
    """H x / sqrt(run) of every run of columns, H the Hadamard matrix in Sylvester's order."""
    y, apart = x.reshape(-1, x.shape[-1]), 1
    rows = y.shape[0]
    while apart < run:
        a, b = y.reshape(rows, -1, 2, apart).unbind(dim=2)
        y, apart = torch.stack([a + b, a - b], dim=2).reshape(rows, -1), 2 * apart
    return (y / run**0.5).reshape(x.shape)
