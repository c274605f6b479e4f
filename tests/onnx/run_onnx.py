#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs the ONNX backend node tests of `Attention` (opset 23 and later) and `LinearAttention` (opset 27) through the program `attend`.

    run_onnx.py ATTEND [--packages DIR] [--onnx VERSION] [--only TEXT] [--verbose]

The cases are read from the `onnx` package of PyPI, which is installed into DIR (pip --target; a build folder) unless Python has it. Exit code 77
where it cannot be had, 1 if a case failed.

How an Attention node becomes a question:
  3-D inputs            [B, n, H d] are cut into heads
  past_key, past_value  are put before K and V; present_key and present_value are compared with what attend was given
  is_causal             offset: tokens in the past; nonpad_kv_seqlen - n with a cache of the caller's; 0 (top-left) else
  nonpad_kv_seqlen      tensor lengths
  attn_mask             bool: tensor mask; float: tensor bias; keys behind its end are hidden
  left_window_size, right_window_size, softcap, scale    left, right, softcap, scale
  qk_matmul_output      is no output of attend (the scores are never stored): the case is asked again in f64 with the identity for V, whose
                        output is the probabilities p, and scores are log p + lse

How a LinearAttention node does:
  [B, n, H d]           is cut into heads, decay and beta too; a beta of one head serves all
  update_rule           linear, gated, delta, gated_delta: rule none, decay or gla, delta, gated_delta or kda by the width of decay
  past_state            tensor S0; present_state is compared with S

Bounds are those of the case (rtol, atol); where inputs are f16 or bf16 the wanted values were rounded at every step, and 4 units of that type are
added. Cases in NOT_OFFERED are named with their reason.
"""
import argparse
import importlib
import pathlib
import subprocess
import sys
import tempfile
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / "tools"))
try:
    import numpy as np
    from fovea_attend import Refused, attend, bfloat16
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

VERSION = "1.23.2"
NEEDS = ("protobuf", "ml_dtypes", "typing_extensions")  # what onnx imports besides numpy
MODULES = {"Attention": "attention", "LinearAttention": "linear_attention"}  # where the package builds the cases of an operator
SLOTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
KNOWN = {"is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision", "left_window_size", "right_window_size"}
NOT_OFFERED = {}  # case: why


def find_onnx(packages, version):
    try:
        return importlib.import_module("onnx")
    except ImportError:
        pass
    folder = pathlib.Path(packages) / f"onnx-{version}"
    if not (folder / "onnx").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder), f"onnx=={version}", *NEEDS]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            print(f"skipped: no package onnx, and pip says: {(run.stderr.strip().splitlines() or ['nothing'])[-1]}")
            sys.exit(77)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        print(f"skipped: {error}")
        sys.exit(77)


def cases():
    node = importlib.import_module("onnx.backend.test.case.node")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in MODULES.values():
            importlib.import_module("onnx.backend.test.case.node." + module)
    return [c for c in node._NodeTestCases if len(c.model.graph.node) == 1 and c.model.graph.node[0].op_type in MODULES]


def bits(x):
    return bfloat16.of(x.astype(np.float32)) if x.dtype.name == "bfloat16" else x


class Case:
    """A node of `Attention`, its inputs and the outputs it wants."""

    slots, results, known = SLOTS, OUTPUTS, KNOWN

    def __init__(self, onnx, case):
        n = case.model.graph.node[0]
        self.name, self.rtol, self.atol = case.name, case.rtol, case.atol
        self.opset = max(o.version for o in case.model.opset_import)
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute}
        inputs, outputs = case.data_sets[0]
        # Optional ones that are left out have an empty name and no value.
        self.inputs = dict(zip([s for s, name in zip(self.slots, n.input) if name], (np.asarray(x) for x in inputs)))
        self.outputs = dict(zip([s for s, name in zip(self.results, n.output) if name], (np.asarray(x) for x in outputs)))
        unknown = set(self.attributes) - self.known
        if unknown:
            raise Refused(f"attributes {sorted(unknown)} are not known to this runner")

    def heads(self, x, count):
        """[B, n, H d] as [B, H, n, d]."""
        return x if x.ndim == 4 else x.reshape(x.shape[0], x.shape[1], count, -1).transpose(0, 2, 1, 3)

    def question(self):
        """(configuration, tensors); K and V with the past before them."""
        a, x = self.attributes, self.inputs
        q, k, v = (self.heads(x[s], a.get("q_num_heads" if s == "Q" else "kv_num_heads")) for s in "QKV")
        past = x["past_key"].shape[2] if "past_key" in x else 0
        if past:
            k, v = np.concatenate([x["past_key"], k], 2), np.concatenate([x["past_value"], v], 2)
        n, m = q.shape[2], k.shape[2]
        c, t = {"mechanism": "softmax"}, {"q": q, "k": k, "v": v}
        if a.get("scale"):
            c["scale"] = float(a["scale"])
        if a.get("softcap", 0) > 0:
            c["softcap"] = float(a["softcap"])
        for key in ("left", "right"):
            if a.get(f"{key}_window_size", -1) >= 0:
                c[key] = int(a[f"{key}_window_size"])
        if a.get("is_causal"):
            c["causal"] = True
        if {"causal", "left", "right"} & set(c):
            if "nonpad_kv_seqlen" in x:
                t["offsets"] = (x["nonpad_kv_seqlen"].reshape(-1) - n).astype(np.int32)
            else:
                c["offset"] = past
        if "nonpad_kv_seqlen" in x:
            t["lengths"] = x["nonpad_kv_seqlen"].reshape(-1).astype(np.int32)
        if "attn_mask" in x:
            mask = x["attn_mask"]
            is_bool = mask.dtype == np.bool_
            mask = mask.astype(np.uint8) if is_bool else mask.astype(np.float32)
            pad = [(0, 0)] * (mask.ndim - 1) + [(0, m - mask.shape[-1])]
            mask = np.pad(mask, pad, constant_values=0 if is_bool else -np.inf)
            t["mask" if is_bool else "bias"] = mask if mask.ndim > 1 else mask[None]
        return c, t

    def scores(self, ask, c, t):
        """qk_matmul_output, read back through the identity."""
        mode = self.attributes.get("qk_matmul_output_mode", 0)
        if mode < 2:  # before masks and bias; mode 0 before the soft-cap, too
            c = {key: c[key] for key in c if key in ("mechanism", "scale") or (mode == 1 and key == "softcap")}
            t = {key: t[key] for key in "qkv"}
        m = t["k"].shape[2]
        eye = np.broadcast_to(np.eye(m), (*t["k"].shape[:2], m, m))
        y = ask(c, {**t, "q": t["q"].astype(np.float64), "k": t["k"].astype(np.float64), "v": eye})
        if mode == 3:
            return y["o"]
        with np.errstate(divide="ignore"):
            return np.log(y["o"]) + np.where(np.isneginf(y["lse"]), 0, y["lse"])[..., None]

    def differs(self, name, got, want):
        bound = self.rtol + {"float16": 4 * 2.0**-11, "bfloat16": 4 * 2.0**-8}.get(self.inputs[self.slots[0]].dtype.name, 0)
        got, want = np.asarray(got).astype(np.float64), want.astype(np.float64)
        if want.ndim == 3 and got.ndim == 4:
            got = got.transpose(0, 2, 1, 3).reshape(want.shape)
        if got.shape != want.shape:
            return f"{name} is {got.shape}, wanted {want.shape}"
        scale = np.abs(want[np.isfinite(want)]).max(initial=0) if bound > self.rtol else 0
        with np.errstate(invalid="ignore"):
            ok = (got == want) | (np.abs(got - want) <= self.atol + self.rtol * np.abs(want) + (bound - self.rtol) * scale)
        return None if ok.all() else f"{name}: {np.count_nonzero(~ok)} of {ok.size} differ, by up to {np.nanmax(np.abs(got - want)[~ok]):.3g}"

    def ask(self, program, c, t):
        return attend(c, binary=program, **{name: bits(x) for name, x in t.items()})

    def answers(self, program):
        c, t = self.question()
        got = {"Y": self.ask(program, c, t)["o"], "present_key": t["k"], "present_value": t["v"]}
        if "qk_matmul_output" in self.outputs:
            got["qk_matmul_output"] = self.scores(lambda c, t: self.ask(program, c, t), c, t)
        return got

    def run(self, program):
        got = self.answers(program)
        return next(filter(None, (self.differs(name, got[name], want) for name, want in self.outputs.items())), None)


class LinearCase(Case):
    """A node of `LinearAttention`."""

    slots = ("query", "key", "value", "past_state", "decay", "beta")
    results = ("output", "present_state")
    known = {"update_rule", "scale", "q_num_heads", "kv_num_heads", "chunk_size"}

    def question(self):
        a, x = self.attributes, self.inputs
        G, rule = a["kv_num_heads"], a.get("update_rule", b"gated_delta").decode()
        t = {name: self.heads(x[slot], a["q_num_heads"] if name == "q" else G) for name, slot in zip("qkv", self.slots)}
        if "decay" in x:
            t["g"] = self.heads(x["decay"], G)
        if "beta" in x:
            beta = x["beta"] if x["beta"].shape[2] == G else np.repeat(x["beta"], G, 2)
            t["beta"] = self.heads(beta, G)
        if "past_state" in x:
            t["S0"] = x["past_state"].astype(np.float32)
        by_channel = "g" in t and t["g"].shape[3] > 1
        rules = {"linear": "none", "gated": "gla" if by_channel else "decay", "delta": "delta", "gated_delta": "kda" if by_channel else "gated_delta"}
        scale = float(a.get("scale", 0.0)) or t["q"].shape[3] ** -0.5
        return {"mechanism": "linear", "rule": rules[rule], "map": "identity", "normalise": False, "scale": scale}, t

    def answers(self, program):
        got = self.ask(program, *self.question())
        return {"output": got["o"], "present_state": got["S"]}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("attend"), p.add_argument("--packages", default=str(pathlib.Path(tempfile.gettempdir()) / "fovea-onnx"))
    p.add_argument("--onnx", default=VERSION), p.add_argument("--only", default=""), p.add_argument("--verbose", action="store_true")
    a = p.parse_args()
    onnx = find_onnx(a.packages, a.onnx)
    passed, failed, listed, opsets = 0, 0, 0, {}
    for case in cases():
        if a.only not in case.name:
            continue
        if case.name in NOT_OFFERED:
            listed += 1
            print(f"not offered  {case.name}: {NOT_OFFERED[case.name]}")
            continue
        try:
            it = (LinearCase if case.model.graph.node[0].op_type == "LinearAttention" else Case)(onnx, case)
            opsets[it.opset] = opsets.get(it.opset, 0) + 1
            problem = it.run(a.attend)
        except Refused as line:
            problem = f"refused: {line}"
        passed, failed = passed + (problem is None), failed + (problem is not None)
        if problem or a.verbose:
            print(f"{'FAIL' if problem else 'ok  '}  {case.name}{': ' + problem if problem else ''}")
    print(f"onnx {onnx.__version__}: {passed} passed, {failed} failed, {listed} not offered (" + ", ".join(f"opset {o}: {k}" for o, k in sorted(opsets.items())) + ")")
    return 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
