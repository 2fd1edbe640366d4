"""Makes random LoRA adapters for the tiny models of this folder, and their golden logits.

The adapters are written by Hugging Face `peft`, so names, shapes and configuration are what
everybody's files have; their numbers are seeded and large enough to move the logits by units. The
golden logits are those of `peft` on the CPU in float32, with the adapter beside the base and with
the adapter merged into it. The script asserts that both agree, that float64 gives the same, and
that every module that is targeted moves the logits: an adapter of which a reader could lose a part
is worth nothing.

Run it as `make_goldens.py` (README.md), with or without `--check`. `lora/index.json` lists the
cases; a case is a PEFT folder with `golden.safetensors` beside the adapter:
  prompt_ids  i32 [T]
  unmerged    f32 [T, vocab]  adapter beside the base
  merged      f32 [T, vocab]  adapter merged into the base
`lora/llama.gguf` is the adapter of `lora/llama` as llama.cpp has it: rows of B of q and k stand as
in the base's GGUF, and what scales each update is in B, because one alpha holds for all.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import gguf
import numpy as np
import torch
from make_goldens import FAMILIES, NOISE_MAX, SPREAD_MIN, Family, build, random_weights
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent
PROMPT_LEN = 20
FEATURE_MIN = 1e-2
MERGED_MAX = 5e-5
BYTES_MAX = 1_500_000

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EMBEDDINGS = ["embed_tokens", "lm_head"]


@dataclasses.dataclass
class Case:
    name: str
    base: str  # folder of the model; a GGUF of the same name may stand beside it
    seed: int
    settings: dict
    dtype: torch.dtype = torch.float32  # of the adapter's tensors in the file


CASES = [
    # Ranks and alphas of their own for some modules; the embedding and the head too.
    Case("llama", "llama", 51, {
        "r": 4, "lora_alpha": 8, "target_modules": ATTENTION + MLP + EMBEDDINGS,
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"k_proj": 3, "^model.layers.0.self_attn.v_proj": 5},
    }),
    # Scaled by the root of the rank; biases in the base; half precision in the file.
    Case("qwen2", "qwen2", 52, {
        "r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION + ["down_proj"],
    }, torch.float16),
    # DoRA, in one layer only, and bfloat16 in the file.
    Case("qwen3", "qwen3", 53, {
        "r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ATTENTION + MLP,
        "layers_to_transform": [1],
    }, torch.bfloat16),
    # DoRA where there are biases, widths that fill no vector, an embedding and a head.
    Case("llama-odd", "llama-odd", 54, {
        "r": 5, "lora_alpha": 5, "use_dora": True, "target_modules": ATTENTION + MLP + EMBEDDINGS,
    }),
]


def family_of(case: Case) -> Family:
    return next(family for family in FAMILIES if family.name == case.base)


def base_of(case: Case, dtype=torch.float32):
    family = family_of(case)
    return build(family.config, random_weights(family), dtype)


def adapted(case: Case, dtype=torch.float32, without: str | None = None):
    """The base with its adapter; `without` leaves the update of one kind of module at nothing."""
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **case.settings)
    model = get_peft_model(base_of(case, dtype), config).eval()
    rng = np.random.RandomState(case.seed)
    for name, tensor in sorted(model.named_parameters()):
        if "lora_" not in name:
            continue
        noise = rng.standard_normal(tuple(tensor.shape)).astype(np.float32)
        if "magnitude" in name:
            value = tensor.detach().float().numpy() * (1 + 0.2 * noise)
        else:
            value = 0.15 * noise
        value = torch.from_numpy(value.astype(np.float32)).to(case.dtype).to(dtype)
        if without is not None and f".{without}." in name:
            # B of nothing, and the length that the rows have anyway.
            value = tensor.detach() if "magnitude" in name else torch.zeros_like(value)
        tensor.data.copy_(value)
    return model


def prompt_of(case: Case) -> torch.Tensor:
    rng = np.random.RandomState(2000 + case.seed)
    vocab = family_of(case).config["vocab_size"]
    return torch.from_numpy(rng.randint(0, vocab, (1, PROMPT_LEN)))


@torch.no_grad()
def logits(model, prompt) -> np.ndarray:
    return model(prompt, use_cache=False).logits[0].float().numpy()


def golden(case: Case) -> dict[str, np.ndarray]:
    prompt = prompt_of(case)
    unmerged = logits(adapted(case), prompt)
    merged = logits(adapted(case).merge_and_unload(), prompt)
    apart = np.abs(merged - unmerged).max()
    assert apart < MERGED_MAX, (case.name, apart)
    assert np.isfinite(unmerged).all() and unmerged.std() > SPREAD_MIN, case.name
    noise = np.abs(logits(adapted(case, torch.float64), prompt) - unmerged).max()
    assert noise < NOISE_MAX, (case.name, noise)
    moved = {"adapter": np.abs(logits(base_of(case), prompt) - unmerged).max()}
    for module in case.settings["target_modules"]:
        without = logits(adapted(case, without=module), prompt)
        moved[module] = np.abs(without - unmerged).max()
    for what, by in moved.items():
        assert by > FEATURE_MIN, (case.name, what, by)
    print(f"{case.name}: merged apart {apart:.1e}, f64 noise {noise:.1e}, "
          + ", ".join(f"{what} moves {by:.2f}" for what, by in moved.items()))
    return {
        "prompt_ids": prompt[0].numpy().astype(np.int32),
        "unmerged": unmerged,
        "merged": merged,
    }


def write_case(case: Case, folder: Path):
    model = adapted(case)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.data = tensor.data.to(case.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        folder.mkdir(parents=True)
        shutil.copy(Path(scratch) / "adapter_model.safetensors", folder)
        raw = json.loads((Path(scratch) / "adapter_config.json").read_text())
    # The order of a set is no two times the same.
    raw["target_modules"] = sorted(raw["target_modules"])
    raw["base_model_name_or_path"] = case.base
    (folder / "adapter_config.json").write_text(json.dumps(raw, indent=1) + "\n")
    save_file(golden(case), folder / "golden.safetensors")


def interleaved(b: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a Llama GGUF: pairs that rotate together stand side by side."""
    heads = b.reshape(-1, 2, head_dim // 2, b.shape[1])
    return heads.swapaxes(1, 2).reshape(b.shape)


def write_gguf(case: Case, path: Path):
    config = family_of(case).config
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    model = adapted(case)
    for name, module in sorted(model.base_model.model.named_modules()):
        if not hasattr(module, "lora_A") or not hasattr(module, "scaling"):
            continue
        if name == "model.embed_tokens":
            to = "token_embd"
            a = module.lora_embedding_A["default"].T
            b = module.lora_embedding_B["default"]
        else:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            layer = name.split(".")
            to = "output" if name == "lm_head" else f"blk.{layer[2]}.{names['.'.join(layer[3:])]}"
        a, b = a.detach().numpy(), b.detach().numpy() * np.float32(module.scaling["default"])
        if to.endswith(("attn_q", "attn_k")):
            b = interleaved(b, head_dim)
        writer.add_tensor(f"{to}.weight.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{to}.weight.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_all(root: Path):
    root.mkdir(parents=True, exist_ok=True)
    index = []
    for case in CASES:
        write_case(case, root / case.name)
        index.append({"adapter": case.name, "base": case.base, "golden": case.name})
    write_gguf(CASES[0], root / "llama.gguf")
    index.append({"adapter": "llama.gguf", "base": "llama", "golden": "llama"})
    for base in ["llama.gguf", "qwen2.gguf", "qwen3.gguf"]:
        name = base.removesuffix(".gguf")
        index.append({"adapter": name, "base": base, "golden": name})
    index.append({"adapter": "llama.gguf", "base": "llama.gguf", "golden": "llama"})
    (root / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def compare(made: Path, kept: Path) -> int:
    wrong = []
    for path in sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file()):
        if not (kept / path).exists():
            wrong.append(f"{path}: not committed")
        elif path.name == "golden.safetensors":
            new, old = load_file(made / path), load_file(kept / path)
            if not all(np.allclose(new[k], old[k], rtol=0, atol=NOISE_MAX) for k in new):
                wrong.append(f"{path}: other values")
        elif (made / path).read_bytes() != (kept / path).read_bytes():
            wrong.append(f"{path}: other bytes")
    print("\n".join(wrong) or "all committed files are what this script makes")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = HERE / "lora"
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "lora"
        write_all(made)
        total = sum(p.stat().st_size for p in made.rglob("*") if p.is_file())
        print(f"{total} bytes in all")
        assert total <= BYTES_MAX
        if arguments.check:
            return compare(made, kept)
        if kept.is_dir():
            shutil.rmtree(kept)
        shutil.move(made, kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
