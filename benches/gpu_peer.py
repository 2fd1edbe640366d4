#!/usr/bin/env python3
"""What else is installed, on the same shapes: PyTorch and transformers with random weights.

Prints rows for the table of benches/gpu.sh, in less than a minute. Each row names what it timed:
`eager` is a call of the model as anybody would write it, `graph` the same call recorded with
torch.cuda.graph. Nothing is compiled with torch.compile, which takes longer than all of this.
"""

import statistics
import sys
import time

ROUNDS = 5


def row(model, what, ms=None, tokens=None, rate="", part=""):
    def digits(x):
        return "" if x is None else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"

    print(f"| {model} | {what} | {digits(ms)} | {digits(tokens)} | {rate} | {part} | |", flush=True)


try:
    import torch
except ImportError as error:
    row("torch", f"absent: {error}")
    sys.exit(0)

DEVICE = "cuda"


def seconds(work, rounds=ROUNDS, together=1):
    """The median of rounds, each of so many calls without waiting; the first round is left out."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(together):
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / together)
    return statistics.median(times[1:])


def limits():
    """Copied bytes and operations of products, a second."""
    side = 8192
    source = torch.randint(-128, 127, (1 << 30,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source), together=10)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * side**3 / seconds(lambda: torch.mm(a, b.T), together=20)
    name = f"torch {torch.__version__}"
    row(name, "copy, read and written", rate=f"{copy / 1e9:.0f} GB/s")
    row(name, f"bf16 product, {side}^3", rate=f"{product / 1e12:.0f} TFLOP/s")
    return copy, product


def llama_config(**other):
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "attn_implementation": "sdpa",
            **other,
        }
    )


def llama(config):
    from transformers import LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def layer_weights(config):
    hidden, dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = 2 * hidden * hidden + 2 * hidden * config.num_key_value_heads * dim
    return config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)


def prefill(model, product, tokens):
    config = model.config
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=DEVICE)
    took = seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), rounds=3)
    pairs = tokens * tokens / 2 * config.num_hidden_layers
    flops = 2 * layer_weights(config) * tokens + 4 * pairs * config.hidden_size
    part = f"{100 * flops / took / product:.0f} % of the product"
    rate = f"{flops / took / 1e12:.0f} TFLOP/s"
    row("torch 8b-bf16", f"prefill {tokens}, eager", 1e3 * took, tokens / took, rate, part)


def decode(model, copy, batch, depth):
    """Steps over a static cache that is full of noise."""
    from transformers import StaticCache

    config, spare = model.config, 64
    cache = StaticCache(config=config, max_cache_len=depth + spare)
    ids = torch.randint(0, config.vocab_size, (batch, 1), device=DEVICE)

    def step():
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1)

    step()  # makes the cache
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    def back():
        for layer in cache.layers:
            layer.cumulative_length.fill_(depth - 1)

    head = config.vocab_size * config.hidden_size
    dim = config.hidden_size // config.num_attention_heads
    kv = 4 * config.num_hidden_layers * config.num_key_value_heads * dim * depth * batch
    read = 2 * (layer_weights(config) + head) + kv

    what = f"decode {batch} x {depth}"

    def told(how, took):
        rate = f"{read / took / 1e9:.0f} GB/s"
        part = f"{100 * read / took / copy:.0f} % of the copy"
        row("torch 8b-bf16", f"{what}, {how}", 1e3 * took, batch / took, rate, part)

    back()
    told("eager", seconds(lambda: step().tolist(), rounds=10))
    try:
        back()
        graph, chosen = recorded(step)
        back()
        told("graph", seconds(lambda: (graph.replay(), chosen.tolist()), rounds=30))
    except Exception as error:  # whatever cannot be recorded
        row("torch 8b-bf16", f"{what}, graph", part=f"failed: {first_line(error)}")


def recorded(step):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = step()
    return graph, chosen


def embed(product, texts, tokens, **other):
    """bge-large."""
    from transformers import BertConfig, BertModel

    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        **other,
    }
    torch.set_default_dtype(torch.bfloat16)
    config = BertConfig(**sizes, attn_implementation="sdpa")
    with torch.device(DEVICE):
        model = BertModel(config, add_pooling_layer=False).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, config.vocab_size, (texts, tokens), device=DEVICE)
    took = seconds(lambda: model(ids).last_hidden_state.float().cpu())
    hidden = config.hidden_size
    each = 2 * (4 * hidden**2 + 2 * hidden * config.intermediate_size) + 4 * hidden * tokens
    flops = each * texts * tokens * config.num_hidden_layers
    part = f"{100 * flops / took / product:.0f} % of the product"
    rate, per_s = f"{flops / took / 1e12:.0f} TFLOP/s", texts * tokens / took
    row("torch bge-large", f"embed {texts} x {tokens}, eager", 1e3 * took, per_s, rate, part)


def first_line(error):
    lines = str(error).splitlines()
    return lines[0][:80].replace("|", "/") if lines else type(error).__name__


@torch.inference_mode()
def main():
    if not torch.cuda.is_available():
        row("torch", "sees no GPU")
        return
    copy, product = limits()
    try:
        import transformers
    except ImportError as error:
        row("transformers", f"absent: {error}")
        return
    row(f"transformers {transformers.__version__}", "is what follows")
    parts = [
        lambda model: prefill(model, product, 8192),
        lambda model: decode(model, copy, 1, 1024),
        lambda model: decode(model, copy, 128, 1024),
    ]
    model = llama(llama_config())
    for part in parts:
        try:
            part(model)
        except Exception as error:
            row("torch 8b-bf16", "failed", part=first_line(error))
        torch.cuda.empty_cache()
    del model
    torch.cuda.empty_cache()
    for texts, tokens in [(64, 256), (32, 512)]:
        embed(product, texts, tokens)


if __name__ == "__main__":
    main()
