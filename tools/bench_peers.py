#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times exact attention of fovea and of other libraries alternately, in one process, one thread each, and prints the ratios.

    cmake --build build/release --target fovea_peer && python3 tools/bench_peers.py [LIBRARY] [--only SUBSTRING] [--runs N]

LIBRARY: build/release/bin/libfovea_peer.so. The others come from PyPI, and each is optional:
    python3 -m pip install numpy torch onnxruntime onnx openvino
PyTorch is scaled_dot_product_attention (its CPU flash kernel), ONNX Runtime the operator Attention (opset 23), OpenVINO its ScaledDotProductAttention in f32.
`int8`: fovea computes in int8, rounding included, and the others in the type of the inputs, f32 or bf16.
Each run calls every library in turn; a figure is the median of the runs. `peak`: useful flops (causal: half of the square; backward: five products) over the
rate of fused multiply-adds measured between the calls; `stream`: bytes of K and V over the rate of reading them. Results are compared before anything is timed.
"""
import argparse
import ctypes
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
import numpy as np

CASES = [  # name, H, G, n, m, d, causal, type
    ("full D64 N512", 1, 1, 512, 512, 64, 0, "f32"), ("full D64 N2048", 1, 1, 2048, 2048, 64, 0, "f32"), ("full D64 N8192", 1, 1, 8192, 8192, 64, 0, "f32"),
    ("full D128 N2048", 1, 1, 2048, 2048, 128, 0, "f32"),
    ("causal D64 N512", 1, 1, 512, 512, 64, 1, "f32"), ("causal D64 N2048", 1, 1, 2048, 2048, 64, 1, "f32"), ("causal D64 N8192", 1, 1, 8192, 8192, 64, 1, "f32"),
    ("causal D128 N2048", 1, 1, 2048, 2048, 128, 1, "f32"), ("causal D128 N2048 H32/8", 32, 8, 2048, 2048, 128, 1, "f32"),
    ("causal D128 N2048 bf16", 1, 1, 2048, 2048, 128, 1, "bf16"),
    ("causal D64 N2048 int8", 1, 1, 2048, 2048, 64, 1, "int8"), ("causal D64 N2048 bf16 int8", 1, 1, 2048, 2048, 64, 1, "bf16 int8"),
    ("full D64 N2048 int8", 1, 1, 2048, 2048, 64, 0, "int8"), ("causal D128 N2048 int8", 1, 1, 2048, 2048, 128, 1, "int8"),
    ("decode D128 N32768 H8/8", 8, 8, 1, 32768, 128, 0, "f32"), ("decode D128 N32768 H32/8", 32, 8, 1, 32768, 128, 0, "f32"),
    ("decode D128 N32768 H32/8 bf16", 32, 8, 1, 32768, 128, 0, "bf16"),
    ("backward causal D64 N2048 H4", 4, 4, 2048, 2048, 64, 1, "f32"),
]


def room(shape, dtype):
    """An array that begins with a cache line, as PyTorch's own tensors do; numpy's begin anywhere."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(count + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first:first + count].view(dtype).reshape(shape)


def aligned(x):
    y = room(x.shape, x.dtype)
    y[...] = x
    return y


class Fovea:
    name = "fovea"

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.fovea_peer_peak.restype = ctypes.c_double
        self.library.fovea_peer_stream.restype = ctypes.c_double

    def forward(self, q, k, v, causal, kind):
        out = room(q.shape, q.dtype)
        sizes = [ctypes.c_ssize_t(x) for x in (q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])]
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (q, k, v, out)]
        which = ctypes.c_int({"f32": 0, "bf16": 1, "f16": 2, "int8": 3, "bf16 int8": 4}[kind])

        def call(held=(q, k, v)):  # the pointers do not keep their arrays alive
            if self.library.fovea_peer_prefill(*pointers, *sizes, ctypes.c_int(causal), which):
                raise RuntimeError("fovea refused the call")
            return out
        return call

    def backward(self, q, k, v, do, causal):
        out, lse = room(q.shape, q.dtype), room(q.shape[:3], np.float32)
        grads = [room(x.shape, x.dtype) for x in (q, k, v)]
        sizes = [ctypes.c_ssize_t(x) for x in (q.shape[1], k.shape[1], q.shape[2], q.shape[3])]
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (q, k, v, out, lse, do, *grads)]

        def call(forward=0, held=(q, k, v, out, lse, do)):  # the pointers do not keep their arrays alive
            if self.library.fovea_peer_train(*pointers, *sizes, ctypes.c_int(causal), ctypes.c_int(forward)):
                raise RuntimeError("fovea refused the call")
            return grads
        call(1)
        return call


class Torch:
    name = "PyTorch"

    def __init__(self):
        import torch
        self.torch = torch
        torch.set_num_threads(1)
        self.sdpa = torch.nn.functional.scaled_dot_product_attention

    def tensors(self, arrays, kind):
        if not kind.startswith("bf16"):
            return [self.torch.from_numpy(x) for x in arrays]
        return [self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16) for x in arrays]

    def forward(self, q, k, v, causal, kind):
        q, k, v = self.tensors((q, k, v), kind)
        more = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}

        def call():
            with self.torch.inference_mode():
                return self.sdpa(q, k, v, is_causal=bool(causal), **more)
        return call

    def backward(self, q, k, v, do, causal):
        q, k, v, do = self.tensors((q, k, v, do), "f32")
        for x in (q, k, v):
            x.requires_grad_(True)
        out = self.sdpa(q, k, v, is_causal=bool(causal))
        return lambda: self.torch.autograd.grad(out, (q, k, v), do, retain_graph=True)


class OnnxRuntime:
    name = "ONNX Runtime"

    def __init__(self):
        import onnx
        import onnxruntime
        self.onnx, self.runtime = onnx, onnxruntime

    def forward(self, q, k, v, causal, kind):
        if kind.startswith("bf16"):
            return None
        h, t = self.onnx.helper, self.onnx.TensorProto.FLOAT
        node = h.make_node("Attention", ["q", "k", "v"], ["o"], is_causal=causal)
        graph = h.make_graph([node], "attention", [h.make_tensor_value_info(n, t, x.shape) for n, x in zip("qkv", (q, k, v))],
                             [h.make_tensor_value_info("o", t, q.shape)])
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 23)], ir_version=10)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = self.runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"q": q, "k": k, "v": v}
        return lambda: session.run(None, feed)[0]


class OpenVino:
    name = "OpenVINO"

    def __init__(self):
        import openvino
        self.openvino = openvino

    def forward(self, q, k, v, causal, kind):
        if kind.startswith("bf16") or q.shape[1] != k.shape[1] or q.shape[2] != k.shape[2]:
            return None
        ops = self.openvino.opset13
        inputs = [ops.parameter(x.shape, np.float32) for x in (q, k, v)]
        model = self.openvino.Model([ops.scaled_dot_product_attention(*inputs, causal=bool(causal))], inputs)
        compiled = self.openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1})
        request = compiled.create_infer_request()
        for i, x in enumerate((q, k, v)):
            request.set_input_tensor(i, self.openvino.Tensor(x, shared_memory=True))

        def call():
            request.infer()
            return request.get_output_tensor(0).data
        return call


def to_f32(x, kind):
    if hasattr(x, "detach"):
        return x.detach().float().numpy()
    x = np.asarray(x)
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def difference(a, b):
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = pathlib.Path(__file__).resolve().parent.parent
    parser.add_argument("library", nargs="?", default=root / "build/release/bin/libfovea_peer.so")
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=int, default=9)
    a = parser.parse_args()
    if not pathlib.Path(a.library).exists():
        print(f"{a.library} is missing: cmake --build build/release --target fovea_peer", file=sys.stderr)
        return 2
    fovea = Fovea(pathlib.Path(a.library).resolve())
    peers = [fovea]
    for kind in (Torch, OnnxRuntime, OpenVino):
        try:
            peers.append(kind())
        except ImportError as error:
            print(f"{kind.name}: left out ({error})")
    rng = np.random.default_rng(1)
    print(f"{'case':32} {'fovea ms':>9} {'':>11}" + "".join(f"{p.name:>22}" for p in peers[1:]))
    for name, H, G, n, m, d, causal, kind in CASES:
        if a.only not in name:
            continue
        make = lambda heads, rows: rng.standard_normal((1, heads, rows, d), dtype=np.float32)
        q, k, v, do = make(H, n), make(G, m), make(G, m), make(H, n)
        if kind.startswith("bf16"):
            q, k, v = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (q, k, v))
        q, k, v, do = (aligned(x) for x in (q, k, v, do))
        calls = []
        for p in peers:
            try:
                if name.startswith("backward"):
                    call = p.backward(q, k, v, do, causal) if hasattr(p, "backward") else None
                else:
                    call = p.forward(q, k, v, causal, kind)
                if call is not None:
                    got = call()
                    got = [to_f32(x, kind) for x in (got if name.startswith("backward") else [got])]
                    if not calls:
                        want = got
                    else:
                        worst = max(difference(x, y) for x, y in zip(got, want))
                        if not worst < (6e-2 if kind.endswith("int8") else 2e-2 if kind == "bf16" else 1e-4):
                            print(f"{p.name}: {name}: differs by {worst:.1e} of the largest element")
                            call = None
            except Exception as error:  # a peer that cannot is left out, and says why
                print(f"{p.name}: {name}: {str(error).splitlines()[0]}")
                call = None
            calls.append(call)
        times, limits = [[] for _ in peers], []
        for _ in range(a.runs):
            for i, call in enumerate(calls):
                if call is None:
                    continue
                repeat = 1 if n * m * H > 8e6 else 8
                start = time.perf_counter()
                for _ in range(repeat):
                    call()
                times[i].append((time.perf_counter() - start) / repeat)
            decode = name.startswith("decode")
            limits.append(fovea.library.fovea_peer_stream(ctypes.c_void_p(k.ctypes.data), ctypes.c_size_t(k.nbytes)) if decode else fovea.library.fovea_peer_peak())
        work = 2 * k.nbytes if decode else 4.0 * H * n * m * d * (0.5 if causal else 1) * (2.5 if name.startswith("backward") else 1)
        limit = statistics.median(limits)
        share = lambda t: work / t / limit
        own = statistics.median(times[0])
        line = f"{name:32} {own * 1e3:9.3f} {share(own):5.0%} {'stream' if decode else 'peak':>5}"
        for t in times[1:]:
            line += f"{statistics.median(t) / own:14.2f}x ({share(statistics.median(t)):4.0%})" if t else f"{'-':>22}"
        print(line, flush=True)
    print("x: time of the peer over time of fovea. In brackets: its share of the same limit.")
    return 0


sys.exit(main())
