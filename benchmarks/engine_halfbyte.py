"""halfbyte as a worker of the comparisons; see compare_worker.py."""

from __future__ import annotations

from typing import Any

import compare_worker


class Halfbyte:
    """A `.hb` file through the public session."""

    def load(self, lengths: list[int], **options: Any) -> dict[str, Any]:
        """`halfbyte.load`'s options; lengths: those to report the bytes of keys and values read for."""
        import halfbyte
        from halfbyte.devices.fit import of_file
        from halfbyte.runtime.bench import commit

        self.model = model = halfbyte.load(**options)
        asks = of_file(model.file)
        return {
            "vocab_size": model.vocab_size,
            "version": f"halfbyte {halfbyte.__version__} ({commit()})",
            "cache": model.kv_mode,
            "weight_bytes": asks.read,
            "kv_bytes": {n: asks.kv_read(n, model.kv_mode) for n in lengths},
            "prefill_macs": asks.prefill_macs,
            **model.backend.describe(),
        }

    def fill(self, ids: list[int], depths: list[int], room: int) -> dict[int, Any]:
        """One session is filled; each depth keeps a copy of it."""
        session, caches = self.model.session(), {}
        for depth in depths:
            if depth > session.position:
                session.feed(ids[session.position : depth])
            caches[depth] = session.fork()
        return caches

    def feed(self, cache: Any, ids: list[int]) -> float:
        """See Engine."""
        return float(cache.feed(ids)[0])

    def rewind(self, cache: Any, depth: int) -> None:
        """See Engine."""
        cache.rewind(cache.position - depth)


if __name__ == "__main__":
    compare_worker.serve(Halfbyte())
