// SPDX-License-Identifier: MIT
#pragma once
/// @file  windowed_attention over all keys at once, chunk by chunk: exact part, rest, merge.
///
/// A chunk of queries attends to its window and the first keys by softmax_attention; the keys that leave the window, one for each query,
/// go into linear_attention, whose row x so sees the keys up to `window` before it.

#include <fovea/core/partial.hpp>
#include <fovea/linear/partial.hpp>
#include <fovea/linear/prefill.hpp>
#include <fovea/softmax/state.hpp>
#include <fovea/windowed/level.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline constexpr isize windowed_chunk = 512;  ///< queries of a chunk

inline void check_windowed(const windowed_attention& m, const shape& s) {
  require(m.window >= 1, "window is ", m.window, "; it counts the row's own key and must be at least 1");
  require(m.first >= 0, "first is ", m.first, "; it must not be negative");
  if (m.scale) require_finite("scale", *m.scale);
  require(!m.map.positional(),
          "the feature map of windowed_attention depends on positions; the rest is counted from "
          "its own first key, so a map that does not is wanted");
  require(!m.map.surveys(), "the feature map of windowed_attention wants a number from all keys at once; it is causal");
  m.map.check(s);
  require(m.log_weight.data == nullptr || m.log_weight.heads == s.H, "log_weight has ", m.log_weight.heads,
          " heads; wanted one number for each of ", s.H, " query heads");
  require(m.query_gate.data == nullptr || (m.query_gate.heads == s.H && m.query_gate.width == s.d), "query_gate is [",
          m.query_gate.heads, ", ", m.query_gate.width, "]; wanted [", s.H, ", ", s.d, "]");
}

template <class Acc>
class windowed_run {
  using Arch = simd::native;
  static constexpr dtype acc = dtype_of<Acc>;

 public:
  /// `chunk`: the most queries at once; `sizes.m`: the most keys that the exact part is given at once.
  windowed_run(arena& memory, const windowed_attention& m, const shape& sizes, isize chunk, int threads)
      : m_(m), exact_(m.exact()), rest_(m.rest()), level_(m, sizes), s_(sizes), chunk_(chunk) {
    const auto take = [&](isize heads, isize width) {
      return tensor_mut(memory.take<Acc>(s_.B * heads * chunk * width), acc, s_.B, heads, chunk, width,
                        heads * chunk * width, chunk * width, width);
    };
    near_ = take(s_.H, s_.e), lse_ = take(s_.H, 1), far_ = take(s_.H, s_.e), sums_ = take(s_.H, 1),
    peaks_ = take(s_.H, 1);
    row_ = memory.take<Acc>(threads * level_.scratch(s_.d));
    shape exact = s_, rest = s_;
    exact.n = chunk, rest.n = rest.m = chunk;
    own_ = std::max(exact_.workspace_size(exact, threads), rest_.workspace_size(rest, threads));
    scratch_ = memory.take<std::byte>(static_cast<isize>(own_));
  }

  /// Rows of p (at most `chunk`), the first at `position`; k, v end with the tokens of these rows and reach back `window` keys from
  /// the first of them where there are as many, with the first keys in front. `far`: the keys that have left the window so far.
  void attend(exec_ref exec, const problem& p, const tensor_ref& k, const tensor_ref& v, isize position,
              state& far) const {
    const isize c = p.q.length;
    problem near;
    near.q = p.q, near.k = k, near.v = v;
    near.out = near_.slice(0, c), near.lse = lse_.slice(0, c);
    exact_.prefill(exec, near, arena({scratch_, own_}));
    const isize x0 = first_rest(position, c);
    if (x0 < c) absorb(exec, p.q.slice(x0, c - x0), k, v, k.length - c + x0 - m_.window, far, x0);
    join_rows(exec, p, k, x0);
  }

  /// One token, whose keys are in the ring already; k, v: the one key that has left the window, if any has.
  void attend_one(exec_ref exec, const problem& p, const tensor_ref& k, const tensor_ref& v, const state_rows& rows,
                  const state& ring, isize position, state& far) const {
    problem near;
    near.q = p.q, near.out = near_.slice(0, 1), near.lse = lse_.slice(0, 1);
    near.k.length = near.v.length = 1, near.k.heads = near.v.heads = s_.G;
    detail::attend<Acc>(exact_, exec,
                        problem_list(s_.B,
                                     [&](isize b) {
                                       sequence_problem x = item_of(near, b);
                                       x.kv = rows.sequence(ring, b);
                                       x.first_row = 0, x.all_rows = 1, x.all_tokens = position + 1;
                                       return x;
                                     }),
                        arena({scratch_, own_}));
    const isize x0 = first_rest(position, 1);
    if (x0 == 0) absorb(exec, p.q, k, v, 0, far, 0);
    join_rows(exec, p, k, x0);
  }

  /// The first of c rows, the first at `position`, that has a rest.
  isize first_rest(isize position, isize c) const {
    const isize x = m_.first + m_.window - position;
    return x < 0 ? 0 : x > c ? c : x;
  }
  /// Near and far parts of p's rows into p.out, from row x0 on with a rest.
  void join_rows(exec_ref exec, const problem& p, const tensor_ref& k, isize x0) const {
    const isize c = p.q.length;
    exec.for_tasks(s_.B * s_.H, [&](isize task, isize slot) {
      const isize b = task / s_.H, h = task % s_.H;
      for (isize x = 0; x < c; ++x) join(p, k, b, h, x, x >= x0, row_ + slot * level_.scratch(s_.d));
    });
  }

  /// Keys [from, from + q.length) of k, v join the rest; the partial of row x, with and up to key from + x, goes to row at + x.
  void absorb(exec_ref exec, const tensor_ref& q, const tensor_ref& k, const tensor_ref& v, isize from, state& far,
              isize at) const {
    const isize c = q.length;
    problem p;
    p.q = q, p.k = k.slice(from, c), p.v = v.slice(from, c), p.out = far_.slice(at, c);
    const linear_partial to{sums_.slice(at, c), peaks_.slice(at, c)};
    rest_.prefill_partial(exec, p, to, &far, arena({scratch_, own_}));
  }

  isize chunk() const { return chunk_; }

 private:
  /// The partials of row x under one denominator: (lse, 1, near) and (level + peak, sum, far).
  void join(const problem& p, const tensor_ref& k, isize b, isize h, isize x, bool has_rest, Acc* scratch) const {
    Acc* o = static_cast<Acc*>(near_.row(b, h, x));
    Acc lse = *static_cast<const Acc*>(lse_.row(b, h, x));
    if (has_rest) {
      const Acc* other = static_cast<const Acc*>(far_.row(b, h, x));
      const Acc weight = *static_cast<const Acc*>(sums_.row(b, h, x)),
                peak = *static_cast<const Acc*>(peaks_.row(b, h, x));
      const Acc rest =
                    level_.of(p.q, k, b, h, x, k.length - p.q.length + x, scratch) + peak + std::log(std::abs(weight)),
                top = lse > rest ? lse : rest;
      if (top > -std::numeric_limits<Acc>::infinity() || top != top) {
        // weight e^(a - top) is at most 1 in size; the numerators are as far from 1 as the values are.
        const Acc one = std::exp(lse - top), two = weight == Acc(0) ? Acc(0) : std::exp(rest - top) / std::abs(weight);
        const Acc sum = one + two * weight, inverse = sum != Acc(0) ? Acc(1) / sum : Acc(0);
        for (isize c = 0; c < s_.e; ++c) o[c] = (one * o[c] + two * other[c]) * inverse;
        lse = top + std::log(sum);
      }
    }
    simd::store_row<Arch, Acc>(p.out.type, o, s_.e, p.out.row(b, h, x));
    if (p.lse) *static_cast<Acc*>(p.lse.row(b, h, x)) = lse;
  }

  const windowed_attention& m_;
  softmax_attention exact_;
  linear_attention rest_;
  windowed_level<Acc> level_;
  shape s_;
  isize chunk_;
  tensor_mut near_, lse_, far_, sums_, peaks_;
  Acc* row_;
  std::byte* scratch_;
  std::size_t own_;
};

/// A call without a state: keys are read in place, the linear state lies in the scratch.
template <class Acc>
struct windowed_whole {
  windowed_run<Acc> run;
  std::byte* memory;
  std::size_t bytes;
  shape rest;

  windowed_whole(arena& a, const windowed_attention& m, const shape& s, int threads)
      : run(a, m, s, s.n < windowed_chunk ? s.n : windowed_chunk, threads), rest(s) {
    bytes = m.rest().state_bytes(rest);
    memory = a.take<std::byte>(static_cast<isize>(bytes));
  }
  void prefill(exec_ref exec, const windowed_attention& m, const problem& p) const {
    state far = state::over(m.rest().tag(), rest, 0, {memory, bytes});
    m.rest().clear(far);
    const isize before = p.k.length - p.q.length, c = run.chunk();
    // Keys that no query of this call sees leave the window: they are their own queries, and nobody reads the answers.
    for (isize j = m.first; j < before - m.window; j += c) {
      const isize count = c < before - m.window - j ? c : before - m.window - j;
      run.absorb(exec, p.k.slice(j, count), p.k, p.v, j, far, 0);
    }
    for (isize i = 0; i < p.q.length; i += c) {
      const isize count = c < p.q.length - i ? c : p.q.length - i;
      problem part = p;
      part.q = p.q.slice(i, count), part.out = p.out.slice(i, count);
      if (p.lse) part.lse = p.lse.slice(i, count);
      const isize keys = before + i + count > 0 ? before + i + count : 0;  // none: rows before the first key
      run.attend(exec, part, p.k.slice(0, keys), p.v.slice(0, keys), before + i, far);
    }
  }
};

}  // namespace detail

inline void windowed_attention::check(const problem& p) const {
  detail::check_problem(p);
  detail::check_windowed(*this, p.shape());
}

inline double windowed_attention::macs(const shape& s) const {
  const double rows = static_cast<double>(s.B * s.H * s.n), keys = static_cast<double>(window + first);
  const double seen = s.m < window + first ? static_cast<double>(s.m) : keys;
  return rows * seen * static_cast<double>(s.d + s.e) + rest().macs(s);
}
inline double windowed_attention::step_macs(const shape& s) const {
  shape one = s;
  one.n = 1;
  one.m = s.m < window + first ? s.m : window + first;
  const double near = static_cast<double>(s.B * s.H * one.m * (s.d + s.e));
  return s.m <= window + first ? near : near + rest().step_macs(s);
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void windowed_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::windowed_whole<double>(scratch, *this, p.shape(), exec.concurrency()).prefill(exec, *this, p);
  else
    detail::windowed_whole<float>(scratch, *this, p.shape(), exec.concurrency()).prefill(exec, *this, p);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
