"""Makes `fixtures/`: quantised checkpoints of a tiny Llama, written and dequantised by independent tools.

Not a test. Run it in an environment of its own (nothing here imports halfbyte):

    pip install torch==2.13.0 transformers auto-round compressed-tensors gptqmodel gguf llama-cpp-python safetensors
    GPTQMODEL_CPU_WORKERS=2 CUDA_VISIBLE_DEVICES= python tests/converter/make_import_fixtures.py [name ...]

Each folder holds config.json, model.safetensors and expected.json: the tool and its version; for each
quantised tensor SHA-256 of its levels (code less zero point; int16 [out, in]) and of its weights (float32
[out, in]), both as the tool unpacks them, with its scales raised to float32 first; and the greedy tokens of the
float32 transformers model with these weights. `ggml-blocks.npz` holds rows as llama.cpp's library quantises
them, and what the same library makes of them again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent / "fixtures"
PROMPT, TOKENS = [1, 5, 9, 33, 17, 60, 2, 8], 16
# Levels and weights of one matrix, [out, in].
Matrix = tuple[np.ndarray, np.ndarray]
MODULES = [f"model.layers.0.{m}" for m in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj")]  # fmt: skip


def source() -> LlamaForCausalLM:
    """The float model: one layer, 64 columns, 64 words; weights large enough to matter."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=64, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(7)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.3 if "embed" in name else 1.5 / p.shape[1] ** 0.5))
    return model.to(torch.float16)


def tokenizer() -> Any:
    """64 words; the tools ask for one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))]
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def record(name: str, tool: str, matrices: dict[str, Matrix], made: Path) -> None:
    """Keep config.json and the weights that a tool wrote, and what it reads in them."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(made / file, folder / file)
        (folder / file).chmod(0o644)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    stored = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key in matrices:
                p.copy_(torch.from_numpy(matrices[key][1]))
            else:
                p.copy_(stored[key].float())
        ids, margin = list(PROMPT), np.inf
        for _ in range(TOKENS):
            logits = model(torch.tensor([ids])).logits[0, -1]
            best = logits.topk(2).values
            margin = min(margin, float(best[0] - best[1]))
            ids.append(int(logits.argmax()))
    version = importlib.metadata.version(tool)
    expected = {
        "tool": f"{tool} {version}",
        "tensors": {k: {"levels": digest(lv), "weights": digest(w)} for k, (lv, w) in matrices.items()},
        "prompt": PROMPT,
        "tokens": ids[len(PROMPT) :],
        "margin": round(margin, 6),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {version}, {size} bytes, {len(matrices)} matrices, margin {margin:.4f}", flush=True)


def as_matrix(levels: torch.Tensor, weights: torch.Tensor) -> Matrix:
    return levels.round().to(torch.int16).numpy(), weights.float().contiguous().numpy()


# ---- GPTQModel ----------------------------------------------------------------------------------


def gptqmodel(name: str, **options: Any) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import PackableQuantLinear

    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 64, (1, 64), generator=generator) for _ in range(8)]
    text = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    with tempfile.TemporaryDirectory() as place:
        float_folder, made = Path(place) / "float", Path(place) / "made"
        source().save_pretrained(float_folder)
        tokenizer().save_pretrained(float_folder)
        model = GPTQModel.load(str(float_folder), QuantizeConfig(device="cpu", **options))
        model.quantize(text, batch_size=1)
        model.save(str(made))
        loaded = GPTQModel.load(str(made), backend=BACKEND.TORCH, device="cpu")
        stored = load_file(made / "model.safetensors")
        matrices = {}
        for module_name, module in loaded.model.named_modules():
            if isinstance(module, PackableQuantLinear):
                # as stored: the loader casts them to the model's own type
                module.scales = stored[f"{module_name}.scales"].float()
                weights = PackableQuantLinear.dequantize_weight(module).T
                module.scales = torch.ones_like(module.scales)
                levels = PackableQuantLinear.dequantize_weight(module).T
                matrices[f"{module_name}.weight"] = as_matrix(levels, weights)
        record(name, "gptqmodel", matrices, made)


# ---- AutoRound ----------------------------------------------------------------------------------


def auto_round(name: str, form: str, **options: Any) -> None:
    from auto_round import AutoRound
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    with tempfile.TemporaryDirectory() as place:
        quantizer = AutoRound(
            source(), tokenizer=tokenizer(), iters=0, device_map="cpu", disable_opt_rtn=True, **options
        )
        quantizer.quantize_and_save(place, format=form)
        made = next(Path(place).rglob("model.safetensors")).parent
        config = json.loads((made / "config.json").read_text())["quantization_config"]
        packing = config.get("packing_format", config["quant_method"])
        stored = load_file(made / "model.safetensors")
        matrices = {}
        for module in MODULES:
            if f"{module}.qweight" not in stored:
                continue
            own = {**config, **config.get("extra_config", {}).get(module, {})}
            parts = {k.rpartition(".")[2]: v for k, v in stored.items() if k.startswith(module + ".")}

            def dequantized(scales: torch.Tensor, parts: Any = parts, own: Any = own) -> torch.Tensor:
                if "awq" in packing:
                    return dequantize_gemm(
                        parts["qweight"], parts["qzeros"], scales, own["bits"], own["group_size"]
                    ).T
                minus_one = packing == "gptq" or "auto_gptq" in packing
                kind = (qlinear_torch_zp if minus_one else qlinear_torch).QuantLinear
                cols = parts["qweight"].shape[0] * 32 // own["bits"]
                linear = kind(
                    own["bits"],
                    own["group_size"],
                    cols,
                    parts["qweight"].shape[1],
                    False,
                    g_idx="g_idx" in parts,
                )
                linear.load_state_dict({**parts, "scales": scales})
                linear.scales = scales
                # the matrix that it multiplies by, signs of zeros included
                with mock.patch.object(torch, "matmul", lambda x, matrix: matrix):
                    return linear(torch.eye(cols)).T

            weights, levels = (
                dequantized(parts["scales"].float()),
                dequantized(torch.ones_like(parts["scales"].float())),
            )
            matrices[f"{module}.weight"] = as_matrix(levels, weights)
        record(name, "auto-round", matrices, made)


# ---- compressed-tensors -------------------------------------------------------------------------


def compressed_tensors(
    name: str,
    form: str,
    weights: dict[str, Any],
    skip: tuple[str, ...] = (),
    scale: str = "bfloat16",
    act_order: bool = False,
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=["lm_head", *skip])
    compressor = BaseCompressor.get_value_from_registry(form)
    arguments = scheme.weights
    model = source()
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    matrices = {}
    for module in [m for m in MODULES if not m.endswith(skip or ("none",))]:
        w = state.pop(f"{module}.weight").float()
        order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(5))
        w = w[:, order] if act_order else w
        low, high = _ranges(w, arguments)
        scales, zeros = calculate_qparams(low, high, arguments)
        scales = scales.to(getattr(torch, scale))
        parts = {"weight": w, "weight_scale": scales.float(), "weight_zero_point": zeros}
        packed = compressor.compress(parts, scheme)
        float_parts = compressor.decompress(dict(packed), scheme)["weight"]
        # int16 levels by scales of one; 8-bit floats have no integer levels and are compared as float32 only
        unit = {**packed, "weight_scale": torch.ones_like(scales.float())}
        levels = compressor.decompress(unit, scheme)["weight"]
        packed["weight_scale"] = scales
        if act_order:
            inverse = torch.argsort(order)
            size = arguments.group_size
            packed["weight_g_idx"] = (inverse // size).to(torch.int32)
            # columns of one group lie in rising order, as the library's own permutation gave them
            stable = torch.argsort(packed["weight_g_idx"], stable=True)
            assert form == "pack-quantized"
            natural_levels, natural = levels[:, inverse], float_parts[:, inverse]
            from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

            zero = 0 if arguments.symmetric else zeros.float()[:, inverse // size]
            packed["weight_packed"] = pack_to_int32(
                (natural_levels + zero).to(torch.int8), arguments.num_bits
            )
            assert len(stable) == w.shape[1]
            levels, float_parts = natural_levels, natural
        state.update({f"{module}.{k}": v for k, v in packed.items()})
        matrices[f"{module}.weight"] = as_matrix(
            levels if form != "float-quantized" else levels * 512, float_parts
        )
    dumped = json.loads(config.model_dump_json(exclude_none=True))
    if act_order:  # which releases before 0.14 wrote; this one still groups, but no longer permutes
        dumped["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    with tempfile.TemporaryDirectory() as place:
        save_folder(Path(place), model, state, dumped)
        record(name, "compressed-tensors", matrices, Path(place))


def _ranges(w: torch.Tensor, arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of whatever shares a scale."""
    strategy = getattr(arguments.strategy, "value", arguments.strategy)
    if strategy == "tensor":
        return w.min().reshape(1), w.max().reshape(1)
    if strategy == "channel":
        return w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if strategy == "group":
        groups = w.unflatten(1, (-1, arguments.group_size))
        return groups.amin(2), groups.amax(2)
    a, b = arguments.block_structure
    blocks = w.unflatten(1, (-1, b)).unflatten(0, (-1, a))
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def save_folder(
    folder: Path, model: Any, state: dict[str, torch.Tensor], quantization: dict[str, Any]
) -> None:
    config = json.loads(model.config.to_json_string())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})


# ---- transformers: fp8, bitnet ------------------------------------------------------------------


def fp8(name: str, block: list[int]) -> None:
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    quantization = FineGrainedFP8Config(weight_block_size=tuple(block), modules_to_not_convert=["lm_head"])
    quantizer = SimpleNamespace(quantization_config=quantization)
    model = source()
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    matrices = {}
    for module in MODULES:
        key = f"{module}.weight"
        parts = Fp8Quantize(quantizer).convert({key: state.pop(key).float()})
        w, scales = parts[key], parts[f"{module}.weight_scale_inv"]
        back = Fp8Dequantize(quantizer)._dequantize_one(w, scales, torch.float32)
        matrices[key] = as_matrix(w.float() * 512, back)
        state.update(parts)
    with tempfile.TemporaryDirectory() as place:
        save_folder(Path(place), model, state, json.loads(json.dumps(quantization.to_dict(), default=str)))
        record(name, "transformers", matrices, Path(place))


def bitnet(name: str, linear_class: str) -> None:
    from transformers import BitNetQuantConfig
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    quantization = BitNetQuantConfig(linear_class=linear_class, modules_to_not_convert=["lm_head"])
    model = source()
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    matrices = {}
    for module in MODULES:
        w = state.pop(f"{module}.weight").float()
        mean = w.abs().mean()
        ternary = (w / mean).round().clamp(-1, 1)
        # BitLinear divides by the scale that is stored, AutoBitLinear multiplies
        stored = (mean if linear_class == "autobitlinear" else 1 / mean).to(torch.bfloat16)
        packed = pack_weights(ternary.clone())
        back = unpack_weights.__wrapped__(packed, torch.float32)
        weights = back * stored.float() if linear_class == "autobitlinear" else back / stored.float()
        matrices[f"{module}.weight"] = as_matrix(back, weights)
        state[f"{module}.weight"] = packed
        state[f"{module}.weight_scale"] = stored.reshape(1)
    with tempfile.TemporaryDirectory() as place:
        save_folder(Path(place), model, state, json.loads(json.dumps(quantization.to_dict(), default=str)))
        record(name, "transformers", matrices, Path(place))


# ---- ggml ---------------------------------------------------------------------------------------


def ggml_blocks(name: str) -> None:
    """Four rows of 512 columns in each type, by llama.cpp's own C code."""
    import ctypes

    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))

    class Traits(ctypes.Structure):
        _fields_ = [
            ("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("interleave", ctypes.c_int64),
            ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
            ("from_float_ref", ctypes.c_void_p)]  # fmt: skip

    base.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_init.argtypes = [ctypes.c_int]
    base.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    rows, cols = 4, 512
    x = np.random.default_rng(11).standard_t(5, (rows, cols)).astype(np.float32)
    numbers = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
               "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39}  # fmt: skip
    arrays = {}
    for type_name, number in numbers.items():
        traits = base.ggml_get_type_traits(number).contents
        data = np.zeros((rows, cols // traits.blck_size * traits.type_size), np.uint8)
        base.ggml_quantize_init(number)
        base.ggml_quantize_chunk(number, x.ctypes.data, data.ctypes.data, 0, rows, cols, None)
        back = np.empty((rows, cols), np.float32)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)(
            data.ctypes.data, back.ctypes.data, rows * cols)  # fmt: skip
        arrays[f"{type_name}.data"], arrays[f"{type_name}.weights"] = (
            data,
            np.frombuffer(bytes.fromhex(digest(back)), np.uint8),
        )
        print(type_name, traits.type_name, float(np.abs(back - x).mean()))
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
CASES: dict[str, Callable[[str], None]] = {
    "gptq-4-act": lambda n: gptqmodel(n, bits=4, group_size=32, desc_act=True, sym=True),
    "gptq-4-asym-v2": lambda n: gptqmodel(
        n, bits=4, group_size=32, desc_act=False, sym=False, format="gptq_v2"
    ),
    "gptq-3-act-asym": lambda n: gptqmodel(n, bits=3, group_size=32, desc_act=True, sym=False),
    "gptq-2-asym": lambda n: gptqmodel(n, bits=2, group_size=32, desc_act=False, sym=False),
    "gptq-8-rows-asym": lambda n: gptqmodel(
        n, bits=8, group_size=-1, desc_act=False, sym=False, act_group_aware=False
    ),
    "gptq-mixed": lambda n: gptqmodel(
        n,
        bits=4,
        group_size=32,
        desc_act=False,
        sym=True,
        dynamic={r"+:.*v_proj": {"bits": 8}, r"-:.*down_proj": {}},
    ),
    "auto-round-4-sym": lambda n: auto_round(n, "auto_round", bits=4, group_size=32, sym=True),
    "auto-round-4-asym": lambda n: auto_round(n, "auto_round", bits=4, group_size=32, sym=False),
    "auto-round-2-asym": lambda n: auto_round(n, "auto_round", bits=2, group_size=32, sym=False),
    "auto-round-mixed": lambda n: auto_round(
        n,
        "auto_round",
        bits=3,
        group_size=32,
        sym=False,
        layer_config={
            MODULES[0]: {"bits": 8, "group_size": 16},
            MODULES[3]: {"bits": 16},
            MODULES[1]: {"bits": 5},
        },
    ),
    "awq-4": lambda n: auto_round(n, "auto_awq", bits=4, group_size=32, sym=False),
    "pack-4-group-asym": lambda n: compressed_tensors(
        n, PACK, {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}, ("down_proj",)
    ),
    "pack-4-act-order": lambda n: compressed_tensors(
        n,
        PACK,
        {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32},
        act_order=True,
    ),
    "pack-8-channel": lambda n: compressed_tensors(
        n, PACK, {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    ),
    "pack-3-group": lambda n: compressed_tensors(
        n, PACK, {"num_bits": 3, "symmetric": True, "strategy": "group", "group_size": 32}, scale="float16"
    ),
    "int8-channel": lambda n: compressed_tensors(
        n, INT, {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    ),
    "int8-tensor-asym": lambda n: compressed_tensors(
        n, INT, {"num_bits": 8, "symmetric": False, "strategy": "tensor"}
    ),
    "naive-4-channel": lambda n: compressed_tensors(
        n, "naive-quantized", {"num_bits": 4, "symmetric": True, "strategy": "channel"}
    ),
    "float8-channel": lambda n: compressed_tensors(
        n, FLOAT, {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    ),
    "float8-tensor": lambda n: compressed_tensors(
        n, FLOAT, {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}, scale="float32"
    ),
    "float8-block": lambda n: compressed_tensors(
        n,
        FLOAT,
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [16, 32]},
    ),
    "fp8-block": lambda n: fp8(n, [16, 32]),
    "bitnet": lambda n: bitnet(n, "bitlinear"),
    "bitnet-auto": lambda n: bitnet(n, "autobitlinear"),
    "ggml-blocks": ggml_blocks,
}

if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for case in sys.argv[1:] or CASES:
        CASES[case](case)
