"""A tiny model with a tokenizer, made on the spot: byte-level BPE of 300 tokens, random weights."""

import json
from pathlib import Path

from tiny import load_case, write_folder

TEXT = "Once upon a time there was a little robot. It liked to count: one, two, three. The end.\n" * 8
VOCAB = 320  # more rows than tokens, as padded embeddings have


def story_folder(folder: Path, template: str | None = None, context: int = 128, **config: object) -> Path:
    """A Hugging Face folder of a llama with BOS id 0 and EOS id 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    case = load_case("llama-tied")
    shapes = {n: (VOCAB, s[1]) if "embed_tokens" in n else s for n, s in case.shapes.items()}
    base = {**case.config, "vocab_size": VOCAB, "max_position_embeddings": context}
    write_folder(folder, {**base, "bos_token_id": 0, "eos_token_id": 1, **config}, shapes, seed=11)
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    if template:
        options["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder
