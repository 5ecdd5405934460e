"""AutoRound's side of compare_quality.py, run by an interpreter that has auto-round (and torch, transformers).

    PYTHON engine_auto_round.py CHECKPOINT OUT IDS.npy [--group 32] [--iterations 200]

Writes the checkpoint with 4-bit symmetric codes in auto-round's own format; the embedding stays as it is, since
auto-round rounds none. IDS are token ids to calibrate on, [sequences, length].
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


class Batches(list):
    """What AutoRound takes for a data loader."""

    batch_size = BATCH


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("ids")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args()
    ids = np.load(args.ids)
    quantizer = AutoRound(
        AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32),
        AutoTokenizer.from_pretrained(args.checkpoint),
        bits=4, group_size=args.group, sym=True, iters=args.iterations, nsamples=len(ids), seqlen=ids.shape[1],
        batch_size=BATCH, dataset=Batches(torch.tensor(ids[i : i + BATCH]) for i in range(0, len(ids), BATCH)),
        device_map="cpu", amp=False, enable_torch_compile=False,
    )  # fmt: skip
    quantizer.quantize_and_save(args.out, format="auto_round")


if __name__ == "__main__":
    main()
