#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The program `engine` from outside. What it cannot do ends with one line on stderr and exit code 2; with a model, the same seed gives the same text
on one thread and on two, and captured tensors are those that transformers gave.

  check_program.py ENGINE [MODEL_DIR]      exit code 0, 1, or 77 where numpy, or a MODEL_DIR that was given, is missing
"""
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
try:
    import numpy as np
    from fovea_attend import read_safetensors, write_safetensors
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

ENGINE = sys.argv[1]
MODEL = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else None
failures = 0


def check(good, what):
    global failures
    failures += not good
    print("ok  " if good else "FAIL", what)


def run(*arguments):
    return subprocess.run([ENGINE, *map(str, arguments)], capture_output=True, text=True, check=False)


def refused(what, *arguments):
    r = run(*arguments)
    lines = r.stderr.splitlines()
    good = r.returncode == 2 and len(lines) == 1 and lines[0].startswith("engine: ") and what in lines[0] and not r.stdout
    check(good, f"refused: {what}" + ("" if good else f": exit code {r.returncode}, said {r.stderr!r}, wrote {r.stdout[:80]!r}"))


def tiny(folder):
    width, heads, kv_heads, dim, mlp, vocabulary = 24, 4, 2, 8, 40, 50
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim,
              "hidden_size": width, "intermediate_size": mlp, "vocab_size": vocabulary, "max_position_embeddings": 64, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(1)
    weights = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        weights |= {at + "input_layernorm.weight": (width,), at + "post_attention_layernorm.weight": (width,),
                    at + "self_attn.q_proj.weight": (heads * dim, width), at + "self_attn.k_proj.weight": (kv_heads * dim, width),
                    at + "self_attn.v_proj.weight": (kv_heads * dim, width), at + "self_attn.o_proj.weight": (width, heads * dim),
                    at + "mlp.gate_proj.weight": (mlp, width), at + "mlp.up_proj.weight": (mlp, width), at + "mlp.down_proj.weight": (width, mlp)}
    write_safetensors(folder / "model.safetensors", {k: rng.standard_normal(s).astype(np.float16) for k, s in weights.items()})
    (rng.integers(0, vocabulary, 64).astype("<u4")).tofile(folder / "ids.bin")


def check_refusals(folder):
    tiny(folder)
    ids, policy = folder / "ids.bin", folder / "policy.json"
    model = ["--model", folder, "--tokens", ids, "--context", 32]
    softmax = {"mechanism": "softmax", "causal": True}

    def with_policy(*overrides):
        policy.write_text(json.dumps({"fovea_policy": 1, "default": softmax, "overrides": list(overrides)}))
        return ["perplexity", *model, "--attention", policy]

    r = run("perplexity", *model, "--json")
    result = json.loads(r.stdout) if r.returncode == 0 else {}
    check(result.get("predicted") == 62 and abs(np.exp(result["mean_nll"]) - result["perplexity"]) < 1e-6 * result["perplexity"], "perplexity in JSON")
    for more in (["--chunk", 5], ["--batch", 2], ["--threads", 2], ["--offsets", "0,32"]):
        other = json.loads(run("perplexity", *model, "--json", *more).stdout)
        check(abs(other["mean_nll"] / result["mean_nll"] - 1) < 1e-5, f"the same with {more[0]} {more[1]}")
    window = run(*with_policy({"layers": [1, 1], "heads": [2, 3], "attention": softmax | {"window": 4, "store": "ring"}}), "--json")
    check(window.returncode == 0 and json.loads(window.stdout)["mean_nll"] != result["mean_nll"], "a window in two heads of one layer")

    refused("layer 31", *with_policy({"layers": [31, 31], "attention": softmax}))
    refused("head", *with_policy({"heads": [9], "attention": softmax}))
    refused("untrained", *with_policy({"attention": {"mechanism": "linear", "map": "t2r", "head_dim": 8, "features": 8, "seed": 1}}))
    refused("missing.safetensors: no such file", *with_policy({"attention": {"mechanism": "linear", "map": "t2r"}, "weights": "missing.safetensors"}))
    refused("t2r", *with_policy({"attention": {"mechanism": "linear", "map": "t2r"}}))
    refused("causal", *with_policy({"attention": {"mechanism": "softmax"}}))
    refused("ends at token", "perplexity", *model, "--offsets", "40")
    refused("layer 2 does not exist", "capture", ids, "--model", folder, "--layers", "0,2", "--count", 8)
    refused("tokens", "capture", ids, "--model", folder, "--count", 65)
    refused("threads", "perplexity", *model, "--threads", 0)
    refused("--tokens or --text", "perplexity", "--model", folder)
    refused("no such file", "perplexity", "--model", folder / "nowhere", "--tokens", ids)
    (folder / "odd.bin").write_bytes(b"12345")
    refused("4 bytes each", "perplexity", "--model", folder, "--tokens", folder / "odd.bin")

    out = folder / "qkv.safetensors"
    r = run("capture", ids, "--model", folder, "--layers", "0,1", "--count", 20, "--offset", 3, "--out", out)
    tensors = [read_safetensors(folder / f"qkv.layer{layer}.safetensors") for layer in (0, 1)]
    tensors = [t[0] if isinstance(t, tuple) else t for t in tensors]
    shapes = [(t["q"].shape, t["k"].shape, t["v"].shape) for t in tensors]
    check(r.returncode == 0 and shapes == [((4, 20, 8), (2, 20, 8), (2, 20, 8))] * 2, "captured shapes")
    norms = np.linalg.norm(tensors[0]["k"], axis=-1)
    check(np.isfinite(norms).all() and (norms > 0).all(), "captured numbers")
    check(not np.array_equal(tensors[0]["k"], tensors[0]["v"]), "captured keys are not the values")

    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    refused("model.safetensors", "perplexity", *model)


def check_text(model):
    prompt = ["generate", "--model", model, "--prompt", "Once upon a time, there was a", "--n", 24, "--temperature", 0.9, "--top-p", 0.9]
    first = run(*prompt, "--seed", 5)
    check(first.returncode == 0 and len(first.stdout) > 60, "text: " + first.stdout[:80].replace("\n", " "))
    check(run(*prompt, "--seed", 5, "--threads", 2).stdout == first.stdout, "the same seed gives the same text on two threads")
    check(run(*prompt, "--seed", 6).stdout != first.stdout, "another seed gives another text")
    refused("the context holds", *prompt, "--context", 5)


def check_capture(model, folder):
    """Romans 1 onwards against the built-in capture of the same text and weights, made with transformers (data/README.md)."""
    out = folder / "qkv.safetensors"
    r = run("capture", ROOT / "tests/data/model_tokens.bin", "--model", model, "--layers", 14, "--offset", 1024, "--out", out)
    check(r.returncode == 0, "capture of layer 14")
    got, want = read_safetensors(out), read_safetensors(ROOT / "data/smollm2_layer14.safetensors")
    for name in "qkv":
        error = np.abs(got[name] - want[name].astype(np.float32)).max() / np.abs(want[name]).max()
        check(got[name].shape == want[name].shape and error < 4e-3, f"captured {name}: off by {error:.1e} of the largest")


if MODEL is None:
    with tempfile.TemporaryDirectory() as name:
        check_refusals(pathlib.Path(name))
elif not (MODEL / "model.safetensors").exists():
    print(f"skipped: no model in {MODEL}")
    sys.exit(77)
else:
    check_text(MODEL)
    with tempfile.TemporaryDirectory() as name:
        check_capture(MODEL, pathlib.Path(name))
sys.exit(failures > 0)
