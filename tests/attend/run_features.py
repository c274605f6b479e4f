#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Asks `attend` for softmax with random masks, biases, positions and stores, and compares with their formulas in float64.

    run_features.py ATTEND [--trials N] [--seed S] [--verbose]

Every trial draws one rule of each kind, or none: what rows see, what is added to scores, where rows stand, RoPE, sequences, pages. It runs
in f64 (bound 1e-9 of the largest value) and in f32 (2e-5), over pages, and by steps where a state can express it; gradients are compared
with central differences of the formulas. A failing trial is printed as its seed and configuration. Exit code 1 if anything failed.
"""
import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / "tools"))
try:
    import numpy as np
    from fovea_attend import Refused, attend
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

INF = np.inf


def t5_bucket(distance, buckets, most, both):
    """The formula of the T5 code, in float32 as there."""
    first = np.zeros_like(distance)
    if both:
        buckets //= 2
        first = (distance > 0) * buckets
    away = np.abs(distance) if both else np.maximum(-distance, 0)
    exact = buckets // 2
    share = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(most / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + share.astype(np.int64), buckets - 1)
    return first + np.where(away < exact, away, far)


def frequencies(c, width):
    base, i = c["rope_theta"], np.arange(0, width, 2)
    f, scale = base ** (-i / width), 1.0
    kind, factor = c.get("rope_scaling", "none"), c.get("rope_factor", 1)
    if kind == "linear":
        f = f / factor
    elif kind == "ntk":
        f = (base * factor ** (width / (width - 2))) ** (-i / width)
    elif kind == "yarn":
        at = [width * np.log(c["rope_original"] / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (32, 1)]
        low, high = max(np.floor(at[0]), 0), min(np.ceil(at[1]), width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0, 1)
        f, scale = f * (1 - ramp) + f / factor * ramp, 0.1 * np.log(factor) + 1
    elif kind == "llama3":
        wave, n = 2 * np.pi / f, c["rope_original"]
        blend = (n / wave - 1) / 3
        f = np.where(wave > n, f / factor, np.where(wave < n / 4, f, (1 - blend) * f / factor + blend * f))
    return f, scale


def turned(x, positions, c):
    """x [B, heads, n, d] turned at positions [B, n]."""
    width = c.get("rope_width", x.shape[-1])
    f, scale = frequencies(c, width)
    angle = positions[:, None, :, None] * f
    cos, sin, y = np.cos(angle) * scale, np.sin(angle) * scale, x.copy()
    a, b = (slice(0, width // 2), slice(width // 2, width)) if c.get("rope_pairing", "neox") == "neox" else (slice(0, width, 2), slice(1, width, 2))
    y[..., a], y[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
    return y


def sees(c, t, B, n, m, row, key, rows_at):
    """[B, n, m]: which keys the rules by position show; row, key [B, n], [B, m]: numbers inside the own sequence, rows_at: of the row."""
    p, j = rows_at[:, :, None], key[:, None, :]
    seen = np.ones((B, n, m), bool)
    prefix = t["prefixes"][:, None, None] if "prefixes" in t else c.get("prefix", -1)
    if c.get("causal"):
        if "window" in c:
            seen &= (j <= p) & ((j > p - c["window"]) | (j < c.get("first", 0)))
        elif "chunk" not in c:
            seen &= (j <= p) | (j < prefix)
    elif "window" in c:
        seen &= j > p - c["window"]
    if "chunk" in c:
        seen &= (j <= p) & (j // c["chunk"] == np.maximum(p, 0) // c["chunk"])
    seen &= (j >= p - c.get("left", 10**9)) & (j <= p + c.get("right", 10**9))
    return seen


def wanted(c, t, q, k, v):
    B, H, n, d = q.shape
    G, m = k.shape[1], k.shape[2]
    row, key = np.tile(np.arange(n), (B, 1)), np.tile(np.arange(m), (B, 1))
    ns, ms = np.full((B, n), n), np.full((B, n), m)
    seen = np.ones((B, n, m), bool)
    if "cu_q" in t:
        s, u = (np.searchsorted(t[x], np.arange(z), side="right") - 1 for x, z in (("cu_q", n), ("cu_k", m)))
        seen &= s[:, None] == u[None, :]
        row, key = row - t["cu_q"][s], key - t["cu_k"][u]
        ns, ms = (np.diff(t[x])[s][None] for x in ("cu_q", "cu_k"))
    align = c.get("align", "bottom_right")
    offset = t["offsets"][:, None] if "offsets" in t else c["offset"] if "offset" in c else 0 if align == "top_left" else ms - ns
    p = row + offset
    seen &= sees(c, t, B, n, m, row, key, np.broadcast_to(p, (B, n)))
    if "lengths" in t:
        seen &= np.arange(m) < t["lengths"][:, None, None]
    if "parents" in t:
        tree = np.eye(n, dtype=bool)
        for i, parent in enumerate(t["parents"]):
            if parent >= 0:
                tree[i] |= tree[parent]
        seen &= np.concatenate([np.ones((n, m - n), bool), tree], 1)
    if "rope_theta" in c:
        at = t.get("positions", np.arange(n) + m - n)
        at = np.broadcast_to(at, (B, n))
        q, k = turned(q, at, c), turned(k, np.concatenate([np.tile(np.arange(m - n), (B, 1)), at], 1), c)
    k, v = (np.repeat(x, H // G, 1) for x in (k, v))
    x = np.einsum("bhid,bhjd->bhij", q, k) * c.get("scale", d**-0.5)
    if "softcap" in c:
        x = c["softcap"] * np.tanh(x / c["softcap"])
    if "bias" in t:
        x = x + t["bias"]
    distance = key[:, None, :] - p[:, :, None]
    if "slopes" in t:
        x = x + t["slopes"][None, :, None, None] * distance[:, None]
    if "t5" in t:
        both = c.get("bidirectional", not c.get("causal"))
        x = x + np.moveaxis(t["t5"][t5_bucket(distance, t["t5"].shape[0], c.get("max_distance", 128), both)], -1, 1)
    if "relative" in t:
        left = c["relative_left"]
        at = left + np.clip(distance, -left, t["relative"].shape[1] - left - 1)
        x = x + np.moveaxis(t["relative"][:, at], 0, 1)
    seen = np.broadcast_to(seen[:, None], x.shape)
    if "mask" in t:
        seen = seen & (t["mask"] != 0)
    x = np.where(seen, x, -INF)
    top = x.max(-1, keepdims=True, initial=-INF)
    if "sinks" in t:
        top = np.maximum(top, t["sinks"][None, :, None, None])
    w = np.exp(x - np.where(np.isneginf(top), 0, top))
    total = w.sum(-1, keepdims=True) + (np.exp(t["sinks"][None, :, None, None] - top) if "sinks" in t else 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        o = np.where(total > 0, np.einsum("bhij,bhje->bhie", w, v) / total, 0)
        return o, np.where(total > 0, np.log(total) + np.where(np.isneginf(top), 0, top), -INF)[..., 0]


def cuts(r, parts, total):
    return np.concatenate([[0], np.sort(r.integers(0, total + 1, parts - 1)), [total]]).astype(np.int32)


def draw(r):
    """(configuration, tensors besides q, k, v, q, k, v) of one trial."""
    B, G, d, e = int(r.integers(1, 3)), int(r.integers(1, 3)), int(r.integers(2, 20)) * 2, int(r.integers(1, 30))
    H, n = G * int(r.integers(1, 4)), int(r.choice([1, 1, 3, 8, 33, 70]))
    m = n + int(r.integers(0, 60))
    c, t, chance = {"mechanism": "softmax"}, {}, r.random
    if chance() < 0.3:
        c["scale"] = float(r.uniform(0.1, 0.5))
    packed = chance() < 0.25
    if packed:
        B = 1
        t["cu_q"], t["cu_k"] = cuts(r, 3, n), cuts(r, 3, m)
    kind = r.choice(["full", "causal", "window", "sides", "chunk", "prefix", "tree"], p=[0.1, 0.2, 0.2, 0.15, 0.15, 0.1, 0.1])
    if kind != "full":
        c["causal"] = True
    if kind == "window":
        c["window"] = int(r.integers(1, 40))
        if chance() < 0.4:
            c["first"] = int(r.integers(0, 5))
    if kind == "chunk":
        c["chunk"] = int(r.integers(1, 40))
        if chance() < 0.3:
            c["left"] = int(r.integers(0, 20))
    if kind == "sides":
        c["left"], c["right"], c["causal"] = int(r.integers(0, 30)), int(r.integers(0, 30)), bool(chance() < 0.5)
    if kind == "prefix":
        if chance() < 0.5:
            c["prefix"] = int(r.integers(0, m))
        elif not packed:
            t["prefixes"] = r.integers(0, m, B).astype(np.int32)
    if kind == "tree" and not packed:
        t["parents"] = np.array([r.integers(-1, i) for i in range(n)], np.int32)
    elif kind != "full":
        where = chance()
        if where < 0.15:
            c["offset"] = int(r.integers(-5, 30))
        elif where < 0.3 and not packed:
            t["offsets"] = r.integers(-5, 30, B).astype(np.int32)
        elif where < 0.4:
            c["align"] = "top_left"
    if not packed and chance() < 0.2:
        t["lengths"] = r.integers(0, m + 1, B).astype(np.int32)
    if chance() < 0.25:
        t["mask"] = (r.random((int(r.choice([1, B])), int(r.choice([1, H])), n, m)) < 0.7).astype(np.uint8)
    if chance() < 0.25:
        c["softcap"] = float(r.uniform(1, 20))
    if chance() < 0.25:
        t["bias"] = r.standard_normal((int(r.choice([1, B])), int(r.choice([1, H])), int(r.choice([1, n])), m)).astype(np.float32)
    line = chance()
    if line < 0.2:
        t["slopes"] = r.uniform(0, 0.5, H).astype(np.float32)
    elif line < 0.35:
        t["t5"], c["max_distance"] = r.standard_normal((32, H)).astype(np.float32), int(r.integers(17, 100))
    elif line < 0.45:
        t["relative"], c["relative_left"] = r.standard_normal((H, 17)).astype(np.float32), int(r.integers(0, 17))
    if chance() < 0.2:
        t["sinks"] = r.standard_normal(H).astype(np.float32)
    if not packed and chance() < 0.35:
        c["rope_theta"] = float(r.choice([100, 10000, 500000]))
        if chance() < 0.5:
            c["rope_width"] = int(r.integers(1, d // 2 + 1)) * 2
        if chance() < 0.5:
            c["rope_pairing"] = "gptj"
        scaling = r.choice(["none", "linear", "ntk", "yarn", "llama3"])
        if scaling != "none" and (scaling != "ntk" or c.get("rope_width", d) >= 4):
            c["rope_scaling"], c["rope_factor"] = str(scaling), float(r.choice([2, 8]))
        if c.get("rope_scaling") in ("yarn", "llama3"):
            c["rope_original"] = 64
        if chance() < 0.5:
            t["positions"] = r.integers(0, 300, (B, n) if chance() < 0.5 else n).astype(np.int32)
    q, k, v = (r.standard_normal(s).astype(np.float32) for s in ((B, H, n, d), (B, G, m, d), (B, G, m, e)))
    return c, t, q, k, v


def pages_of(r, k, v, page):
    """k, v in pages in random order: k_pages, v_pages, table."""
    B, G, m, _ = k.shape
    each = -(-m // page)
    place = r.permutation(B * each + 2)[:B * each].reshape(B, each).astype(np.int32)
    out = []
    for x in (k, v):
        pages = np.full((B * each + 2, G, page, x.shape[-1]), np.nan, x.dtype)
        for b in range(B):
            for i in range(each):
                part = x[b, :, i * page:(i + 1) * page]
                pages[place[b, i], :, :part.shape[1]] = part
        out.append(pages)
    return out[0], out[1], place


def differs(got, want, bound):
    for name, w in zip(("o", "lse"), want):
        g = got[name].astype(np.float64)
        if g.shape != w.shape or (np.isneginf(g) != np.isneginf(w)).any():
            return f"{name}: shape, or minus infinity in the wrong place"
        ok = ~np.isneginf(w)
        gap = np.abs(g[ok] - w[ok])
        if gap.size and not gap.max() <= bound * max(1, np.abs(w[ok]).max()):
            return f"{name}: {gap.max():.3g} off"
    return None


def skips_wrongly(got, want, v):
    """Keys left out: every row as far off as it says, and no farther; the log-sum-exp of all keys."""
    mass, size = got["skipped"].astype(np.float64), np.sqrt((v.astype(np.float64) ** 2).sum(-1)).max()
    if mass.size != want[1].size or not ((mass >= 0) & (mass <= 1)).all():
        return "skipped: shape, or no share"
    gap = np.sqrt(((got["o"].astype(np.float64) - want[0]) ** 2).sum(-1))
    if gap.size and not (gap <= 2 * mass.reshape(gap.shape) * size + 2e-5 * (1 + size)).all():
        return f"skipping: {gap.max():.3g} off, {mass.max():.3g} skipped"
    return differs({"o": want[0], "lse": got["lse"]}, want, 2e-5)


def gradient_differs(r, c, t, wide, ask):
    """Derivatives along a random direction of each input, from the formulas by central differences, against the gradients."""
    out = wanted(c, t, wide["q"], wide["k"], wide["v"])[0]
    weight = r.standard_normal(out.shape)
    loss = lambda inputs: (wanted(c, {**t, **{k: x for k, x in inputs.items() if k not in "qkv"}}, inputs["q"], inputs["k"], inputs["v"])[0] * weight).sum()
    got = ask({**wide, "do": weight})
    names = ["q", "k", "v", *(x for x in ("bias", "sinks") if x in t)]
    inputs = {**wide, **{x: t[x].astype(np.float64) for x in names[3:]}}
    for name in names:
        way, h = r.standard_normal(inputs[name].shape), 1e-5
        slope = (loss({**inputs, name: inputs[name] + h * way}) - loss({**inputs, name: inputs[name] - h * way})) / (2 * h)
        found = (got["d" + name].astype(np.float64) * way).sum()
        if not abs(found - slope) <= 1e-5 * (1 + np.abs(got["d" + name].astype(np.float64) * way).sum()):
            return f"d{name} along a direction: {found}, wanted {slope}"
    return None


def trial(seed, attend_program, counts):
    r = np.random.default_rng(seed)
    c, t, q, k, v = draw(r)
    want = wanted(c, t, *(x.astype(np.float64) for x in (q, k, v)))
    ask = lambda x, **more: attend(c | x.pop("config", {}), binary=attend_program, **(t | x), **more)
    wide = {name: x.astype(np.float64) for name, x in (("q", q), ("k", k), ("v", v))}
    # Where RoPE's tables are of float, so is the bound.
    problem = differs(ask(dict(wide)), want, 1e-9) or differs(ask({"q": q, "k": k, "v": v}), want, 2e-5)
    if problem:
        return c, t, problem
    problem = skips_wrongly(ask({"q": q, "k": k, "v": v, "config": {"skip": 0.01}}), want, v)
    if problem:
        return c, t, problem
    if "rope_theta" not in c and not ("bias" in t and {"t5", "relative"} & set(t)):  # of q and k that come turned, of one table
        problem = gradient_differs(r, c, t, wide, ask)
        if problem:
            return c, t, "gradients: " + problem
        counts["gradients"] += 1
    if not set(t) & {"cu_q", "lengths"} and "rope_theta" not in c:
        page = int(r.integers(1, 20))
        k_pages, v_pages, table = pages_of(r, k, v, page)
        problem = differs(ask({"q": q, "k_pages": k_pages, "v_pages": v_pages, "table": table, "lengths": np.full(len(q), k.shape[2], np.int32)}), want, 2e-5)
        if problem:
            return c, t, "paged: " + problem
        counts["paged"] += 1
    state = c.get("causal") and not set(t) & {"cu_q", "lengths", "prefixes", "parents", "offsets"} and not set(c) & {"prefix", "offset"}
    if state and c.get("align") != "top_left" and not ("positions" in t and q.shape[2] != k.shape[2]):
        for store in [{}] + [{"store": "ring", "store_chunk": 5}] * bool(set(c) & {"window", "chunk"}):
            problem = differs(ask({"q": q, "k": k, "v": v, "config": store}, decode=int(r.integers(0, k.shape[2]))), want, 2e-5)
            if problem:
                return c, t, f"by steps, {store}: " + problem
            counts["ring" if store else "steps"] += 1
    counts["trials"] += 1
    return None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("attend"), p.add_argument("--trials", type=int, default=300), p.add_argument("--seed", type=int, default=0)
    p.add_argument("--verbose", action="store_true")
    a = p.parse_args()
    failed, counts = 0, {"trials": 0, "gradients": 0, "paged": 0, "steps": 0, "ring": 0}
    for seed in range(a.seed, a.seed + a.trials):
        try:
            bad = trial(seed, a.attend, counts)
        except Refused as line:
            bad = (*draw(np.random.default_rng(seed))[:2], f"refused: {line}")
        if bad:
            failed += 1
            print(f"FAIL  --seed {seed} --trials 1  {json.dumps(bad[0])}  {sorted(bad[1])}\n      {bad[2]}")
    print(", ".join(f"{n} {name}" for name, n in counts.items()) + f"; {failed} failed")
    return 1 if failed or counts["trials"] == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
