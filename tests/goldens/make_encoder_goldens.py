"""Makes the tiny random encoders of this folder and their golden hidden states.

The manner is that of make_goldens.py: seeded random weights, Hugging Face `transformers` on the CPU
in float32 with eager attention, computed from the folder as it was written, and an assertion for
each feature that the hidden states need it. Run it with no argument to rewrite, with `--check` to
compare.

`encoders.json` lists the cases. Each golden file is a SafeTensors file with
  ids     i32 [T]           tokens of all texts, one behind the other
  cu_q    i32 [S + 1]       text s has the tokens cu_q[s] .. cu_q[s + 1]
  hidden  f32 [T, hidden]   last hidden state of every token, each text computed alone
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from transformers import BertConfig, BertForMaskedLM, BertModel

HERE = Path(__file__).resolve().parent
LENGTHS = [1, 17, 40, 64]
FEATURE_MIN = 1e-2
NOISE_MAX = 2e-5

BASE = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "pad_token_id": 0,
}

# name -> seed, config, whether the file is saved with a head (names begin with `bert.`), dtype
CASES = {
    "bert": (11, BASE, False, torch.float32),
    "bert-masked": (
        12,
        BASE | {"architectures": ["BertForMaskedLM"], "hidden_act": "gelu_new", "hidden_size": 40,
                "num_attention_heads": 5, "layer_norm_eps": 1e-5},
        True,
        torch.float16,
    ),
}


def random_weights(config: dict, head: bool, seed: int, dtype) -> dict[str, torch.Tensor]:
    skeleton = (BertForMaskedLM if head else BertModel)(BertConfig(**config))
    rng = np.random.RandomState(seed)
    weights = {}
    for name, like in sorted(skeleton.state_dict().items()):
        if name.endswith(("position_ids", "token_type_ids")) or name == "cls.predictions.decoder.weight":
            continue
        noise = rng.standard_normal(tuple(like.shape)).astype(np.float32)
        if name.endswith("LayerNorm.weight"):
            noise = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            noise = 0.3 * noise
        else:
            noise = (0.5 if "embeddings" in name else 0.25) * noise
        weights[name] = torch.from_numpy(noise).to(dtype)
    return weights


@torch.no_grad()
def hidden_states(config: dict, weights: dict, ids: np.ndarray, dtype=torch.float32) -> np.ndarray:
    model = BertModel(BertConfig(**config, attn_implementation="eager")).to(dtype).eval()
    bare = {k.removeprefix("bert."): v.to(dtype) for k, v in weights.items()}
    missing, unexpected = model.load_state_dict(bare, strict=False)
    assert all("position_ids" in k or "token_type_ids" in k or "pooler" in k for k in missing), missing
    assert all(k.startswith("cls.") for k in unexpected), unexpected
    rows, start = [], 0
    for length in LENGTHS:
        text = torch.from_numpy(ids[start : start + length].astype(np.int64))[None]
        rows.append(model(text).last_hidden_state[0].to(torch.float64).numpy())
        start += length
    return np.concatenate(rows)


def check(name: str, config: dict, weights: dict, ids: np.ndarray, golden: np.ndarray) -> None:
    exact = hidden_states(config, weights, ids, torch.float64)
    noise = np.abs(exact - golden).max()
    assert noise < NOISE_MAX, (name, noise)
    other = "gelu" if config["hidden_act"] == "gelu_new" else "gelu_new"
    moved = {"the form of gelu": hidden_states(config | {"hidden_act": other}, weights, ids)}
    for feature in ("token_type_embeddings", "position_embeddings", "key.bias", "LayerNorm.bias"):
        changed = {k: torch.zeros_like(v) if feature in k else v for k, v in weights.items()}
        moved[feature] = hidden_states(config, changed, ids)
    for feature, states in moved.items():
        change = np.abs(states - golden).max()
        # The two forms of gelu are 5e-4 apart at most, and a bias of all keys moves no softmax.
        least = {"the form of gelu": 5e-4, "key.bias": 0.0}.get(feature, FEATURE_MIN)
        assert change >= least, (name, feature, change)
    print(f"{name}: std {golden.std():.2f}, f64 noise {noise:.1e}")


GGUF_NAMES = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q", "attention.self.key": "attn_k",
    "attention.self.value": "attn_v", "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm", "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("encoder.layer."):
        layer, part = stem.removeprefix("encoder.layer.").split(".", 1)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def vocabulary(size: int) -> list[str]:
    """As converters write WordPiece: a word begins with U+2581, a continuation is bare."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["\u2581" + letter for letter in letters] + list(letters)
    more = ["\u2581the", "\u2581of", "ing"]
    rest = [f"[unused{i}]" for i in range(size - len(special) - len(words) - len(more))]
    return special + words + more + rest


def write_gguf(path: Path, config: dict, weights: dict) -> None:
    out = gguf.GGUFWriter(path, "bert")
    out.add_name(path.stem)
    out.add_block_count(config["num_hidden_layers"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_layer_norm_eps(config["layer_norm_eps"])
    out.add_causal_attention(False)
    out.add_pooling_type(gguf.PoolingType.CLS)
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = vocabulary(config["vocab_size"])
    kind = gguf.TokenType
    out.add_tokenizer_model("bert")
    out.add_token_list(tokens)
    out.add_token_types([kind.CONTROL if t.startswith("[") else kind.NORMAL for t in tokens])
    out.add_token_type_count(config["type_vocab_size"])
    out.add_unk_token_id(1)
    out.add_sep_token_id(3)
    out.add_pad_token_id(0)
    out.add_uint32("tokenizer.ggml.cls_token_id", 2)
    out.add_mask_token_id(4)
    for name, tensor in weights.items():
        if not name.startswith("pooler."):
            out.add_tensor(gguf_name(name), tensor.to(torch.float32).numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def write_all(root: Path) -> None:
    cases = []
    for name, (seed, config, head, dtype) in CASES.items():
        folder = root / name
        folder.mkdir()
        weights = random_weights(config, head, seed, dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_torch_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        ids = np.random.RandomState(seed + 100).randint(0, config["vocab_size"], sum(LENGTHS))
        golden = hidden_states(config, weights, ids).astype(np.float32)
        check(name, config, weights, ids, golden)
        cu_q = np.concatenate([[0], np.cumsum(LENGTHS)])
        save_file(
            {"ids": ids.astype(np.int32), "cu_q": cu_q.astype(np.int32), "hidden": golden},
            folder / "golden.safetensors",
        )
        cases.append({"path": name, "golden": f"{name}/golden.safetensors"})
        if not head:
            write_gguf(root / f"{name}.gguf", config, weights)
            cases.append({"path": f"{name}.gguf", "golden": f"{name}/golden.safetensors"})
    (root / "encoders.json").write_text(json.dumps(cases, indent=1) + "\n")


def compare(made: Path) -> int:
    wrong = []
    for path in sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file()):
        kept = HERE / path
        if not kept.exists():
            wrong.append(f"{path}: not committed")
        elif path.name == "golden.safetensors":
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
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        write_all(made)
        if arguments.check:
            return compare(made)
        for path in made.rglob("*"):
            if path.is_file():
                kept = HERE / path.relative_to(made)
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(path.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
