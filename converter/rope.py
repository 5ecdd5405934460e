"""Rotary frequencies: every scaling scheme becomes a plain table here, so that the runtime knows one op.

Sources: RoFormer (2104.09864); linear position interpolation (2306.15595); YaRN (2309.00071); Llama 3.1's
frequency bands and LongRoPE (2402.13753) as their published configurations define them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.converter.config import Config
from halfbyte.formats.errors import CheckpointError


@dataclass(frozen=True)
class Rope:
    """inv_freq float32[rotary / 2], in radians a position; mscale multiplies cosine and sine."""

    inv_freq: np.ndarray
    mscale: float
    context: int | None = None  # positions beyond which the table is not meant to be used


def parameters(config: Config, layer_type: str | None = None) -> dict[str, Any]:
    """The rope parameters as one dict with `rope_type` and `rope_theta`, whichever way they are written.

    Published checkpoints have `rope_theta` and `rope_scaling`; newer ones nest both in
    `rope_parameters`, some of them once per layer type.
    """
    nested = config.get("rope_parameters")
    if isinstance(nested, dict):
        if layer_type is not None and isinstance(nested.get(layer_type), dict):
            nested = nested[layer_type]
        out = dict(nested)
        out.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    else:
        out = dict(config.get("rope_scaling") or {})
        out["rope_theta"] = config.get("rope_theta", 10000.0)
        if layer_type == "sliding_attention" and config.get("rope_local_base_freq") is not None:
            out = {"rope_theta": config.get("rope_local_base_freq")}
    out["rope_type"] = out.get("rope_type") or out.get("type") or "default"
    return out


def rope(config: Config, head_dim: int, layer_type: str | None = None) -> Rope:
    """The table for `head_dim` columns a head (fewer with partial_rotary_factor).

    Raises CheckpointError for a scheme that is not supported or a parameter that makes no sense.
    """
    p = Config(parameters(config, layer_type))
    rotary = int(head_dim * p.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)))
    theta = p.number("rope_theta")
    if not 2 <= rotary <= head_dim or rotary % 2 or theta <= 0:
        raise CheckpointError(f"config.json: {rotary} rotary columns with base {theta} make no sense")
    exponent = np.arange(0, rotary, 2, dtype=np.float64) / rotary
    base = theta**-exponent
    kind = p.get("rope_type", "default")
    if kind == "default":
        scaled = Rope(base, 1.0)
    elif kind == "linear":
        scaled = Rope(base / p.number("factor"), 1.0)
    elif kind == "llama3":
        scaled = Rope(_llama3(base, p, config), 1.0)
    elif kind == "yarn":
        scaled = _yarn(base, rotary, theta, p, config)
    elif kind in ("longrope", "su"):
        scaled = _longrope(base, p, config)
    else:
        raise CheckpointError(
            f"config.json: rope type {kind!r} is not supported (default, linear, llama3, yarn, longrope)"
        )
    factors = config.get("rope_freq_factors")  # GGUF stores llama3 and longrope as divisors
    inv_freq = scaled.inv_freq
    if factors is not None and kind in ("default", "llama3"):
        if len(factors) != rotary // 2:
            raise CheckpointError(f"rope_freqs has {len(factors)} factors, expected {rotary // 2}")
        inv_freq = base / np.asarray(factors, np.float64)
    return Rope(inv_freq.astype(np.float32), scaled.mscale, scaled.context)


def _original_length(p: Config, config: Config) -> int:
    """The trained length: a top-level key wins over the rope dict's."""
    longest = config.integer("max_position_embeddings", 2048)
    inner = p.integer("original_max_position_embeddings", longest)
    return config.integer("original_max_position_embeddings", inner)


def _llama3(base: np.ndarray, p: Config, config: Config) -> np.ndarray:
    factor, low, high = p.number("factor"), p.number("low_freq_factor"), p.number("high_freq_factor")
    original = _original_length(p, config)
    wavelength = 2 * math.pi / base
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 - smooth) * base / factor + smooth * base


def _yarn(base: np.ndarray, rotary: int, theta: float, p: Config, config: Config) -> Rope:
    original = _original_length(p, config)
    factor = p.number("factor", config.integer("max_position_embeddings") / original)

    def scale(f: float, m: float = 1.0) -> float:
        return 0.1 * m * math.log(f) + 1.0 if f > 1 else 1.0

    mscale = p.get("attention_factor")
    if mscale is None:
        if p.get("mscale") and p.get("mscale_all_dim"):
            mscale = scale(factor, p.number("mscale")) / scale(factor, p.number("mscale_all_dim"))
        else:
            mscale = scale(factor)

    def column(rotations: float) -> float:
        return rotary * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = column(p.number("beta_fast", 32.0)), column(p.number("beta_slow", 1.0))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    ramp = np.clip((np.arange(rotary // 2) - low) / max(high - low, 0.001), 0, 1)
    return Rope(base / factor * ramp + base * (1 - ramp), float(mscale))


def _longrope(base: np.ndarray, p: Config, config: Config) -> Rope:
    """Two tables, chosen by the length that will be run: short up to the trained length, long beyond it.

    The choice is made here, once: `halfbyte_context` (from `--context`) beyond the trained length takes
    the long factors, anything else the short ones.
    """
    longest = config.integer("max_position_embeddings")
    trained = _original_length(p, config)
    wanted = config.get("halfbyte_context", trained)
    factors = p.get("long_factor" if wanted > trained else "short_factor")
    if not isinstance(factors, list) or len(factors) != len(base):
        raise CheckpointError(f"config.json: longrope needs {len(base)} factors")
    mscale = p.get("attention_factor")
    if mscale is None:
        factor = p.get("factor") or longest / trained
        mscale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    context = longest if wanted > trained else trained
    return Rope(base / np.asarray(factors, np.float64), float(mscale), context)
