"""Source checkpoints: one reader a format, all alike to the converter (see `checkpoint.Checkpoint`)."""

from __future__ import annotations

from pathlib import Path

from halfbyte.converter.checkpoints.checkpoint import Checkpoint, Packed, TokenizerSource
from halfbyte.formats.errors import CheckpointError

__all__ = ["Checkpoint", "Packed", "TokenizerSource", "open_checkpoint"]


def open_checkpoint(path: str | Path, tokenizer: str | Path | None = None) -> Checkpoint:
    """Open a checkpoint with the reader its content asks for.

    path       a Hugging Face folder, a GGUF file or a llama2.c .bin
    tokenizer  a tokenizer.json, sentencepiece .model, llama2.c .bin or a folder with one, used instead
               of what the checkpoint brings

    Raises CheckpointError, one line, for anything that is none of these or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        from halfbyte.converter.checkpoints.hf import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path, tokenizer)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror or error}") from None
    if magic in (b"GGUF", b"FUGG"):
        from halfbyte.converter.checkpoints.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path, tokenizer)
    if path.suffix.lower() == ".safetensors":
        raise CheckpointError(f"{path} is only the weights; give the folder that also holds its config.json")
    if magic == b"PK\x03\x04":
        raise CheckpointError(f"{path} is a zip or pickled PyTorch file; convert it to safetensors first")
    if path.suffix.lower() == ".bin":
        from halfbyte.converter.checkpoints.llama2c import Llama2cCheckpoint

        return Llama2cCheckpoint(path, tokenizer)
    raise CheckpointError(f"{path} is neither a Hugging Face folder, a GGUF file nor a llama2.c .bin")
