"""Makes the tiny random models of this folder and their golden logits.

Every model has seeded random weights, large enough that the logits spread over several units. The
golden logits are those of Hugging Face `transformers` on the CPU in float32 with eager attention,
computed from the folder as it was written (so `config.json` is read the way everybody reads it).
For each feature that a model is here for (sliding window, rope scaling, biases, ...) the script
switches the feature off and asserts that the logits move: a golden that a reader could pass
without the feature is worth nothing. It also asserts that no greedy choice is a near tie and that
float64 arithmetic gives the same logits to `NOISE_MAX`, so a tolerance of 1e-4 is a fair one.

Run it (README.md beside this file says how) with no argument to rewrite everything, or with
`--check` to compare what it would write with what is committed.

`index.json` lists the cases. Each golden file is a SafeTensors file with
  prompt_ids      i32 [T]           the prompt
  prefill_logits  f32 [T, vocab]    logits at every prompt position
  decode_ids      i32 [S]           greedy: decode_ids[0] = argmax(prefill_logits[T-1])
  decode_logits   f32 [S, vocab]    decode_logits[i]: logits after feeding decode_ids[i] at
                                    position T+i, so decode_ids[i+1] = argmax(decode_logits[i])
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
PROMPT_LEN = 40
DECODE_STEPS = 32
SPREAD_MIN = 1.0  # standard deviation of the logits
FEATURE_MIN = 1e-2  # a feature must move some logit by this much
MARGIN_MIN = 2e-3  # best minus second best logit at every greedy step
NOISE_MAX = 4e-5  # float32 against float64
BYTES_MAX = 5_000_000  # of everything committed here


@dataclasses.dataclass
class Family:
    """One model: `config` is config.json as published folders have it."""

    name: str
    seed: int
    config: dict
    dtype: torch.dtype = torch.float32  # of the stored weights; the golden is always f32 arithmetic
    gguf_type: gguf.GGMLQuantizationType | None = None  # also write <name>.gguf with this type
    # Changes to config.json that switch one feature off; each must move the logits.
    without: dict[str, dict] = dataclasses.field(default_factory=dict)
    # The same for weights: tensors whose name contains the text are filled with the value.
    neutral: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)


def config(model_type: str, architecture: str, **knobs) -> dict:
    base = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": 48,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 264,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    return base | knobs


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_SCALING = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
NO_BIAS = {"biases": (".bias", 0.0)}
# What all Gemmas have; GGUF has the norms with one added.
GEMMA = {
    "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "bos_token_id": 2,
    "eos_token_id": 1, "pad_token_id": 0, "attention_bias": False,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
}
SILU = {"hidden_act": "silu", "hidden_activation": "silu"}
# Bounds that these small scores and logits come near to; published models have 50 and 30.
GEMMA2 = GEMMA | {
    "sliding_window": 16, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0,
}
WITHOUT_GEMMA2 = {
    "gate with GELU": SILU,
    "sliding window": {"sliding_window": 256},
    "bound of scores": {"attn_logit_softcapping": None},
    "bound of logits": {"final_logit_softcapping": None},
}
# Gates of these weights are beyond the bound now and then; published models have a window of 128
# and a factor of 32.
OSS_YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 32,
}
OSS = {
    "hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 6,
    "num_experts_per_tok": 2, "sliding_window": 16, "attention_bias": True, "swiglu_limit": 7.0,
    "layer_types": ["sliding_attention", "full_attention"], "rope_theta": 500.0,
    "rope_scaling": OSS_YARN, "bos_token_id": 261, "eos_token_id": 263, "torch_dtype": "float16",
}
WITHOUT_OSS = {
    "all experts that are used": {"num_experts_per_tok": 1},
    "sliding window": {"sliding_window": 256},
    "bound of the gate": {"swiglu_limit": 1e6},
    "YaRN": {"rope_scaling": {"rope_type": "default"}},
    "bounds of YaRN that are no whole numbers": {"rope_scaling": OSS_YARN | {"truncate": True}},
}
NO_OSS = {
    "sinks": ("sinks", -1e4), "biases": (".bias", 0.0), "biases of experts": ("_proj_bias", 0.0),
}
NO_POST_NORMS = {
    "norms behind attention": ("post_attention_layernorm", 0.0),
    "norms behind the MLP": ("post_feedforward_layernorm", 0.0),
}

FAMILIES = [
    Family(
        "llama", 1, config("llama", "LlamaForCausalLM"), gguf_type=gguf.GGMLQuantizationType.F32,
    ),
    Family(
        # Llama 3.1 / 3.2: scaled rope, tied embeddings, a list of stop ids, f16 weights.
        "llama3", 2,
        config(
            "llama", "LlamaForCausalLM", head_dim=16, rope_theta=500.0, tie_word_embeddings=True,
            rope_scaling=LLAMA3_SCALING, eos_token_id=[2, 3], torch_dtype="float16",
        ),
        dtype=torch.float16, gguf_type=gguf.GGMLQuantizationType.F16,
        without={"llama3 rope scaling": {"rope_scaling": None}},
    ),
    Family(
        # Biases everywhere, hidden 40, head_dim 10, an odd vocabulary and an odd MLP width.
        "llama-odd", 3,
        config(
            "llama", "LlamaForCausalLM", hidden_size=40, intermediate_size=51, vocab_size=131,
            attention_bias=True, mlp_bias=True,
        ),
        neutral=NO_BIAS,
    ),
    Family(
        # A window shorter than the prompt, and head_dim other than hidden / heads.
        "mistral", 4,
        config(
            "mistral", "MistralForCausalLM", head_dim=16, sliding_window=16, vocab_size=128,
        ),
        without={"sliding window": {"sliding_window": None}},
    ),
    Family(
        # Biases on q, k, v without a word about it in config.json; the window is switched off
        # by `use_sliding_window`.
        "qwen2", 5,
        config(
            "qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True, rms_norm_eps=1e-6,
            use_sliding_window=False, sliding_window=16, max_window_layers=0,
            bos_token_id=261, eos_token_id=263,
        ),
        gguf_type=gguf.GGMLQuantizationType.F32, neutral=NO_BIAS,
    ),
    Family(
        # Normalised q and k, head_dim other than hidden / heads.
        "qwen3", 6,
        config(
            "qwen3", "Qwen3ForCausalLM", head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-6,
            rope_theta=1000000.0, attention_bias=False, use_sliding_window=False,
            sliding_window=None, max_window_layers=2, bos_token_id=261, eos_token_id=263,
        ),
        gguf_type=gguf.GGMLQuantizationType.F32,
        neutral={"q/k norm weights": ("_norm.weight", 1.0)},
    ),
    Family(
        # Qwen2.5 with YaRN as its model card says to switch it on ("type", not "rope_type").
        "qwen2-yarn", 7,
        config(
            "qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True, vocab_size=128,
            use_sliding_window=False, sliding_window=16, max_window_layers=2,
            rope_scaling=YARN_SCALING, max_position_embeddings=128, torch_dtype="bfloat16",
        ),
        dtype=torch.bfloat16,
        without={
            "YaRN": {"rope_scaling": None},
            "YaRN attention factor": {"rope_scaling": YARN_SCALING | {"attention_factor": 1.0}},
        },
        neutral=NO_BIAS,
    ),
    Family(
        # 2 of 6 experts in every layer; the width of a dense MLP is of no use.
        "qwen3-moe", 21,
        config(
            "qwen3_moe", "Qwen3MoeForCausalLM", head_dim=16, rms_norm_eps=1e-6,
            rope_theta=1000000.0, attention_bias=False, use_sliding_window=False,
            sliding_window=None, max_window_layers=2, bos_token_id=261, eos_token_id=263,
            num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
            torch_dtype="float16",
        ),
        dtype=torch.float16, gguf_type=gguf.GGMLQuantizationType.F16,
        without={
            "two experts": {"num_experts_per_tok": 1},
            "weights that add up to one": {"norm_topk_prob": False},
        },
    ),
    Family(
        # Norms that count from one, embeddings multiplied, GELU in the gate.
        "gemma", 10, config("gemma", "GemmaForCausalLM", **GEMMA), dtype=torch.bfloat16,
        gguf_type=gguf.GGMLQuantizationType.F16, without={"gate with GELU": SILU},
    ),
    Family(
        # A window in one of two layers, norms behind attention and MLP, bounds, a query scale.
        "gemma2", 11,
        config("gemma2", "Gemma2ForCausalLM", **GEMMA2, query_pre_attn_scalar=24),
        dtype=torch.bfloat16,
        without=WITHOUT_GEMMA2 | {"query scale": {"query_pre_attn_scalar": 16}},
        neutral=NO_POST_NORMS,
    ),
    Family(
        # A window in five of six layers, with rotary frequencies of their own; q/k norms.
        "gemma3", 20,
        config(
            "gemma3_text", "Gemma3ForCausalLM", **GEMMA, hidden_size=32, intermediate_size=24,
            num_hidden_layers=7, sliding_window=16, sliding_window_pattern=6,
            query_pre_attn_scalar=16, rope_theta=1000.0, rope_local_base_freq=10000.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        dtype=torch.bfloat16, gguf_type=gguf.GGMLQuantizationType.F16,
        without={
            "gate with GELU": SILU,
            "sliding window": {"sliding_window": 256},
            "layers without a window": {"sliding_window_pattern": 8},
            "query scale": {"query_pre_attn_scalar": 24},
            "linear rope scaling": {"rope_scaling": None},
            "other rope of windows": {"rope_local_base_freq": 1000.0},
        },
        neutral=NO_POST_NORMS | {"q/k norm weights": ("self_attn.q_norm", 0.0)},
    ),
]

FAMILIES.append(
    Family(
        # Sinks, 2 of 6 experts with biases and a bounded gate, a window in every other layer.
        "gpt-oss", 31, config("gpt_oss", "GptOssForCausalLM", **OSS), dtype=torch.float16,
        gguf_type=gguf.GGMLQuantizationType.F16, without=WITHOUT_OSS, neutral=NO_OSS,
    )
)
# Experts as published: codes of four bits, in the folder apart from their scales. All are used, so
# that inputs rounded to bytes do not send a row elsewhere.
OSS_ALL = OSS | {"num_local_experts": 3, "num_experts_per_tok": 3}
OSS_MXFP4 = Family(
    "gpt-oss-mxfp4", 32, config("gpt_oss", "GptOssForCausalLM", **OSS_ALL), dtype=torch.float16,
    gguf_type=gguf.GGMLQuantizationType.F16, without=WITHOUT_OSS, neutral=NO_OSS,
)

# GGUF only; rows are multiples of 32 so that every matrix really is quantised.
QUANTISED = [
    Family(
        "llama-q8_0", 8,
        config("llama", "LlamaForCausalLM", hidden_size=64, intermediate_size=32,
               tie_word_embeddings=True),
        gguf_type=gguf.GGMLQuantizationType.Q8_0,
    ),
    Family(
        "qwen2-q4_0", 9,
        config("qwen2", "Qwen2ForCausalLM", hidden_size=64, intermediate_size=32,
               tie_word_embeddings=True, rms_norm_eps=1e-6, bos_token_id=261, eos_token_id=263),
        gguf_type=gguf.GGMLQuantizationType.Q4_0,
    ),
    Family(
        "gemma2-q8_0", 13,
        config("gemma2", "Gemma2ForCausalLM", **GEMMA2, hidden_size=64, intermediate_size=32,
               query_pre_attn_scalar=16),
        gguf_type=gguf.GGMLQuantizationType.Q8_0, without=WITHOUT_GEMMA2,
    ),
]
SPLIT = "qwen2-q4_0"


def is_gemma(family: Family) -> bool:
    return family.config["model_type"].startswith("gemma")


def is_oss(family: Family) -> bool:
    return family.config["model_type"] == "gpt_oss"


def random_weights(family: Family) -> dict[str, torch.Tensor]:
    """Seeded by numpy's frozen legacy generator, in name order: the same on every version."""
    skeleton = AutoModelForCausalLM.from_config(hf_config(family.config))
    rng = np.random.RandomState(family.seed)
    weights = {}
    for name, like in sorted(skeleton.state_dict().items()):
        if name == "lm_head.weight" and family.config["tie_word_embeddings"]:
            continue
        noise = rng.standard_normal(tuple(like.shape)).astype(np.float32)
        if name.endswith("norm.weight"):
            # Gemma counts from one; and there layers must outweigh the embeddings.
            from_zero = is_gemma(family) and "post_" not in name
            noise = (0.0 if from_zero else 1.0) + 0.2 * noise
        elif name.endswith((".bias", "_proj_bias")):
            noise = 0.3 * noise
        elif name.endswith("sinks"):
            noise = 2.0 * noise
        elif is_oss(family) and name.endswith("gate_up_proj"):
            noise = 0.3 * noise
        else:
            is_table = "embed" in name or "lm_head" in name
            # Gemma multiplies its table: with a larger one every token would be repeated.
            small, large = (0.4, 0.2) if is_gemma(family) else (0.2, 0.5)
            noise = (large if is_table else small) * noise
        weights[name] = torch.from_numpy(noise).to(family.dtype)
    return weights


def hf_config(raw: dict):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return AutoConfig.from_pretrained(folder)


def build(raw: dict, weights: dict[str, torch.Tensor], dtype=torch.float32):
    """The model of `transformers`, in float32 unless told otherwise, from (rounded) weights."""
    model = AutoModelForCausalLM.from_config(
        hf_config(raw), attn_implementation="eager", experts_implementation="eager", dtype=dtype
    )
    tensors = {name: tensor.to(dtype) for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if raw["tie_word_embeddings"] else []
    assert missing == tied and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def prompt_of(family: Family) -> torch.Tensor:
    rng = np.random.RandomState(1000 + family.seed)
    return torch.from_numpy(rng.randint(0, family.config["vocab_size"], (1, PROMPT_LEN)))


@torch.no_grad()
def greedy(model, prompt: torch.Tensor) -> dict[str, np.ndarray]:
    out = model(prompt, use_cache=True)
    prefill, rows, ids = out.logits[0], [], []
    next_id = prefill[-1].argmax()
    for _ in range(DECODE_STEPS):
        ids.append(int(next_id))
        out = model(next_id.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1])
        next_id = rows[-1].argmax()
    return {
        "prompt_ids": prompt[0].numpy().astype(np.int32),
        "prefill_logits": prefill.to(torch.float32).numpy(),
        "decode_ids": np.array(ids, dtype=np.int32),
        "decode_logits": torch.stack(rows).to(torch.float32).numpy(),
    }


@torch.no_grad()
def every_position(model, golden: dict) -> np.ndarray:
    """Logits [T + S, vocab] of prompt and answer in one forward without a cache."""
    ids = np.concatenate([golden["prompt_ids"], golden["decode_ids"]]).astype(np.int64)
    return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].to(torch.float32).numpy()


def check(family: Family, weights: dict, golden: dict) -> dict[str, float]:
    """Asserts that the golden is worth having; returns how far each feature moves the logits."""
    logits = np.concatenate([golden["prefill_logits"], golden["decode_logits"]])
    assert np.isfinite(logits).all() and logits.std() > SPREAD_MIN, (family.name, logits.std())
    second, best = np.sort(logits[PROMPT_LEN - 1 : -1], axis=1)[:, -2:].T
    assert (best - second).min() > MARGIN_MIN, (family.name, (best - second).min())
    # A model stuck on one token would prove little about decoding.
    assert len(set(golden["decode_ids"].tolist())) >= 4, (family.name, golden["decode_ids"])

    exact = every_position(build(family.config, weights, torch.float64), golden)
    noise = np.abs(exact - logits).max()
    assert noise < NOISE_MAX, (family.name, noise)

    moved = {}
    for feature, change in family.without.items():
        other = every_position(build(family.config | change, weights), golden)
        moved[feature] = float(np.abs(other - logits).max())
    for feature, (text, value) in family.neutral.items():
        changed = {
            k: torch.full_like(v, value) if text in k else v for k, v in weights.items()
        }
        assert any(not torch.equal(changed[k], weights[k]) for k in weights), feature
        other = every_position(build(family.config, changed), golden)
        moved[feature] = float(np.abs(other - logits).max())
    for feature, change in moved.items():
        assert change > FEATURE_MIN, (family.name, feature, change)
    print(f"{family.name}: logits std {logits.std():.2f}, f64 noise {noise:.1e}, "
          + (", ".join(f"without {k}: moves {v:.2f}" for k, v in moved.items()) or "no features"))
    return moved


def llama3_factors(raw: dict) -> np.ndarray:
    """What GGUF calls rope_freqs: by how much each rotary frequency is divided, [head_dim / 2]."""
    scaling, dim = raw["rope_scaling"], raw["head_dim"]
    wavelength = 2 * np.pi * raw["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    rotations = scaling["original_max_position_embeddings"] / wavelength
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    factors = 1.0 / (smooth + (1.0 - smooth) / scaling["factor"])
    # All three bands are used: untouched, blended and fully scaled.
    assert factors.min() == 1.0 and factors.max() == scaling["factor"]
    assert ((factors > 1.0) & (factors < scaling["factor"])).any()
    return factors.astype(np.float32)


def interleave(tensor: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of q or k from half-split order (HF) to interleaved order (GGUF of type llama)."""
    halves = tensor.reshape(n_heads, 2, tensor.shape[0] // n_heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
GGUF_POST_NORM_NAMES = GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


GGUF_OSS_NAMES = GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp",
    "self_attn.sinks": "attn_sinks",
}


def by_outputs(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of gpt-oss as GGUF has them: `[experts, n, k]`, gate and up apart."""
    apart = {}
    for name, tensor in weights.items():
        stem, end = name.rsplit(".", 1)
        if end == "sinks":
            apart[f"{name}.weight"] = tensor
        elif end in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            part, kind = end.removesuffix("_bias"), "bias" if end.endswith("bias") else "weight"
            rows = tensor if kind == "bias" else tensor.transpose(1, 2)
            if part == "down_proj":
                apart[f"{stem}.down_proj.{kind}"] = rows
            else:
                apart[f"{stem}.gate_proj.{kind}"] = rows[:, 0::2]
                apart[f"{stem}.up_proj.{kind}"] = rows[:, 1::2]
        else:
            apart[name] = tensor
    return apart


def on_the_grid(weights: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Weights whose experts are numbers of MXFP4, and these as a published folder has them."""
    kind = gguf.GGMLQuantizationType.MXFP4
    rounded, packed = {}, {}
    for name, tensor in weights.items():
        if not name.endswith(("gate_up_proj", "down_proj")) or tensor.ndim != 3:
            rounded[name] = packed[name] = tensor
            continue
        rows = np.ascontiguousarray(tensor.transpose(1, 2).to(torch.float32).numpy())
        data = gguf.quants.quantize(rows, kind)
        back = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
        rounded[name] = back.reshape(rows.shape).transpose(1, 2).contiguous()
        blocks = data.reshape(*rows.shape[:2], rows.shape[2] // 32, 17)
        codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
        pairs = codes[..., 0::2] | codes[..., 1::2] << 4
        packed[f"{name}_blocks"] = torch.from_numpy(np.ascontiguousarray(pairs))
        packed[f"{name}_scales"] = torch.from_numpy(np.ascontiguousarray(blocks[..., 0]))
    return rounded, packed


def by_expert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as published files have them: each projection apart, `[experts, n, k]` here."""
    apart = {}
    for name, tensor in weights.items():
        stem = name.rsplit(".", 1)[0]
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            apart |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            apart[f"{name}.weight"] = tensor
        else:
            apart[name] = tensor
    return apart


def gguf_name(name: str, names: dict[str, str]) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{names[part]}.{kind}"
    return f"{names[stem]}.{kind}"


def gguf_metadata(out: gguf.GGUFWriter, family: Family) -> None:
    raw = family.config
    head_dim = raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    out.add_name(family.name)
    out.add_block_count(raw["num_hidden_layers"])
    out.add_context_length(raw["max_position_embeddings"])
    out.add_embedding_length(raw["hidden_size"])
    out.add_feed_forward_length(raw["intermediate_size"])
    if raw["model_type"] == "gpt_oss":
        scaling = raw["rope_scaling"]
        out.add_expert_count(raw["num_local_experts"])
        out.add_expert_used_count(raw["num_experts_per_tok"])
        out.add_expert_feed_forward_length(raw["intermediate_size"])
        out.add_sliding_window(raw["sliding_window"])
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(scaling["factor"])
        out.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        out.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        out.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    if "num_experts" in raw:
        out.add_expert_count(raw["num_experts"])
        out.add_expert_used_count(raw["num_experts_per_tok"])
        out.add_expert_feed_forward_length(raw["moe_intermediate_size"])
    out.add_head_count(raw["num_attention_heads"])
    out.add_head_count_kv(raw["num_key_value_heads"])
    out.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    out.add_rope_freq_base(raw["rope_theta"])
    if raw["model_type"] == "llama":
        out.add_rope_dimension_count(head_dim)
        out.add_vocab_size(raw["vocab_size"])
    if raw["model_type"] == "gemma2":
        out.add_attn_logit_softcapping(raw["attn_logit_softcapping"])
        out.add_final_logit_softcapping(raw["final_logit_softcapping"])
    if raw["model_type"] in ("gemma2", "gemma3_text"):
        out.add_sliding_window(raw["sliding_window"])
    if raw["model_type"] == "gemma3_text":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(raw["rope_scaling"]["factor"])
    if "head_dim" in raw:
        out.add_key_length(head_dim)
        out.add_value_length(head_dim)
    out.add_file_type({
        gguf.GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
        gguf.GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
        gguf.GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
        gguf.GGMLQuantizationType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    }[family.gguf_type])
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)


def sentencepiece_vocabulary(out: gguf.GGUFWriter, raw: dict) -> None:
    kind = gguf.TokenType
    tokens = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    tokens += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    tokens += [(t, -float(i), kind.NORMAL) for i, t in enumerate(["▁a", "▁", "a", "b", "c"])]
    assert len(tokens) == raw["vocab_size"]
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list([token.encode() for token, _, _ in tokens])
    out.add_token_scores([score for _, score, _ in tokens])
    out.add_token_types([kind for _, _, kind in tokens])
    out.add_bos_token_id(raw["bos_token_id"])
    ends = raw["eos_token_id"]
    out.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    out.add_unk_token_id(0)
    out.add_add_bos_token(True)
    out.add_add_eos_token(False)


def byte_level_alphabet() -> list[str]:
    """The printable stand-ins that byte-level BPE uses for bytes 0..=255."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    stand_in = {byte: chr(byte) for byte in shown}
    stand_in |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [stand_in[byte] for byte in range(256)]


def bpe_vocabulary(out: gguf.GGUFWriter, raw: dict) -> None:
    merges = ["t h", "th e", "Ġ the", "Ġ a", "i n"]
    tokens = byte_level_alphabet() + [merge.replace(" ", "") for merge in merges]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(tokens) + len(special) == raw["vocab_size"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list(tokens + special)
    kind = gguf.TokenType
    out.add_token_types([kind.NORMAL] * len(tokens) + [kind.CONTROL] * len(special))
    out.add_token_merges(merges)
    out.add_bos_token_id(261)
    out.add_eos_token_id(263)
    out.add_pad_token_id(261)
    out.add_add_bos_token(False)


def write_gguf(
    path: Path, family: Family, weights: dict, split_after: int = 0,
    experts: gguf.GGMLQuantizationType | None = None,
) -> dict:
    """Writes the file (experts in a type of their own, if told); returns the weights as a reader gets them back, in HF names and order."""
    raw = family.config
    is_llama = raw["model_type"] == "llama"
    arch = raw["model_type"].removesuffix("_text").replace("3_moe", "3moe").replace("_", "-")
    out = gguf.GGUFWriter(path, arch, split_max_tensors=split_after)
    gguf_metadata(out, family)
    by_pieces = is_llama or is_gemma(family)
    (sentencepiece_vocabulary if by_pieces else bpe_vocabulary)(out, raw)
    if raw.get("rope_scaling", {}).get("rope_type") == "llama3":
        out.add_tensor("rope_freqs.weight", llama3_factors(raw))
    seen = {}
    apart = by_outputs(weights) if is_oss(family) else by_expert(weights)
    for name, tensor in apart.items():
        values = tensor.to(torch.float32).numpy()
        heads = {"q_proj": raw["num_attention_heads"], "k_proj": raw["num_key_value_heads"]}
        n_heads = heads.get(name.split(".")[-2], 0) if is_llama else 0
        stored = np.ascontiguousarray(interleave(values, n_heads) if n_heads else values)
        if is_gemma(family) and name.endswith("norm.weight"):
            stored = stored + np.float32(1.0)
        # As everybody does: vectors and routers stay f32, matrices take the type of the file.
        is_vector = values.ndim == 1 or name.endswith(
            ("mlp.gate.weight", "mlp.router.weight", ".bias")
        )
        kind = gguf.GGMLQuantizationType.F32 if is_vector else family.gguf_type
        if experts is not None and "experts" in name and not is_vector:
            kind = experts
        data = gguf.quants.quantize(stored, kind)
        has_post_norms = "model.layers.0.post_feedforward_layernorm.weight" in weights
        names = GGUF_POST_NORM_NAMES if has_post_norms else GGUF_NAMES
        names = GGUF_OSS_NAMES if is_oss(family) else names
        out.add_tensor(gguf_name(name, names), data, raw_dtype=kind)
        back = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        seen[name] = torch.from_numpy(np.array(back, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return seen


def write_folder(folder: Path, family: Family, weights: dict) -> None:
    folder.mkdir(parents=True)
    raw = family.config
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    generation = {k: raw[k] for k in ("bos_token_id", "eos_token_id")} | {"do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {}
    for name, tensor in (weights if is_oss(family) else by_expert(weights)).items():
        if tensor.ndim == 3 and not is_oss(family):
            each = {name.replace("experts.", f"experts.{i}."): t for i, t in enumerate(tensor)}
            tensors |= {name: tensor.clone() for name, tensor in each.items()}
        else:
            tensors[name] = tensor
    save_torch_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_sharded(folder: Path, family: Family, weights: dict) -> None:
    """As `save_pretrained` of today writes it: an index, and `rope_parameters` in config.json."""
    total = sum(tensor.nbytes for tensor in weights.values())
    shard = f"{total * 6 // 10 // 1000}KB"
    build(family.config, weights).save_pretrained(folder, max_shard_size=shard)
    assert len(list(folder.glob("model-*-of-00002.safetensors"))) == 2
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())


def write_all(root: Path) -> None:
    cases = []

    def case(path: str, golden: str, family: Family, weights: str, features: dict) -> None:
        kind = family.config["model_type"].removesuffix("_text")
        cases.append({"path": path, "golden": golden, "family": kind,
                      "weights": weights, "features": sorted(features)})

    for family in FAMILIES:
        weights = random_weights(family)
        write_folder(root / family.name, family, weights)
        folder = AutoModelForCausalLM.from_pretrained(
            root / family.name, attn_implementation="eager", experts_implementation="eager",
            dtype=torch.float32,
        ).eval()
        golden = greedy(folder, prompt_of(family))
        moved = check(family, weights, golden)
        golden_path = f"{family.name}/golden.safetensors"
        save_file(golden, root / golden_path)
        stored = str(family.dtype).removeprefix("torch.")
        case(family.name, golden_path, family, stored, moved)
        if family.name == "llama-odd":
            write_sharded(root / "llama-odd-sharded", family, weights)
            case("llama-odd-sharded", golden_path, family, stored, moved)
        if family.gguf_type is not None:
            seen = write_gguf(root / f"{family.name}.gguf", family, weights)
            stored_weights = by_outputs(weights) if is_oss(family) else by_expert(weights)
            assert all(torch.equal(seen[k], v.float()) for k, v in stored_weights.items())
            case(f"{family.name}.gguf", golden_path, family, stored, moved)

    family = OSS_MXFP4
    weights, packed = on_the_grid(random_weights(family))
    golden = greedy(build(family.config, weights), prompt_of(family))
    moved = check(family, weights, golden)
    golden_path = f"{family.name}/golden.safetensors"
    kept_as = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
    published = dataclasses.replace(family, config=family.config | kept_as)
    write_folder(root / family.name, published, packed)
    save_file(golden, root / golden_path)
    case(family.name, golden_path, family, "MXFP4", moved)
    seen = write_gguf(
        root / f"{family.name}.gguf", family, weights, experts=gguf.GGMLQuantizationType.MXFP4
    )
    assert all(torch.equal(seen[k], v.float()) for k, v in by_outputs(weights).items())
    case(f"{family.name}.gguf", golden_path, family, "MXFP4", moved)

    for family in QUANTISED:
        path = f"{family.name}.gguf"
        seen = write_gguf(root / path, family, random_weights(family))
        golden = greedy(build(family.config, seen), prompt_of(family))
        moved = check(family, seen, golden)
        golden_path = f"{family.name}.golden.safetensors"
        save_file(golden, root / golden_path)
        case(path, golden_path, family, family.gguf_type.name, moved)
    family = next(family for family in QUANTISED if family.name == SPLIT)
    write_gguf(root / f"{family.name}-split.gguf", family, random_weights(family), split_after=14)
    first = f"{family.name}-split-00001-of-00002.gguf"
    assert (root / first).exists(), list(root.iterdir())
    case(first, f"{family.name}.golden.safetensors", family, family.gguf_type.name, {})
    (root / "index.json").write_text(json.dumps(cases, indent=1) + "\n")


def compare(made: Path) -> int:
    """Files byte for byte; goldens (whose last bits depend on torch and the CPU) to NOISE_MAX."""
    wrong = []
    for path in sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file()):
        kept = HERE / path
        if not kept.exists():
            wrong.append(f"{path}: not committed")
        elif path.name.endswith("golden.safetensors"):
            new, old = load_file(made / path), load_file(kept)
            if not all(np.allclose(new[k], old[k], rtol=0, atol=NOISE_MAX) for k in new):
                wrong.append(f"{path}: other values")
        elif (made / path).read_bytes() != kept.read_bytes():
            wrong.append(f"{path}: other bytes")
    print("\n".join(wrong) or "all committed files are what this script makes")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        write_all(made)
        total = sum(p.stat().st_size for p in made.rglob("*") if p.is_file())
        print(f"{total} bytes in all")
        assert total <= BYTES_MAX
        if arguments.check:
            return compare(made)
        for item in made.iterdir():
            kept = HERE / item.name
            if kept.is_dir():
                shutil.rmtree(kept)
            shutil.move(item, kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
