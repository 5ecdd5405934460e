"""Sessions: going back, branching, saving, and the promise that chunks and threads change nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny import load_case

import halfbyte
from halfbyte.formats import kv_modes
from halfbyte.formats.container import File
from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.lockstep import lockstep
from halfbyte.runtime.model import Model
from halfbyte.runtime.session import Session

# q8 and q4 exercise the integer kernels, f32 the float ones; gemma3 has windows, caps off, GQA of one
CASES = [("gemma3-plain", "q4"), ("qwen2-window", "q8"), ("llama-plain", "f32"), ("olmo2-plain", "q4")]

PACKED = [name for name in kv_modes.MODES if kv_modes.mode(name).packed]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny model."""
    name, recipe = request.param
    folder = tmp_path_factory.mktemp(name)
    load_case(name).write_folder(folder / "c")
    return halfbyte.convert(folder / "c", folder / "m.hb", recipe=recipe)


@pytest.fixture
def model(path: Path, backend: str) -> Model:
    """The model on one backend."""
    return halfbyte.load(path, backend=backend)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One converted tiny model for what is tested in every kv mode."""
    folder = tmp_path_factory.mktemp("small")
    load_case("gemma3-plain").write_folder(folder / "c")
    return halfbyte.convert(folder / "c", folder / "m.hb", recipe="q8")


@pytest.mark.parametrize("mode", [*PACKED, "k8vt1", "tq3,0=k8v8,-1=k8v4", "tq3,0=kq4v8"])
def test_packed_modes_keep_the_promises(small: Path, backend: str, mode: str, tmp_path: Path) -> None:
    """Chunks, threads, going back, branching and saving change no bit, over two pages."""
    model = halfbyte.load(small, backend=backend, kv=mode, threads=1)
    ids = prompt(model, 110)
    whole = model.session()
    want = whole.feed_all(ids, chunk=len(ids))
    for threads, chunk in ((1, 5), (3, 37)):
        other = halfbyte.load(small, backend=backend, kv=mode, threads=threads)
        same(other.session().feed_all(ids, chunk=chunk), want)
    whole.feed(prompt(model, 10, seed=1))
    whole.rewind(50)
    branch = whole.fork()
    branch.feed(prompt(model, 30, seed=2))
    same(whole.feed_all(ids[70:]), want[70:])
    whole.save(tmp_path / "s")
    again = Session.load(model, tmp_path / "s")
    again.rewind(3)
    same(again.feed_all(ids[-3:]), want[-3:])


@pytest.mark.parametrize("mode", PACKED)
def test_packed_modes_agree_with_the_reference(small: Path, backend: str, mode: str) -> None:
    """Op by op, beyond the first page."""
    outcomes = {o.op: o for o in lockstep(File(small), backend, "i8g32", kv=mode)}
    assert all(o.ok for o in outcomes.values()), [o for o in outcomes.values() if not o.ok]
    assert outcomes["attend"].worst < 2.0**-6


def prompt(model: Model, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.vocab_size, n).tolist()


def same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.tobytes() == b.tobytes()


def test_chunks_do_not_change_a_bit(model: Model) -> None:
    ids = prompt(model, 45)
    want = model.session().feed_all(ids, chunk=len(ids))
    for chunk in (1, 7, 32):
        same(model.session().feed_all(ids, chunk=chunk), want)
    same(model.session().feed(ids), want[-1])


def test_threads_do_not_change_a_bit(path: Path, backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference has no threads of its own")
    results = []
    for threads in (1, 2, 3, 4):
        m = halfbyte.load(path, backend=backend, threads=threads)
        results.append(m.session().feed_all(prompt(m, 45)))
    for r in results[1:]:
        same(r, results[0])


def test_sessions_in_one_step_do_not_touch_each_other(model: Model) -> None:
    """Rows of three sessions, at different positions, in one step, equal each session alone."""
    parts = [prompt(model, n, seed=n) for n in (3, 11, 20)]
    alone = [model.session().feed(p) for p in parts]
    sessions = [model.session() for _ in parts]
    for s, p in zip(sessions, parts):
        s.feed(p[:-2])
        s.kv.reserve(len(p))
    ids = np.array([t for p in parts for t in p[-2:]], np.int32)
    positions = np.array([i for p in parts for i in (len(p) - 2, len(p) - 1)], np.int32)
    order = np.array([1, 3, 5], np.int32)
    step = Step(ids, positions, np.repeat(np.arange(3, dtype=np.int32), 2), order, [s.kv for s in sessions])
    for got, want in zip(model.run(step), alone):
        same(got, want)


def test_rewind_and_fork_equal_a_fresh_start(model: Model) -> None:
    ids = prompt(model, 30)
    want = model.session().feed(ids)
    s = model.session()
    s.feed(ids[:20])
    branch = s.fork()
    s.feed(prompt(model, 9, seed=5))
    s.rewind(9)
    assert s.position == 20 and s.ids == ids[:20]
    same(s.feed(ids[20:]), want)
    same(branch.feed(ids[20:]), want)
    s.rewind(30)
    same(s.feed(ids), want)


def test_windows_that_slid_on(model: Model, tmp_path: Path) -> None:
    """Going back beyond what a window still holds, forking and saving there: the same as a fresh start."""
    n = min(model.context_length, 190)
    ids = prompt(model, n)
    s, back = model.session(), n - 20
    s.feed(ids[: n - 5], chunk=9)
    s.save(tmp_path / "s")
    for other in (s.fork(), Session.load(model, tmp_path / "s")):
        same(other.feed(ids[n - 5 :]), model.session().feed(ids))
        other.rewind(back)
        assert other.ids == ids[: n - back]
        same(other.feed(ids[n - back : n - back + 3]), model.session().feed(ids[: n - back + 3]))
    same(s.feed(ids[n - 5 :]), model.session().feed(ids))


def test_save_and_load(model: Model, tmp_path: Path) -> None:
    ids = prompt(model, 25)
    s = model.session()
    s.feed(ids[:20])
    s.save(tmp_path / "s")
    again = Session.load(model, tmp_path / "s")
    assert again.ids == ids[:20]
    same(again.feed(ids[20:]), s.feed(ids[20:]))
    empty = model.session()
    empty.save(tmp_path / "e")
    same(Session.load(model, tmp_path / "e").feed(ids), s.model.session().feed(ids))


def test_concurrent_sessions(model: Model) -> None:
    prompts = [prompt(model, 12, seed=i) for i in range(6)]
    want = [model.session().feed(p) for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        for got, w in zip(pool.map(lambda p: model.session().feed(p), prompts), want):
            same(got, w)


def test_refusals_leave_the_session_unchanged(path: Path, tmp_path: Path) -> None:
    m = halfbyte.load(path, backend="reference")
    s = m.session()
    s.feed([1, 2, 3])
    bad = [[], [m.vocab_size], [-1], [0] * m.context_length]
    for ids in bad:
        with pytest.raises(UsageError):
            s.feed(ids)
    for n in (4, -1):
        with pytest.raises(UsageError):
            s.rewind(n)
    with pytest.raises(UsageError):
        s.feed([1], chunk=0)
    assert s.ids == [1, 2, 3]
    same(s.feed([4]), m.session().feed([1, 2, 3, 4]))


def test_session_files_of_other_models_and_damage_are_refused(path: Path, tmp_path: Path) -> None:
    m = halfbyte.load(path, backend="reference", kv="f32")
    s = m.session()
    s.feed([1, 2, 3])
    s.save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    with pytest.raises(HalfbyteError, match="kv"):
        Session.load(halfbyte.load(path, backend="reference", kv="f16"), tmp_path / "s")
    for name, changed, why in (
        ("flip", data[:70] + bytes([data[70] ^ 1]) + data[71:], "damaged"),
        ("cut", data[:-1], "damaged"),
        ("short", data[:20], "not a session"),
        ("magic", b"x" + data[1:], "not a session"),
    ):
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(HalfbyteError, match=why):
            Session.load(m, tmp_path / name)
    with pytest.raises(HalfbyteError, match="No such file"):
        Session.load(m, tmp_path / "absent")
    load_case("granite-plain").write_folder(tmp_path / "c")
    other = halfbyte.load(halfbyte.convert(tmp_path / "c", tmp_path / "o.hb"), backend="reference", kv="f32")
    with pytest.raises(HalfbyteError, match="another model"):
        Session.load(other, tmp_path / "s")
