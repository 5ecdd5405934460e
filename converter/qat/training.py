"""The training loop: distillation of the float model into its fake-quantised twin, resumable at any checkpoint.

Loss a token: KL(float || fake-quantised), plus `ce` times the cross entropy with the text. AdamW (Loshchilov, Hutter,
arXiv 1711.05101) without weight decay. On one machine, with the same number of threads, a training that was stopped and
resumed computes the same numbers as one that was not.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.converter.qat.fake_quant import Planes
from halfbyte.converter.qat.graph import Graph
from halfbyte.converter.qat.options import Options
from halfbyte.converter.qat.text import Sequences, batch, padded
from halfbyte.formats.errors import HalfbyteError, UsageError

LOWEST = 0.02  # of the peak learning rate, at the end
SCALES = 0.2  # of the learning rate of weights: a scale that moves takes a whole group's codes with it
CLIP = 1.0  # largest norm of a gradient
KEPT = 0.25  # of the memory left to training: for the float model's answers, which every epoch needs
ROWS = 64  # of logits, that a loss is computed of at once
OSCILLATING = (0.04, 0.01)  # changes back and forth a step beyond which a code is frozen: at first, at last

Progress = Callable[[str, int, int], None]


@dataclass
class Result:
    """What a file is made of, and how training went.

    planes, vectors: by tensor number, at the step with the lowest held-out loss, which with KL as the loss is a far
    less noisy measure than the nll. curve: loss of every step (nats a token); measured: (step, held-out nll, KL).
    """

    planes: dict[int, Planes] = field(default_factory=dict)
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    step: int = 0
    nll: float = math.inf
    loss: float = math.inf
    curve: list[float] = field(default_factory=list)
    measured: list[tuple[int, float, float]] = field(default_factory=list)


class _Divergence(torch.autograd.Function):
    """(logits [n, V], the float model's, targets [n], ce) -> sums over rows: KL + ce * nll, KL, nll.

    In one pass over rows that stay in a cache, which also gives the gradient: softmax - p + ce * (softmax - target).
    """

    @staticmethod
    def forward(
        ctx: Any, ours: Tensor, theirs: Tensor, targets: Tensor, ce: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Only the first result has a gradient, and only by `ours`."""
        slope, sums = torch.empty_like(ours), torch.zeros(2, dtype=torch.float64)
        for i in range(0, len(ours), ROWS):
            q, log_p = (functional.log_softmax(x[i : i + ROWS], dim=-1) for x in (ours, theirs))
            p, at = log_p.exp(), targets[i : i + ROWS, None]
            sums[1] -= q.gather(1, at).sum()
            sums[0] += log_p.sub_(q).mul_(p).sum()
            q.exp_()
            torch.sub(q, p, out=slope[i : i + ROWS])
            if ce:
                slope[i : i + ROWS].add_(q.scatter_add_(1, at, -torch.ones_like(at, dtype=q.dtype)), alpha=ce)
        ctx.save_for_backward(slope)
        kl, nll = sums.float().unbind()
        ctx.mark_non_differentiable(kl, nll)
        return kl + ce * nll, kl, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient by `ours`."""
        (slope,) = ctx.saved_tensors
        return slope * grads[0], None, None, None


class Trainer:
    """Trains `student` to answer as `teacher` does; `checkpoint` is where it is kept, `identity` what it is of."""

    def __init__(
        self, student: Graph, teacher: Graph, options: Options, train: Sequences, heldout: Sequences, checkpoint: Path,
        identity: str,
    ):  # fmt: skip
        self.student, self.teacher, self.o = student, teacher, options
        self.train, self.heldout = train, heldout
        self.kept: dict[int, Tensor] = {}  # by id of the sequence
        own = 4 * sum(p.nbytes for p in student.parameters())  # gradients, two averages, weights as rounded
        self.room = int(KEPT * max(0, psutil.virtual_memory().available - own))
        self.path, self.identity = checkpoint, identity
        self.result, self.at, self.frozen = Result(), 0, False
        self.freezes = round(options.freeze * options.steps)
        groups = [{"params": [p], "size": size} for p, size in _sizes(student)]
        self.optimizer = torch.optim.AdamW(
            groups, lr=options.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )

    def run(self, progress: Progress | None = None) -> Result:
        """Train to the last step, or until nothing improves. Raises HalfbyteError when the loss is not finite."""
        o = self.o
        if self.at == 0 and not self.result.measured:
            self._measure()
        while self.at < o.steps and not self._stalled():
            if self.at == self.freezes:
                self._freeze()
            loss = self._step()
            if not math.isfinite(loss):
                raise HalfbyteError(
                    f"training diverged at step {self.at}: the loss is not finite; lower --lr"
                )
            self.result.curve.append(loss)
            self.at += 1
            if self.at % o.every == 0 or self.at == o.steps:
                self._measure()
                self.save()
            if progress:
                progress(f"nll {self.result.nll:.4f}, loss {loss:.4f}", self.at, o.steps)
        return self.result

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine down to LOWEST of the peak."""
        rise = max(1, round(self.o.warmup * self.o.steps))
        if step < rise:
            return self.o.rate * (step + 1) / rise
        done = (step - rise) / max(1, self.o.steps - rise)
        return self.o.rate * (LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * done)) / 2)

    def _step(self) -> float:
        loss, _, _, count = self.losses(batch(len(self.train), self.at, self.o.batch, self.o.seed))
        loss = loss / count
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.at) * group["size"]
        torch.nn.utils.clip_grad_norm_([p for p in self.student.parameters() if p.grad is not None], CLIP)
        self.optimizer.step()
        if self.frozen:
            done = (self.at - self.freezes) / max(1, self.o.steps - self.freezes)
            first, last = OSCILLATING
            for m in self.student.quantizers().values():
                m.freeze_codes(last + (first - last) * (1 + math.cos(math.pi * done)) / 2)
        return float(loss.detach())

    def losses(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Sums over tokens of sequences, by number: what is trained on, KL(teacher || student), nll; and their count.

        Numbers go on from those to train on to those held out.
        """
        ids, real = padded([self.sequence(i) for i in numbers])
        whole, theirs = bool(real.all()), torch.cat([self.answers(i) for i in numbers])
        ours, targets = self.student(ids[:, :-1]), ids[:, 1:]
        ours, targets = (x.flatten(0, 1) if whole else x[real] for x in (ours, targets))
        return *_Divergence.apply(ours, theirs, targets, self.o.ce), len(targets)

    def sequence(self, number: int) -> list[int]:
        """The tokens of a sequence."""
        n = len(self.train)
        return self.train[number] if number < n else self.heldout[number - n]

    @torch.no_grad()
    def answers(self, number: int) -> Tensor:
        """The float model's logits on a sequence, float32[tokens, V]; kept for the next epoch while there is room.

        Computed for each sequence alone, so that their bits do not depend on the batch, nor on what is kept.
        """
        sequence = self.sequence(number)
        found = self.kept.get(id(sequence))  # the same one may come several times in an epoch
        if found is None:
            found = self.teacher(torch.tensor([sequence[:-1]]))[0]
            if found.nbytes <= self.room:
                self.kept[id(sequence)] = found
                self.room -= found.nbytes
        return found

    @torch.no_grad()
    def _measure(self) -> None:
        sums, count = np.zeros(2), 0
        n = len(self.train)
        for i in range(n, n + len(self.heldout), self.o.batch):
            _, kl, nll, tokens = self.losses(range(i, min(i + self.o.batch, n + len(self.heldout))))
            sums += [float(kl), float(nll)]
            count += tokens
        kl, nll = sums / count
        if not math.isfinite(nll):
            raise HalfbyteError(f"training diverged at step {self.at}: the output is not finite; lower --lr")
        self.result.measured.append((self.at, float(nll), float(kl)))
        loss = float(kl + self.o.ce * nll)
        if loss < self.result.loss:
            self.result.loss, self.result.nll, self.result.step = loss, float(nll), self.at
            self.result.planes = {i: m.planes() for i, m in self.student.quantizers().items()}
            self.result.vectors = {int(i): v.detach().numpy().copy() for i, v in self.student.vectors.items()}

    def _stalled(self) -> bool:
        later = [m for m in self.result.measured if m[0] > self.result.step]
        return 0 < self.o.patience <= len(later)

    def _freeze(self) -> None:
        for m in self.student.quantizers().values():
            m.freeze_scales()
        self.frozen = True

    # ---- checkpoints ----------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint aside and rename it. Raises HalfbyteError if the disk refuses."""
        r = self.result
        state = {
            "identity": self.identity,
            "step": self.at,
            "frozen": self.frozen,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": r.curve,
            "measured": [list(m) for m in r.measured],
            "best": {
                "step": r.step,
                "nll": r.nll,
                "loss": r.loss,
                "planes": {i: {k: torch.from_numpy(a) for k, a in p.items()} for i, p in r.planes.items()},
                "vectors": {i: torch.from_numpy(v) for i, v in r.vectors.items()},
            },
        }
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            torch.save(state, aside)
            aside.replace(self.path)
        except (OSError, RuntimeError) as error:
            aside.unlink(missing_ok=True)
            raise HalfbyteError(
                f"{self.path}: cannot write: {getattr(error, 'strerror', None) or error}"
            ) from None

    def resume(self) -> None:
        """Go on from the checkpoint. Raises UsageError for one that is damaged or of another training."""
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True)
            if state["identity"] != self.identity:
                raise UsageError(
                    f"{self.path} is of a training with another source, text or options; delete it"
                )
            if state["frozen"]:
                self._freeze()
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            best = state["best"]
            self.at = int(state["step"])
            self.result = Result(
                {i: {k: a.numpy() for k, a in p.items()} for i, p in best["planes"].items()},
                {i: v.numpy() for i, v in best["vectors"].items()},
                best["step"],
                best["nll"],
                best["loss"],
                state["curve"],
                [(int(s), nll, kl) for s, nll, kl in state["measured"]],
            )
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror or error}") from None
        except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError):
            raise UsageError(f"{self.path} is damaged; delete it and start again") from None


def _sizes(student: Graph) -> list[tuple[Tensor, float]]:
    """Every parameter with the size of its values, which a step is a share of."""
    out: list[tuple[Tensor, float]] = []
    for m in student.quantizers().values():
        rms = float(m.weight.detach().square().mean().sqrt())
        if m.rank:
            out += [(m.a, rms), (m.b, m.rank**-0.5)]
        else:
            out.append((m.weight, rms))
        out.append((m.factor, SCALES))
    for v in student.vectors.values():
        out.append((v, max(float(v.detach().square().mean().sqrt()), 1e-3)))
    return out
