"""What a training was asked for, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.recipe import HEADS, Recipe, Storage, base, head
from halfbyte.formats import kv_modes
from halfbyte.formats.encodings import BY_NAME
from halfbyte.formats.errors import UsageError
from halfbyte.formats.ops import BY_NAME as OP

# Recipe -> storage of every matrix but, where `converter.recipe.head` says so, that which makes the logits.
STORAGES = {
    **{name: Storage(name) for name in ("q8", "q6", "q5", "q4", "q3", "q2")},
    "ternary": Storage("i2", 64, "f16"),
}
# The fewer bits, the further weights have to go; the more, the less noise the codes bear.
RATES = {2: 0.01, 3: 0.002}
RATE = 0.001  # of 4 bits and more
POLICIES = ("i8g32", "f32")
STARTS = ("auto", "gptq", "rtn")
RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 1 << 31),
    "batch": (1, 1 << 16),
    "length": (2, 512),
    "lr": (1e-9, 1),
    "warmup": (0, 1),
    "ce": (0, 1e6),
    "freeze": (0, 1),
    "lora_rank": (0, 1 << 16),
    "own_text": (0, 1 << 20),
    "every": (1, 1 << 31),
    "patience": (0, 1 << 31),
    "seed": (0, 1 << 31),
    "threads": (1, 1024),
}


@dataclass(frozen=True)
class Options:
    """Everything that decides the result, with its defaults.

    recipe: see STORAGES. steps, batch (sequences), length (tokens of one). lr: the peak of the learning rate, as a
    share of each tensor's root mean square, so that one value fits tensors and models of any scale (None: RATES, by
    the recipe's bits); it rises linearly over the share `warmup` of the steps and falls as a cosine. ce: weight of the
    cross entropy with the text beside the KL divergence from the float model. freeze: share of the steps after which
    scales no longer change and codes that oscillate are frozen. lora_rank: train low-rank changes of the weights, 0
    for the weights themselves. policy: round activations as i8g32 does, or not (f32); kv: round keys and values as
    this mode, '' for not at all. start: codes and scales to start from, 'rtn' or 'gptq' (calibrated on the first
    text); auto is gptq above 2 bits where it can. own_text: sequences that the float model writes itself, if it has a
    tokenizer, beside those of the texts (`qat.text.sequences`). every: steps between two measurements on held-out text
    and checkpoints; patience: of them without improvement that stop the training, 0 for none.
    """

    recipe: str = "q4"
    steps: int = 1500
    batch: int = 2
    length: int = 512
    lr: float | None = None
    warmup: float = 0.05
    ce: float = 0.005
    freeze: float = 0.8
    lora_rank: int = 0
    policy: str = "i8g32"
    kv: str = ""
    start: str = "auto"
    own_text: int = 1024
    every: int = 100
    patience: int = 0
    seed: int = 0
    threads: int = 1

    def check(self) -> None:
        """Raise UsageError for a value that makes no sense."""
        if base(self.recipe) not in STORAGES:
            known = ", ".join(STORAGES)
            raise UsageError(
                f"recipe {self.recipe!r} is not one to train: there are {known}, each also with +,"
                f" and {', '.join(f'{n}-' for n in HEADS)}"
            )
        if self.policy not in POLICIES:
            raise UsageError(f"unknown arithmetic policy {self.policy!r}; there are {', '.join(POLICIES)}")
        if self.start not in STARTS:
            raise UsageError(f"training starts from {', '.join(STARTS)}, not from {self.start!r}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(
                    f"{name.replace('_', '-')} must lie between {low:g} and {high:g}, not {value:g}"
                )
        if self.kv:
            kv_modes.by_cache(self.kv, 1 << 12)

    @property
    def rate(self) -> float:
        """The peak of the learning rate."""
        bits = BY_NAME[STORAGES[base(self.recipe)].encoding].bits
        return RATES.get(bits, RATE) if self.lr is None else self.lr

    def facts(self) -> dict[str, object]:
        """The options by name."""
        return asdict(self) | {"lr": self.rate}


def source_recipe() -> Recipe:
    """The recipe that a builder starts with: codes that arrive quantised are kept."""
    return Recipe("keep")


def store(b: Builder, recipe: str) -> None:
    """Give every float matrix of a builder its storage under a recipe. Raises UsageError when there is none."""
    storage = STORAGES[base(recipe)]
    records, _, _ = b.finish()
    last = int(records[records["code"] == OP["linear"].code][-1]["w"][0])
    trained = 0
    for i, t in enumerate(b.tensors):
        if isinstance(t, Matrix) and not t.storage.packed:
            given = head(recipe, storage) if i == last else storage
            b.tensors[i] = Matrix(t.name, t.sources, t.shape, given)
            trained += 1
    if not trained:
        raise UsageError("the checkpoint is quantised already: there are no float weights to train")
