#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Compares the program `attend` with PyTorch, for every mechanism whose answer PyTorch can state. PyTorch is optional: nothing else needs it.

    python3 tools/check_torch.py [ATTEND] [--seed N] [--verbose]          ATTEND: build/release/bin/attend

Softmax is compared with torch.nn.functional.scaled_dot_product_attention in float64 (full, causal, grouped heads, masks, biases, scale); the other
mechanisms with their formulas written in torch operations in float64. Inputs are random, in f32, f64, f16 and bf16; the answer is computed from the
rounded inputs, so that only the arithmetic differs. Exit code 1 if anything differs, 77 without PyTorch.

    python3 -m pip install torch                       (or its CPU build; see pytorch.org)
"""
import argparse
import math
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
try:
    import numpy as np
    import torch
    from fovea_attend import attend, bfloat16, program
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

SDPA = torch.nn.functional.scaled_dot_product_attention
BOUND = {"f64": 1e-11, "f32": 2e-5, "f16": 2e-5, "bf16": 2e-5}  # of the largest |wanted|; inputs are rounded before both sides see them
MINUS_INF = float("-inf")


def stored(x, dtype):
    """(what attend reads, the same numbers in float64) of a float64 tensor."""
    if dtype == "bf16":
        bits = bfloat16.of(x.float().numpy())
        return bits, torch.from_numpy(bits.to_float().astype(np.float64))
    y = x.numpy().astype({"f64": np.float64, "f32": np.float32, "f16": np.float16}[dtype])
    return y, torch.from_numpy(y.astype(np.float64))


def grouped(x, H):
    return x.repeat_interleave(H // x.shape[1], dim=1)


class Checks:
    def __init__(self, binary, verbose):
        self.binary, self.verbose = binary, verbose
        self.passed = self.failed = 0

    def compare(self, name, dtype, got, want, bound=None):
        want = want.numpy()
        bound = bound or BOUND[dtype]
        inf = np.isneginf(want)
        if got.shape != want.shape:
            worst, ok = f"shape {got.shape}, wanted {want.shape}", False
        elif not (np.isneginf(got) == inf).all() or not np.isfinite(got[~inf]).all():
            worst, ok = "NaN or infinities in the wrong places", False
        else:
            worst = float(np.abs(got[~inf] - want[~inf]).max() / max(np.abs(want[~inf]).max(), 1e-30)) if (~inf).any() else 0.0
            ok = worst <= bound
            worst = f"{worst:.1e} (allowed {bound:.0e})"
        self.passed, self.failed = self.passed + ok, self.failed + (not ok)
        if not ok or self.verbose:
            print(f"{'ok  ' if ok else 'FAIL'}  {name:34} {dtype:5} {worst}")

    def __call__(self, name, config, inputs, want, dtypes=("f32", "f64", "f16", "bf16"), weights=(), bound=None):
        """want(float64 tensors) -> o, or {"o": ..., "lse": ...}. Tensors named in `weights` and all but q, k, v stay f32."""
        for dtype in dtypes:
            given, wide = {}, {}
            for key, x in inputs.items():
                if not x.is_floating_point():
                    given[key], wide[key] = x.numpy(), x
                else:
                    given[key], wide[key] = stored(x, dtype if key in "qkv" or (dtype == "f64" and key not in weights) else "f32")
            answers = want(**wide)
            answers = answers if isinstance(answers, dict) else {"o": answers}
            for how in ({}, {"threads": 2}):
                got = attend(config, binary=self.binary, **given, **how)
                for key, y in answers.items():
                    self.compare(f"{name} {key}" + (" 2 threads" if how else ""), dtype, got[key], y, bound if dtype != "f64" else None)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def scores_lse(q, k, bias, scale):
    s = grouped(k, q.shape[1])
    return torch.logsumexp(q @ s.transpose(-1, -2) * scale + bias, -1)


def check_softmax(check):
    def sdpa(bias=None, scale=None, **options):
        def want(q, k, v, mask=None, **more):
            H, d = q.shape[1], q.shape[-1]
            hidden = more.get("bias", bias)
            if mask is not None:
                hidden = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask == 0, MINUS_INF)
            k2, v2 = grouped(k, H), grouped(v, H)
            o = SDPA(q, k2, v2, attn_mask=hidden, scale=scale, **options)
            if hidden is None:
                hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.float64)
                if options.get("is_causal"):
                    hidden = hidden.masked_fill(~torch.ones_like(hidden, dtype=torch.bool).tril(), MINUS_INF)
            return {"o": torch.nan_to_num(o), "lse": scores_lse(q, k, hidden, scale or d ** -0.5)}
        return want

    full = {"mechanism": "softmax"}
    shapes = {"square": (2, 3, 3, 65, 65, 64, 64), "rectangular": (1, 4, 4, 17, 130, 40, 24), "grouped": (2, 8, 2, 33, 70, 128, 128),
              "one query": (2, 8, 1, 1, 300, 64, 64), "narrow": (1, 2, 2, 9, 20, 1, 3), "wide": (1, 1, 1, 20, 50, 256, 256)}
    for name, (B, H, G, n, m, d, e) in shapes.items():
        x = {"q": normal(B, H, n, d), "k": normal(B, G, m, d), "v": normal(B, G, m, e)}
        check(f"softmax full, {name}", full, x, sdpa())
        check(f"softmax causal top-left, {name}", {**full, "causal": True, "align": "top_left"}, x, sdpa(is_causal=True))
        check(f"softmax scale, {name}", {**full, "scale": 0.3}, x, sdpa(scale=0.3))
        corner = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        bias = torch.zeros(n, m, dtype=torch.float64).masked_fill(~corner, MINUS_INF)
        check(f"softmax causal bottom-right, {name}", {**full, "causal": True}, x, sdpa(bias=bias))
        mask = (torch.rand(B, 1, n, m) < 0.4).to(torch.uint8)
        mask[:, :, 0] = 0  # a row that sees nothing: zeros, and LSE = -inf
        check(f"softmax mask, {name}", full, {**x, "mask": mask}, sdpa())
        check(f"softmax bias, {name}", full, {**x, "bias": normal(1, H, n, m)}, sdpa(), dtypes=("f32", "f16", "bf16"))
        near = corner & ~torch.ones(n, m, dtype=torch.bool).tril(m - n - 8)
        bias = torch.zeros(n, m, dtype=torch.float64).masked_fill(~near, MINUS_INF)
        check(f"softmax window of 8, {name}", {**full, "causal": True, "window": 8}, x, sdpa(bias=bias))


def linear_formula(phi_q, phi_k, eps=0.0, scale=1.0, causal=True, normalise=True, clamp=0.0):
    def want(q, k, v, **weights):
        H = q.shape[1]
        fq, fk = phi_q(q, **weights), grouped(phi_k(k, **weights), H)
        a = fq @ fk.transpose(-1, -2)
        if causal:
            a = a.tril()
        o = a @ grouped(v, H)
        if normalise:
            o = o / (a.sum(-1, keepdim=True) + eps).clamp(min=clamp or -math.inf)
        return scale * o
    return want


def check_linear(check):
    B, H, G, n, d, e = 2, 4, 2, 77, 32, 24
    x = {"q": normal(B, H, n, d), "k": normal(B, G, n, d), "v": normal(B, G, n, e)}
    linear = {"mechanism": "linear"}

    def elu1(t, **_):
        return torch.nn.functional.elu(t) + 1

    for causal in (True, False):
        check(f"linear elu1, causal {causal}", {**linear, "map": "elu1", "causal": causal}, x, linear_formula(elu1, elu1, causal=causal))
    check("linear identity", {**linear, "map": "identity", "normalise": False, "scale": 0.25}, x,
          linear_formula(lambda t, **_: t, lambda t, **_: t, normalise=False, scale=0.25))

    def rows(t, w):  # one weight [r, d] for all heads
        return torch.einsum("bhnd,rd->bhnr", t, w)

    W = {"W": normal(20, d) / math.sqrt(d), "b": normal(20)}
    check("linear t2r", {**linear, "map": "t2r", "clamp": 0.01}, {**x, **W}, t2r_formula(d), weights=("W", "b"))

    def hedgehog(t, W, b):
        y = 2 * (rows(t, W) + b)
        return torch.softmax(torch.cat([y, -y], -1), -1)

    def hedgehog_two(t, W, b):
        y = rows(t, W) + b
        return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1)

    W = {"W": normal(d, d) / math.sqrt(d), "b": normal(d)}
    for name, phi in (("hedgehog", hedgehog), ("hedgehog_two", hedgehog_two)):
        check(f"linear {name}", {**linear, "map": name}, {**x, **W}, linear_formula(phi, phi), weights=("W", "b"))

    def favor_plain(t, W):
        t = t * d ** -0.25
        return torch.exp(rows(t, W) - (t * t).sum(-1, keepdim=True) / 2)

    check("linear favor_plain", {**linear, "map": "favor_plain"}, {**x, "W": normal(40, d)}, linear_formula(favor_plain, favor_plain),
          weights=("W",), bound=1e-4)

    def taylor(t, **_):
        square = torch.einsum("bhni,bhnj->bhnij", t, t).flatten(-2)
        r = math.sqrt(t.shape[-1])
        return torch.cat([torch.ones_like(t[..., :1]), t / math.sqrt(r), square / (math.sqrt(2) * r)], -1)

    for name in ("taylor2", "taylor2_packed"):
        check(f"linear {name}", {**linear, "map": name}, x, linear_formula(taylor, taylor), bound=1e-4)


def t2r_formula(d):
    def want(q, k, v, W, b):
        H = q.shape[1]
        fq = torch.relu(torch.einsum("bhnd,rd->bhnr", q * d ** -0.5, W) + b)
        fk = grouped(torch.relu(torch.einsum("bhnd,rd->bhnr", k, W) + b), H)
        a = (fq @ fk.transpose(-1, -2)).tril()
        return a @ grouped(v, H) / a.sum(-1, keepdim=True).clamp(min=0.01)
    return want


def recurrence(vector_decay, delta):
    """S_t = A_t S_{t-1} + k_t x_t^T, token by token."""
    def want(q, k, v, g=None, beta=None, S0=None):
        B, H, n, d = q.shape
        S = torch.zeros(B, H, d, v.shape[-1], dtype=torch.float64) if S0 is None else S0.clone()
        out = []
        for t in range(n):
            if g is not None:
                S = S * torch.exp(g[:, :, t])[..., None] if vector_decay else S * torch.exp(g[:, :, t])[..., None, None]
            x = v[:, :, t]
            if delta:
                x = beta[:, :, t, None] * (x - torch.einsum("bhde,bhd->bhe", S, k[:, :, t]))
            S = S + torch.einsum("bhd,bhe->bhde", k[:, :, t], x)
            out.append(torch.einsum("bhde,bhd->bhe", S, q[:, :, t]))
        return {"o": d ** -0.5 * torch.stack(out, 2), "S": S}
    return want


def check_recurrences(check):
    B, H, n, d, e = 2, 3, 70, 16, 24
    x = {"q": normal(B, H, n, d), "k": torch.nn.functional.normalize(normal(B, H, n, d), dim=-1), "v": normal(B, H, n, e)}
    g, wide_g = -torch.rand(B, H, n, dtype=torch.float64), -torch.rand(B, H, n, d, dtype=torch.float64)
    beta, S0 = torch.rand(B, H, n, dtype=torch.float64), normal(B, H, d, e)
    config = {"mechanism": "linear", "map": "identity", "scale": d ** -0.5}
    for rule, inputs, wide, delta in (("decay", {"g": g}, False, False), ("gla", {"g": wide_g}, True, False), ("delta", {"beta": beta}, False, True),
                                      ("gated_delta", {"g": g, "beta": beta}, False, True), ("kda", {"g": wide_g, "beta": beta}, True, True)):
        for start in ({}, {"S0": S0}):
            check(f"linear {rule}{' from S0' if start else ''}", {**config, "rule": rule}, {**x, **inputs, **start}, recurrence(wide, delta), bound=1e-4)


def dct_matrix(d):
    """Orthonormal DCT-II: row u holds cos(pi (2 x + 1) u / 2 d)."""
    u, x = torch.arange(d, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)[None]
    C = torch.cos(math.pi * (2 * x + 1) * u / (2 * d)) * math.sqrt(2 / d)
    C[0] /= math.sqrt(2)
    return C


def check_dijiang(check):
    B, H, G, n, d, e, blocks = 2, 4, 2, 60, 32, 24, 2
    x = {"q": normal(B, H, n, d) / 2, "k": normal(B, G, n, d) / 2, "v": normal(B, G, n, e)}
    t, D, r = normal(d), torch.rand(d, dtype=torch.float64) + 0.5, torch.rand(blocks * d, dtype=torch.float64) * d ** 0.5
    signs = torch.where(torch.rand(blocks, d) < 0.5, 1.0, -1.0).double()
    C = dct_matrix(d)

    def paper(y, t, D):
        return D * torch.exp(t * (y @ C.T))

    def released(y, t):
        return torch.softmax(t * (y @ C), -1)

    def unbiased(y, r, signs):
        y = y * d ** -0.25
        half = (y * y).sum(-1, keepdim=True) / 2
        parts = [torch.exp(r[b * d:(b + 1) * d] * ((y * signs[b]) @ C.T) - half) for b in range(blocks)]
        return torch.cat(parts, -1) / math.sqrt(blocks * d)

    for causal in (True, False):
        config = {"mechanism": "dijiang", "causal": causal}
        for form, phi, weights, divide in (("paper", paper, {"t": t, "D": D}, False), ("released", released, {"t": t}, False),
                                           ("unbiased", unbiased, {"r": r, "signs": signs}, True)):
            check(f"dijiang {form}, causal {causal}", {**config, "form": form, **({"blocks": blocks} if form == "unbiased" else {})}, {**x, **weights},
                  linear_formula(phi, phi, causal=causal, normalise=divide), weights=tuple(weights), bound=1e-4)


def check_projections(check):
    B, H, G, n, m, d, e, slots = 2, 4, 2, 30, 48, 32, 24, 8
    x = {"q": normal(B, H, n, d), "k": normal(B, G, m, d), "v": normal(B, G, m, e)}

    def linformer(project):
        def want(q, k, v, **w):
            k2, v2 = project(k, v, **w)
            return {"o": SDPA(q, grouped(k2, q.shape[1]), grouped(v2, q.shape[1]))}
        return want

    def pool(f):
        return linformer(lambda k, v: tuple(f(t.unflatten(2, (slots, m // slots))) for t in (k, v)))

    E = {"E": normal(m, slots) / math.sqrt(m), "F": normal(m, slots) / math.sqrt(m)}
    config = {"mechanism": "linformer", "slots": slots}
    check("linformer linear", config, {**x, **E}, linformer(lambda k, v, E, F: (E.T @ k, F.T @ v)), weights=("E", "F"))
    check("linformer mean", {**config, "projection": "mean"}, x, pool(lambda t: t.mean(3)))
    check("linformer max", {**config, "projection": "max"}, x, pool(lambda t: t.amax(3)))

    efficient = {"mechanism": "efficient"}
    check("efficient softmax", efficient, x,
          lambda q, k, v: torch.softmax(q, -1) @ grouped(torch.softmax(k, 2).transpose(-1, -2) @ v, H))
    check("efficient scaling", {**efficient, "normalisation": "scaling"}, x,
          lambda q, k, v: q @ grouped(k.transpose(-1, -2) @ v, H) / m)

    def prefix(q, k, v):
        a = torch.exp(k)[..., None]
        den, num = a.cumsum(2), (a * v[..., None, :]).cumsum(2)
        return torch.einsum("bhnd,bhnde->bhne", torch.softmax(q, -1), grouped(num / den, H))

    check("efficient causal", {**efficient, "causal": True}, {**x, "q": normal(B, H, m, d)}, prefix)


def check_hybrid(check):
    B, H, G, n, d, block = 2, 4, 2, 96, 32, 16
    x = {"q": normal(B, H, n, d), "k": normal(B, G, n, d), "v": normal(B, G, n, d)}
    blocks = (torch.rand(B, H, n // block, n // block) < 0.5).to(torch.uint8)
    blocks[..., 0] = 1
    config = {"mechanism": "hybrid", "block_q": block, "block_k": block, "compensate": "none"}

    def dense(causal):
        def want(q, k, v, blocks):
            seen = blocks.repeat_interleave(block, 2).repeat_interleave(block, 3).bool()
            return SDPA(q, grouped(k, H), grouped(v, H), attn_mask=seen.tril() if causal else seen)
        return want

    for causal in (False, True):
        check(f"hybrid blocks, causal {causal}", {**config, "causal": causal}, {**x, "blocks": blocks}, dense(causal))

    def pooled(q, k, v, blocks):
        k, v = grouped(k, H), grouped(v, H)
        seen = blocks.repeat_interleave(block, 2).repeat_interleave(block, 3).bool()
        mean = [t.unflatten(2, (n // block, block)).mean(3) for t in (k, v)]
        skipped = ~blocks.repeat_interleave(block, 2).bool()
        s = (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(~seen, MINUS_INF)
        z = (q @ mean[0].transpose(-1, -2) / math.sqrt(d) + math.log(block)).masked_fill(~skipped, MINUS_INF)
        return torch.softmax(torch.cat([s, z], -1), -1) @ torch.cat([v, mean[1]], 2)

    check("hybrid pooled tokens", {**config, "compensate": "zeroth"}, {**x, "blocks": blocks}, pooled)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attend", nargs="?", default=program())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if not os.access(options.attend, os.X_OK):
        parser.error(f"no program {options.attend}; build it (bash tools/demo) or name it")
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    check = Checks(options.attend, options.verbose)
    for part in (check_softmax, check_linear, check_recurrences, check_dijiang, check_projections, check_hybrid):
        part(check)
    print(f"PyTorch {torch.__version__}: {check.passed} comparisons passed, {check.failed} failed")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
