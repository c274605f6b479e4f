// SPDX-License-Identifier: MIT
#pragma once
/// @file  Sizes and memory of a backward pass of linear attention: one span of 64 tokens, and the states before every span.

#include <algorithm>

#include <fovea/core/backward.hpp>
#include <fovea/feature/feature_map.hpp>
#include <fovea/kernel/linear_backward.hpp>
#include <fovea/linear/mechanism.hpp>
#include <fovea/simd/convert.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// K key heads, each with V state heads (grouped values), each with R query heads (grouped queries): V = 1 or R = 1.
struct backward_sizes {
  isize B, K, V, R, n, m, d, e, r, ld, le, query_weights, key_weights, map_scratch;
  bool channel, decays, erases, normalised, log_scaled, causal;

  backward_sizes(const linear_attention& a, const shape& s, bool channel_gate, bool has_decay)
      : B(s.B),
        K(s.H < s.G ? s.H : s.G),
        V(K > 0 ? s.G / K : 1),
        R(s.H > s.G && s.G > 0 ? s.H / s.G : 1),
        n(s.n),
        m(s.m),
        d(s.d),
        e(s.e),
        r(a.phi().features(s.d)) {
    const feature_map map = a.phi();
    ld = ceil_div(r, isize{16}) * 16, le = ceil_div(e, isize{16}) * 16;
    query_weights = key_weights = map.weights(d);
    map_scratch = std::max(map.scratch(d), map.derive_scratch(d));
    log_scaled = map.log_scaled(), causal = a.is_causal, normalised = a.normalised(), erases = is_delta(a.rule);
    channel = channel_gate, decays = has_decay || (causal && log_scaled);
  }
  isize states() const { return r * e + r; }
  isize query_heads() const { return K * R; }
  /// Query heads that share a key head, and the learned numbers of a task.
  isize task_weights() const { return R * query_weights + key_weights; }
  isize spans() const {  // keys before the first query, then the others
    const isize before = causal && m > n ? m - n : 0;
    return ceil_div(before, feature_rows) + ceil_div(m - before, feature_rows);
  }
  kernel::backward_form form() const { return {r, e, ld, le, R, decays, channel, erases, normalised}; }
};

template <class Acc>
struct backward_scratch {
  using loop = kernel::linear_backward<simd::native, Acc>;
  static constexpr isize tokens = feature_rows;

  loop run;
  Acc *x_k, *x_q, *dx, *map, *phi_k, *k, *u, *phi_q, *v, *v_given, *write, *erase, *dout, *a, *beta, *delta, *gain,
      *add, *floor, *key_eps, *log_k, *log_q, *peaks, *own;
  Acc *dq, *dk, *du, *dv, *dbeta, *dlog, *line;
  Acc *saved, *saved_peak, *inner, *dS, *dz, *sum_q, *sum_k;

  backward_scratch(arena& at, const backward_sizes& s) : run(at, s.form()) {
    const isize features = tokens * s.ld, values = tokens * s.le, rows = s.R * tokens;
    x_k = at.take<Acc>(tokens * s.d), x_q = at.take<Acc>(s.R * tokens * s.d), dx = at.take<Acc>(tokens * s.d);
    map = at.take<Acc>(s.map_scratch), phi_k = at.take<Acc>(features), phi_q = at.take<Acc>(s.R * features);
    k = at.take<Acc>(s.log_scaled ? features : 0), u = at.take<Acc>(s.erases ? features : 0);
    erase = at.take<Acc>(s.erases ? features : 0), write = at.take<Acc>(s.erases ? values : 0);
    v = at.take<Acc>(values), v_given = at.take<Acc>(s.erases ? values : 0), dout = at.take<Acc>(s.R * values);
    a = at.take<Acc>(s.channel ? features : tokens), beta = at.take<Acc>(tokens);
    delta = at.take<Acc>(rows), gain = at.take<Acc>(rows), add = at.take<Acc>(rows), floor = at.take<Acc>(rows);
    key_eps = at.take<Acc>(rows), log_q = at.take<Acc>(rows), log_k = at.take<Acc>(tokens);
    peaks = at.take<Acc>(tokens), own = at.take<Acc>(tokens);
    dq = at.take<Acc>(s.R * features), dk = at.take<Acc>(features), du = at.take<Acc>(s.erases ? features : 0);
    dv = at.take<Acc>(values), dbeta = at.take<Acc>(tokens), dlog = at.take<Acc>(s.channel ? features : tokens);
    line = at.take<Acc>(std::max(s.ld, s.le));
    saved = at.take<Acc>((s.spans() + 1) * s.states()), saved_peak = at.take<Acc>(s.spans() + 1);
    inner = at.take<Acc>((tokens / loop::chunk(s.channel) + 1) * s.states());
    dS = at.take<Acc>(s.r * s.e), dz = at.take<Acc>(s.r);
    sum_q = at.take<Acc>(s.V > 1 ? s.n * s.d : 0), sum_k = at.take<Acc>(s.V > 1 ? s.m * s.d : 0);
  }
  static std::size_t bytes(const backward_sizes& s) {
    arena measure;
    backward_scratch(measure, s);
    return measure.bytes();
  }
};

/// Slots of the threads, and the gradients by map weights of every task.
template <class Acc>
struct backward_layout {
  std::size_t slot_size;
  std::byte* slots;
  Acc* weights;  // [B * K][task_weights]
  backward_layout(arena& memory, const backward_sizes& s, int threads) : slot_size(backward_scratch<Acc>::bytes(s)) {
    slots = memory.take<std::byte>(static_cast<isize>(slot_size) * threads);
    weights = memory.take<Acc>(s.B * s.K * s.task_weights());
  }
  arena memory_of(isize slot) const {
    return arena(std::span<std::byte>(slots + static_cast<std::size_t>(slot) * slot_size, slot_size));
  }
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
