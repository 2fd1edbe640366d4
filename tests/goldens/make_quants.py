"""Makes quants.safetensors: blocks of every quantised GGUF format and the numbers they stand for.

The blocks are random bytes with sane scales, so every code, sub-scale and high bit occurs; the
numbers are what the `gguf` package of PyPI dequantises them to. Q8_K, which that package does not
decode, is computed here from its definition (f32 scale, 256 signed bytes, 16 sums). For each
format NAME the file holds `NAME.blocks` (u8) and `NAME.values` (f32). `normal.values` are
numbers of a normal distribution, `normal.NAME` what the package quantises them to.

Run it with no argument to rewrite the file, or with `--check` to compare.
"""

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save

PATH = Path(__file__).resolve().parent / "quants.safetensors"
WEIGHTS = 512
# Offsets of the f16 scales (and minima) in a block.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}
Q8_K_BYTES = 4 + 256 + 2 * 16


def blocks(name: str, block_bytes: int, count: int, rng) -> np.ndarray:
    made = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    for at in HALVES.get(name, []):
        scales = rng.uniform(-0.1, 0.1, count).astype(np.float16)
        made[:, at : at + 2] = scales.view(np.uint8).reshape(count, 2)
    if name == "MXFP4":
        # The two subnormal scales and some large ones, then ordinary ones.
        made[:, 0] = [0, 1, 2, 250, *rng.integers(110, 130, count - 4)]
    if name == "Q8_K":
        scales = rng.uniform(-0.1, 0.1, count).astype(np.float32)
        made[:, :4] = scales.view(np.uint8).reshape(count, 4)
        codes = made[:, 4:260].view(np.int8).astype(np.int16)
        sums = codes.reshape(count, 16, 16).sum(axis=2, dtype=np.int16)
        made[:, 260:] = sums.view(np.uint8).reshape(count, 32)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    rng = np.random.default_rng(7)
    tensors = {}
    for name in [*HALVES, "MXFP4", "Q8_K"]:
        kind = gguf.GGMLQuantizationType[name]
        length, size = gguf.GGML_QUANT_SIZES[kind]
        if name == "Q8_K":
            length, size = 256, Q8_K_BYTES
        made = blocks(name, size, WEIGHTS // length, rng)
        if name == "Q8_K":
            codes = made[:, 4:260].view(np.int8).astype(np.float32)
            values = made[:, :4].copy().view(np.float32) * codes
        else:
            values = gguf.quants.dequantize(made, kind)
        assert np.isfinite(values).all() and (values != 0).any(), name
        tensors[f"{name}.blocks"] = made.reshape(-1)
        tensors[f"{name}.values"] = values.astype(np.float32).reshape(-1)
    normal = rng.normal(0, 0.02, WEIGHTS).astype(np.float32)
    normal[:32] = 0
    tensors["normal.values"] = normal
    for name in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]:
        kind = gguf.GGMLQuantizationType[name]
        tensors[f"normal.{name}"] = gguf.quants.quantize(normal, kind).reshape(-1)
    made = save(tensors)
    if arguments.check:
        same = PATH.read_bytes() == made
        print("the committed file is what this script makes" if same else "other bytes")
        return 0 if same else 1
    PATH.write_bytes(made)
    print(f"{len(made)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
