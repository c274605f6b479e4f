// SPDX-License-Identifier: MIT
#pragma once
/// @file  windowed_attention with a state: a ring of the first keys and the window, and the linear state of all that has left it.
///
/// State      the block of a softmax_attention with a ring store, rounded up to 64 bytes; the block of a linear_attention.
///            Its size does not depend on n.

#include <cstring>

#include <fovea/windowed/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// The two states in one block.
struct windowed_parts {
  softmax_attention exact;
  linear_attention rest;
  shape far;
  std::size_t ring_bytes, far_bytes;

  windowed_parts(const windowed_attention& m, shape s) : exact(m.exact()), rest(m.rest()), far(s) {
    exact.store = {.kind = state_store::form::ring, .chunk = 1};
    ring_bytes = round_up(exact.state_bytes(s), alignment), far_bytes = rest.state_bytes(far);
  }
  std::size_t bytes() const { return ring_bytes + far_bytes; }
  state ring_of(const state& s) const {
    return state::over(exact.tag(), s.sizes(), s.tokens(), {s.as<std::byte>(), exact.state_bytes(s.sizes())});
  }
  state far_of(const state& s, const windowed_attention& m) const {
    const isize left = s.tokens() - m.first - m.window;
    return state::over(rest.tag(), far, left > 0 ? left : 0, {s.as<std::byte>() + ring_bytes, far_bytes});
  }
};

/// Keys and values side by side for a chunk: what the ring holds, then the chunk's own tokens.
struct windowed_rows {
  tensor_mut k, v;
  windowed_rows(arena& memory, const shape& s, isize rows) {
    const auto take = [&](isize width) {
      auto* data = memory.take<std::byte>(s.B * s.G * rows * width * static_cast<isize>(size_of(s.type)));
      return tensor_mut(data, s.type, s.B, s.G, rows, width, s.G * rows * width, rows * width, width);
    };
    k = take(s.d), v = take(s.e);
  }
  static void copy_held(const row_source& from, isize head_bytes, isize first, isize count, const tensor_mut& to,
                        isize b) {
    const auto bytes = static_cast<std::size_t>(to.width) * size_of(to.type);
    for (isize g = 0; g < to.heads; ++g) {
      row_source head = from;
      head.data += g * head_bytes;
      for (isize j = 0; j < count; ++j) std::memcpy(to.row(b, g, j), head.at(first + j).data, bytes);
    }
  }
  /// Rows [first, first + count) of what the ring holds of item b.
  void hold(const kv_sequence& kv, isize b, isize first, isize count) const {
    copy_held(kv.k, kv.k_head_bytes, first, count, k, b), copy_held(kv.v, kv.v_head_bytes, first, count, v, b);
  }
  static void copy_new(const tensor_ref& from, isize i, isize count, const tensor_mut& to, isize at) {
    const auto bytes = static_cast<std::size_t>(to.width) * size_of(to.type);
    for (isize b = 0; b < to.batch; ++b)
      for (isize g = 0; g < to.heads; ++g)
        for (isize x = 0; x < count; ++x) std::memcpy(to.row(b, g, at + x), from.row(b, g, i + x), bytes);
  }
};

/// KV heads are tasks where each thread has as many; else all heads go through each part on all threads.
template <class Acc>
struct windowed_held {
  windowed_rows rows;
  shape call;  ///< of a task, or of all heads
  bool by_head;
  arena memory;
  double* own;

  static isize chunk_of(const shape& s) { return s.n < windowed_chunk ? s.n : windowed_chunk; }
  static shape sizes(const windowed_attention& m, shape s, bool alone) {
    if (alone) s = windowed_unit(s, s.n);
    s.n = chunk_of(s), s.m = m.first + m.window + s.n;
    return s;
  }
  windowed_held(arena& a, const windowed_attention& m, const shape& s, int threads)
      : rows(a, s, s.n == 1 && m.level == rest_level::absolute ? 1 : m.first + m.window + chunk_of(s)),
        call(sizes(m, s, s.n > 1 && threads > 1 && s.B * s.G % threads == 0)),
        by_head(s.n > 1 && threads > 1 && s.B * s.G % threads == 0),
        own(a.take<double>(threads * (s.d > s.e ? s.d : s.e))) {
    memory = a;
    for (int t = 0; t < (by_head ? threads : 1); ++t) windowed_spot<Acc>(a, m, call, by_head ? 1 : threads);
  }

  void prefill(exec_ref exec, const windowed_attention& m, const problem& p, state& s) const {
    const windowed_parts parts(m, s.sizes());
    state ring = parts.ring_of(s), far = parts.far_of(s, m);
    if (s.tokens() == 0) parts.rest.clear(far);
    const state_rows held_rows(parts.exact, s.sizes());
    const isize B = p.q.batch, n = p.q.length, c = call.n;
    const windowed_run<Acc> run(m, call);
    arena first = memory;
    const windowed_spot<Acc> at(first, m, call, by_head ? 1 : exec.concurrency());
    if (n == 1 && m.level == rest_level::absolute) {
      const isize T = s.tokens();
      if (T >= m.first + m.window)  // the oldest key of the window leaves it
        for (isize b = 0; b < B; ++b) rows.hold(held_rows.sequence(ring, b), b, m.first, 1);
      held_rows.append(parts.exact, exec, p, 0, 1, ring, own);
      run.attend_one(exec, {p.q, rows.k, rows.v, p.out, p.lse, T}, held_rows, ring, at.place, at.own, far);
      s.set_tokens(T + 1);
      return;
    }
    for (isize i = 0; i < n; i += c) {
      const isize count = c < n - i ? c : n - i, T = ring.tokens();
      const isize held = T < m.first + m.window ? T : m.first + m.window;
      for (isize b = 0; b < B && held > 0; ++b) rows.hold(held_rows.sequence(ring, b), b, 0, held);
      windowed_rows::copy_new(p.k, i, count, rows.k, held), windowed_rows::copy_new(p.v, i, count, rows.v, held);
      windowed_rows_of x{p.q.slice(i, count),
                         rows.k.slice(0, held + count),
                         rows.v.slice(0, held + count),
                         p.out.slice(i, count),
                         {},
                         T};
      if (p.lse) x.lse = p.lse.slice(i, count);
      if (by_head)
        exec.for_tasks(p.k.batch * p.k.heads, [&](isize unit, isize slot) { attend_head(m, x, unit, slot, parts, s); });
      else
        run.attend(exec, x, at.place, at.own, far);
      held_rows.append(parts.exact, exec, p, i, count, ring, own);
    }
    s.set_tokens(s.tokens() + n);
  }

  void attend_head(const windowed_attention& m, const windowed_rows_of& all, isize unit, isize slot,
                   const windowed_parts& parts, const state& s) const {
    const isize G = all.k.heads, R = call.H, b = unit / G, g = unit % G;
    windowed_rows_of x{all.q.part(b, g * R, R),
                       all.k.part(b, g, 1),
                       all.v.part(b, g, 1),
                       all.out.part(b, g * R, R),
                       {},
                       all.position,
                       g};
    if (all.lse) x.lse = all.lse.part(b, g * R, R);
    const auto bytes = static_cast<isize>(parts.rest.state_bytes(call));
    state far = state::over(parts.rest.tag(), call, 0,
                            {parts.far_of(s, m).as<std::byte>() + unit * bytes, static_cast<std::size_t>(bytes)});
    const auto at = windowed_spot<Acc>::at(memory, slot, m, call);
    windowed_run<Acc>(m, call).attend(serial, x, at.place, at.own, far);
  }
};

}  // namespace detail

inline std::size_t windowed_attention::state_bytes(const shape& s) const {
  return detail::windowed_parts(*this, s).bytes();
}

inline std::uint64_t windowed_attention::tag() const {
  detail::fingerprint f;
  f.text(name).number(static_cast<double>(window)).number(static_cast<double>(first)).number(scale ? *scale : -1);
  f.number(static_cast<double>(level));
  map.fingerprint(f);
  return f.value;
}

inline state windowed_attention::make_state(const shape& s) const {
  require(s.B >= 0 && s.G >= 1 && s.H >= 1 && s.d >= 1 && s.e >= 1 && s.H % s.G == 0, "make_state: B, H, G, d, e are ",
          s.B, ", ", s.H, ", ", s.G, ", ", s.d, ", ", s.e, "; wanted sizes of a problem");
  detail::check_windowed(*this, s);
  return {tag(), s, state_bytes(s)};
}

inline void windowed_attention::check(const problem& p, const state& s) const {
  detail::check_problem(p);
  detail::check_windowed(*this, p.shape());
  s.check(tag(), p.shape(), name);
  require(p.q.type == s.sizes().type, "the state stores ", name_of(s.sizes().type), " and the call brings ",
          name_of(p.q.type));
  require(s.bytes() == state_bytes(s.sizes()), "the state holds ", s.bytes(), " bytes; its sizes ask for ",
          state_bytes(s.sizes()));
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION std::size_t windowed_attention::workspace_size(const shape& s, int threads) const {
  arena whole, held;
  if (s.type == dtype::f64) {
    detail::windowed_whole<double>(whole, *this, s, threads);
    detail::windowed_held<double>(held, *this, s, threads);
  } else {
    detail::windowed_whole<float>(whole, *this, s, threads);
    detail::windowed_held<float>(held, *this, s, threads);
  }
  return whole.bytes() > held.bytes() ? whole.bytes() : held.bytes();
}

FOVEA_DEFINITION void windowed_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::windowed_held<double>(scratch, *this, p.shape(), exec.concurrency()).prefill(exec, *this, p, s);
  else
    detail::windowed_held<float>(scratch, *this, p.shape(), exec.concurrency()).prefill(exec, *this, p, s);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
