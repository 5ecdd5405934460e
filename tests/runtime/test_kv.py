"""Pages of keys and values: what is put is read, forks share, windows let go."""

import numpy as np
import pytest

from halfbyte.formats.errors import UsageError
from halfbyte.formats.program import CACHE_DTYPE
from halfbyte.runtime.kv import KV, PAGE

RNG = np.random.default_rng(0)
SHAPES = [(2, 16, 24, 0), (1, 5, 7, 100)]  # kv_heads, k_dim, v_dim, window


def filled(n: int, mode: str = "f16") -> tuple[KV, list[tuple[np.ndarray, np.ndarray]]]:
    """A KV of two caches with n positions, put in pieces, and what was put."""
    caches = np.array(SHAPES, CACHE_DTYPE)
    kv, kept = KV(caches, mode), []
    kv.reserve(n)
    for c, (heads, k_dim, v_dim, _) in enumerate(SHAPES):
        k, v = (RNG.standard_normal((heads, n, d)).astype(kv_type(mode)) for d in (k_dim, v_dim))
        kept.append((k, v))
        for a, z in zip((0, 3, 17, 70), (3, 17, 70, n)):
            kv.put(c, a, k[:, a:z], v[:, a:z])
    return kv, kept


def kv_type(mode: str) -> type:
    return {"f16": np.float16, "f32": np.float32}[mode]


def check(kv: KV, kept: list, end: int, cache: int = 0, start: int = 0) -> None:
    for got, want in zip(kv.read(cache, start, end), kept[cache]):
        np.testing.assert_array_equal(got, want[:, start:end])


@pytest.mark.parametrize("mode", ["f16", "f32"])
@pytest.mark.parametrize("n", [71, 128, 200])
def test_what_is_put_is_read(n: int, mode: str) -> None:
    kv, kept = filled(n, mode)
    for cache in range(2):
        for start, end in ((0, n), (1, 16), (15, 66), (63, 64), (64, n)):
            check(kv, kept, end, cache, start)
    addresses = [[p.bytes.ctypes.data for p in pages] for pages in kv.pages]
    assert kv.table[:, : len(addresses[0])].tolist() == addresses
    assert all(a % 64 == 0 for row in addresses for a in row)


def test_a_page_lies_as_the_kernels_read_it() -> None:
    kv, kept = filled(100)
    heads, k_dim, v_dim, _ = SHAPES[0]
    words = kv.pages[0][1].bytes.view(np.float16)  # type: ignore[union-attr]
    head, position = 1, 64 + 21
    base = head * PAGE * (k_dim + v_dim)
    for d in range(k_dim):
        assert words[base + (1 * k_dim + d) * 16 + 5] == kept[0][0][head, position, d]
    for d in range(v_dim):
        assert words[base + PAGE * k_dim + 21 * v_dim + d] == kept[0][1][head, position, d]
    assert heads == 2


def test_forks_share_until_one_writes() -> None:
    kv, kept = filled(100)
    fork = kv.fork(90)
    assert fork.pages[0][1] is kv.pages[0][1] and fork.pages[0][0] is kv.pages[0][0]
    for mine, value in ((fork, 1.0), (kv, 2.0)):
        mine.reserve(91, 90)
        mine.put(0, 90, np.full((2, 1, 16), value), np.full((2, 1, 24), value))
    for mine, value in ((fork, 1.0), (kv, 2.0)):
        check(mine, kept, 90)
        assert (mine.read(0, 90, 91)[0] == value).all()
    assert fork.pages[0][0] is kv.pages[0][0] and fork.pages[0][1] is not kv.pages[0][1]


def test_windows_let_go_of_what_nobody_sees() -> None:
    kv, kept = filled(200)
    kv.reserve(201, 200)
    assert kv.pages[1][0] is None and kv.table[1, 0] == 0  # the window of position 200 starts at 101
    assert kv.first(1, 200) == 64 and kv.first(0, 200) == 0
    check(kv, kept, 200, 1, 64)
    check(kv, kept, 200, 0)
    assert kv.holds(200) and kv.holds(163) and not kv.holds(162)
    assert not kv.fork(100).holds(100)


def test_truncation_gives_pages_back() -> None:
    kv, kept = filled(200)
    before = kv.nbytes
    kv.truncate(64)
    assert kv.nbytes == before // 4 and not kv.table[:, 1:].any()
    check(kv, kept, 64)
    kv.reserve(70, 64)
    check(kv, kept, 64)


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown kv mode 'q5'"):
        KV(np.array(SHAPES, CACHE_DTYPE), "q5")
