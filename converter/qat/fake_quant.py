"""Fake-quantised matrices: forward they are what a file decodes to, bit for bit; backward they learn.

A matrix is float weights w and a multiplier p of every group's stored scale, both trained. Forward computes what the
file will hold (SPEC.md section 5) and multiplies it out in the order that decoding does:

    s = what the format can store near p * s0      (q family: row scale * odd sub-scale; else a float16)
    x = w / s,  l = the level nearest to x (+ the group's shift),  w_hat = s * l

The gradient passes rounding straight through (Bengio et al., arXiv 1308.3432), with ends a <= x <= b beyond which a
weight is clipped:

    dL/dw = g inside, 0 outside          dL/ds = sum over the group of g * (l - x inside, l outside) / sqrt(n * Q)

g = dL/dw_hat, n the weights of a group, Q the largest level. LSQ (Esser et al., arXiv 1902.08153), for 3 bits and more,
has a and b at the outer levels. Stretched elastic quantisation (SEQ; ParetoQ, arXiv 2502.02631), for 2 bits and
ternary, divides a range evenly among the levels, so that each outer level owns as much as an inner one: a and b lie
.99 of half a step beyond the outer levels. ParetoQ's grids are {+-1/4, +-3/4} and {0, +-2/3} of the range; ours are the
levels of the encoding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.converter.quantizers import _planes
from halfbyte.formats import encodings
from halfbyte.formats.errors import CheckpointError

Planes = dict[str, np.ndarray]

STRETCH = 0.99  # of half a step, ParetoQ's clipping at .99
STRETCHED_BITS = 2  # encodings of up to so many bits are trained by SEQ
MARGIN = 0.15  # of the range of a code, kept clear on both sides of a weight that starts from a given code
TERNARY_RATIOS = np.linspace(0.3, 1.0, 29)  # scales of a group to choose from, in units of its largest value
FEW = 8  # levels that are faster compared with one by one than searched
LEAST, MOST = 2.0**-24, 65504.0  # float16


class _Round(torch.autograd.Function):
    """(w, s) -> w_hat as the module's docstring says; everything is [rows, groups, width] or [rows, groups, 1]."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, s: Tensor, stored: Tensor, level: Tensor, inside: Tensor, slope: Tensor, q: float
    ) -> Tensor:
        """stored: s as the format has it; level: chosen, with shift; inside: bool, not clipped; slope: dw_hat/ds."""
        ctx.save_for_backward(inside, slope)
        ctx.factor = 1.0 / (w.shape[2] * q) ** 0.5
        return stored * level

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of w and s."""
        inside, slope = ctx.saved_tensors
        (g,) = grads
        return g * inside, (g * slope).sum(dim=2, keepdim=True) * ctx.factor, None, None, None, None, None


class FakeQuant(nn.Module):
    """A matrix of a code encoding under training. Calling it gives float32[rows, cols], exactly as a file decodes.

    weight: float32[rows, cols]; encoding: of the q family, q8, or a symmetric one with float16 scales; rank: train only
    weight = W + A B with A [rows, rank] (LoRA, arXiv 2106.09685, under the quantiser as in LR-QAT, arXiv 2406.06385).
    planes: codes and scales to start from, such as GPTQ's; by default each weight at its nearest. Weights begin where
    they are, or where they are not rounded to the given code at the nearest place inside its range (`MARGIN`).
    """

    levels: Tensor
    middles: Tensor
    row: Tensor
    unit: Tensor
    shifted: Tensor
    start: Tensor
    weight: Tensor
    frozen: Tensor
    held: Tensor
    turn: Tensor
    often: Tensor
    average: Tensor

    def __init__(
        self,
        weight: np.ndarray,
        encoding: str,
        group: int = 32,
        rank: int = 0,
        seed: int = 0,
        planes: Planes | None = None,
    ):
        super().__init__()
        e = encodings.BY_NAME[encoding]
        self.encoding, self.sub7, self.shift = encoding, e.row_scale, e.shift
        self.rows, self.cols = weight.shape
        self.width = e.group or group or self.cols
        self.ternary = encoding == "i2"
        given = planes
        if planes is None and self.ternary:
            planes = ternary(weight, self.width)
        elif planes is None:
            planes = _planes.nearest(weight, encoding, self.width)
        levels, codes = _planes._table(encoding)
        if self.ternary:
            levels, codes = levels[1:], codes[1:]
        self.code_of, self.code_type = codes, planes["codes"].dtype
        self.q = float(np.abs(levels).max())
        steps = (levels[1] - levels[0], levels[-1] - levels[-2])
        stretch = STRETCH / 2 if e.bits <= STRETCHED_BITS else 0.0
        self.low, self.high = float(levels[0] - stretch * steps[0]), float(levels[-1] + stretch * steps[1])
        self.constant("levels", levels.astype(np.float32))
        self.constant("middles", ((levels[1:] + levels[:-1]) / 2).astype(np.float32))
        if self.sub7:
            k = (planes["scales"] & 254).astype(np.float32) - 127
            self.constant("row", planes["row"])
            self.constant("unit", encodings.e6m2_decode(planes["row"])[:, None])
            self.constant("shifted", planes["scales"] & 1)
        else:
            k = planes["scales"].astype(np.float32)
        self.constant("start", k)
        self.factor = nn.Parameter(torch.ones(k.shape))
        w = torch.from_numpy(np.array(weight, np.float32))
        if given is not None:
            w = self.towards(w, planes["codes"])
        self.rank = rank
        if rank:
            random = torch.Generator().manual_seed(seed)
            self.register_buffer("weight", w)
            self.a = nn.Parameter(torch.zeros(self.rows, rank))
            self.b = nn.Parameter(torch.randn(rank, self.cols, generator=random) / rank**0.5)
        else:
            self.weight = nn.Parameter(w)
        self.choice: Tensor | None = None  # ranks of the last forward, [rows, groups, width]
        self.tracks = False

    def constant(self, name: str, values: np.ndarray) -> None:
        """A buffer."""
        self.register_buffer(name, torch.from_numpy(np.array(values)))

    @torch.no_grad()
    def towards(self, w: Tensor, codes: np.ndarray) -> Tensor:
        """w, moved inside the range of weights that round to `codes`."""
        order = np.zeros(256, np.int64)
        order[self.code_of.astype(np.int64) & 255] = np.arange(len(self.code_of))
        chosen = torch.from_numpy(order[codes.astype(np.int64) & 255])
        _, stored, shift = self.scale()
        group = torch.arange(self.cols) // self.width
        s, shift = stored[:, group], shift[:, group]
        edges = torch.cat([self.levels[:1] * 1.5, self.middles, self.levels[-1:] * 1.5])
        low, high = edges[chosen], edges[chosen + 1]
        margin = MARGIN * (high - low)
        x = w / torch.where(s == 0, torch.ones_like(s), s) - shift
        return torch.where(s == 0, w, s * (x.clamp(low + margin, high - margin) + shift))

    def latent(self) -> Tensor:
        """The float weights that are rounded."""
        return self.weight + self.a @ self.b if self.rank else self.weight

    def scale(self) -> tuple[Tensor, Tensor, Tensor]:
        """(s as trained, s as stored, shift), each [rows, groups]."""
        wanted = self.start * self.factor
        if self.sub7:
            return wanted * self.unit, self.unit * self.odd(), self.shifted.float() * self.shift
        near = wanted.detach().clamp(-MOST, MOST)
        near = torch.where((near.abs() < LEAST) & (self.start != 0), torch.full_like(near, LEAST), near)
        return wanted, near.half().float(), torch.zeros_like(near)

    def odd(self) -> Tensor:
        """Sub-scales of the q family, nearest odd numbers in +-127 that keep their sign."""
        size = (self.start * self.factor.detach().abs()).abs()
        return (2 * torch.round((size - 1) / 2) + 1).clamp(1, 127) * torch.sign(self.start)

    def nearest(self, x: Tensor) -> Tensor:
        """Ranks of the levels nearest to x, int32."""
        if len(self.middles) > FEW:
            return torch.bucketize(x, self.middles, out_int32=True)
        rank = torch.zeros(x.shape, dtype=torch.uint8)
        for middle in self.middles.tolist():
            rank += x > middle
        return rank.int()

    def forward(self) -> Tensor:
        """w_hat, float32[rows, cols]."""
        wanted, stored, shift = self.scale()
        w = self.latent()
        groups = wanted.shape[1]
        pad = groups * self.width - self.cols
        if pad:
            w = nn.functional.pad(w, (0, pad))
        w = w.view(self.rows, groups, self.width)
        stored, shift = stored[:, :, None], shift[:, :, None]
        with torch.no_grad():
            ratio = w / torch.where(stored == 0, torch.ones_like(stored), stored)
            x = ratio - shift
            choice = self.nearest(x)
            if self.tracks:
                choice = torch.where(self.frozen, self.held, choice)
            self.choice = choice
            level = self.levels.index_select(0, choice.flatten()).view(choice.shape) + shift
            inside = (x >= self.low) & (x <= self.high)
            slope = level - ratio * inside
        out = _Round.apply(w, wanted[:, :, None], stored, level, inside, slope, self.q)
        if self.tracks and self.frozen.any():
            out = torch.where(self.frozen, out.detach() + 0 * out, out)
        return out.reshape(self.rows, -1)[:, : self.cols]

    # ---- freezing -------------------------------------------------------------------------------

    def freeze_scales(self) -> None:
        """Scales stay as they are from now on, and codes that oscillate are watched (`freeze_codes`)."""
        self.factor.requires_grad_(False)
        self.factor.grad = None
        shape = (self.rows, self.start.shape[1], self.width)
        for name, kind in (("frozen", torch.bool), ("held", torch.int16), ("turn", torch.int8)):
            self.register_buffer(name, torch.zeros(shape, dtype=kind))
        self.register_buffer("often", torch.zeros(shape))
        self.register_buffer("average", torch.zeros(shape))
        with torch.no_grad():
            self()
        assert self.choice is not None
        self.held.copy_(self.choice)
        self.average.copy_(self.choice)
        self.tracks = True

    @torch.no_grad()
    def freeze_codes(self, threshold: float, momentum: float = 0.02) -> None:
        """After a step: freeze codes that went back and forth more often than `threshold` times a step, on average.

        Nagel et al., Overcoming oscillations in quantization-aware training (arXiv 2203.11086): a code oscillates when
        it changes in the direction opposite to its last change; frozen, it stays at its running mean.
        """
        assert self.choice is not None and self.tracks
        moved = torch.sign(self.choice - self.held).to(torch.int8)
        back = (moved != 0) & (moved == -self.turn)
        self.turn.copy_(torch.where(moved != 0, moved, self.turn))
        self.often.mul_(1 - momentum).add_(back.float(), alpha=momentum)
        self.average.mul_(1 - momentum).add_(self.choice.float(), alpha=momentum)
        stops = (self.often > threshold) & ~self.frozen
        self.held.copy_(
            torch.where(stops, torch.round(self.average).to(torch.int16), self.choice.to(torch.int16))
        )
        self.frozen |= stops

    # ---- the result -----------------------------------------------------------------------------

    @torch.no_grad()
    def planes(self) -> Planes:
        """What a file stores: codes [rows, cols], scales [rows, groups] and, of the q family, row [rows].

        Raises CheckpointError where training went astray.
        """
        if not all(torch.isfinite(p).all() for p in self.parameters()):
            raise CheckpointError("training diverged: weights are not finite; lower --lr")
        self()
        assert self.choice is not None
        choice = self.choice.reshape(self.rows, -1)[:, : self.cols].numpy()
        _, stored, _ = self.scale()
        out = {"codes": self.code_of[choice].astype(self.code_type)}
        if self.sub7:
            out["scales"] = ((self.odd().numpy().astype(np.int64) + 127) | self.shifted.numpy()).astype(
                np.uint8
            )
            out["row"] = self.row.numpy().copy()
        else:
            out["scales"] = stored.numpy().astype(np.float16)
        return out


def ternary(w: np.ndarray, width: int) -> Planes:
    """Codes and float16 scales of encoding i2 with levels -1, 0, 1: of TERNARY_RATIOS the least squared error."""
    rows, cols = w.shape
    groups = -(-cols // width)
    x = np.zeros((rows, groups * width), np.float32)
    x[:, :cols] = w
    x = x.reshape(rows, groups, width)
    top = np.abs(x).max(axis=2, keepdims=True)
    best, scales = np.full(top.shape, np.inf), np.zeros(top.shape, np.float16)
    with np.errstate(over="ignore"):
        for ratio in TERNARY_RATIOS:
            s = (top * ratio).astype(np.float16)
            level = np.clip(np.rint(x / np.where(s == 0, 1, s)), -1, 1)
            error = ((x - s * level) ** 2).sum(axis=2, keepdims=True)
            scales, best = np.where(error < best, s, scales), np.minimum(best, error)
    if not np.isfinite(scales).all():
        raise CheckpointError(f"a weight of magnitude {float(top.max()):.4g} does not fit ternary; use q2")
    codes = np.clip(np.rint(x / np.where(scales == 0, 1, scales).astype(np.float32)), -1, 1) + 2
    return {"codes": codes.reshape(rows, -1)[:, :cols].astype(np.uint8), "scales": scales[:, :, 0]}
