// SPDX-License-Identifier: MIT
#pragma once
/// @file  windowed_attention over all keys at once, chunk by chunk: exact part, rest, merge.
///
/// A chunk of queries attends to its window and the first keys by softmax_attention; the keys that leave the window, one for each query,
/// go into linear_attention, whose row x so sees the keys up to `window` before it.

#include <array>

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
  constexpr isize most = isize{1} << 40;  // rows whose bytes can be counted
  require(m.window <= most && m.first <= most, "window and first are ", m.window, " and ", m.first,
          "; a state keeps as many rows, at most 2^40");
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

/// The two partials of a chunk's rows.
struct windowed_place {
  tensor_mut near, lse, far, sums, peaks;

  windowed_place(arena& memory, const shape& s, isize chunk) {
    const dtype acc = s.type == dtype::f64 ? dtype::f64 : dtype::f32;
    const auto take = [&](isize width) {
      auto* data = memory.take<std::byte>(s.B * s.H * chunk * width * static_cast<isize>(size_of(acc)));
      return tensor_mut(data, acc, s.B, s.H, chunk, width, s.H * chunk * width, chunk * width, width);
    };
    near = take(s.e), lse = take(1), far = take(s.e), sums = take(1), peaks = take(1);
  }
};

/// A chunk of queries: rows of q and out, the first at `position`; k, v end with the tokens of these rows and reach back `window` keys
/// from the first of them where there are as many, with the first keys in front. `first_head`: KV heads of the whole call before these.
struct windowed_rows_of {
  tensor_ref q, k, v;
  tensor_mut out, lse;
  isize position = 0, first_head = 0;
};

template <class Acc>
class windowed_run {
  using Arch = simd::native;

 public:
  /// `sizes.n`: the most queries at once; `sizes.m`: the most keys that the exact part is given at once.
  windowed_run(const windowed_attention& m, const shape& sizes)
      : m_(m), exact_(m.exact()), rest_(m.rest()), level_(m, sizes), s_(sizes) {}

  /// What a call on so many threads needs besides a place.
  struct scratch {
    Acc* row;
    std::byte* memory;
    std::size_t bytes;
    scratch(arena& a, const windowed_attention& m, const shape& s, int threads) {
      shape rest = s;
      rest.m = s.n;
      bytes = std::max(m.exact().workspace_size(s, threads), m.rest().workspace_size(rest, threads));
      row = a.take<Acc>(threads * windowed_level<Acc>::scratch(s.d));
      memory = a.take<std::byte>(static_cast<isize>(bytes));
    }
  };

  /// `far`: the keys that have left the window before these rows; it goes on with them.
  void attend(exec_ref exec, const windowed_rows_of& x, const windowed_place& at, const scratch& own,
              state& far) const {
    near(exec, x, at, own);
    rest(exec, x, at, own, far);
    join_rows(exec, x, at, own);
  }
  void near(exec_ref exec, const windowed_rows_of& x, const windowed_place& at, const scratch& own) const {
    problem p;
    p.q = x.q, p.k = x.k, p.v = x.v, p.out = at.near.slice(0, x.q.length), p.lse = at.lse.slice(0, x.q.length);
    exact_.prefill(exec, p, arena({own.memory, own.bytes}));
  }
  void rest(exec_ref exec, const windowed_rows_of& x, const windowed_place& at, const scratch& own, state& far) const {
    const isize c = x.q.length, x0 = first_rest(x.position, c);
    if (x0 == c) return;
    windowed_rows_of late = x;
    late.q = x.q.slice(x0, c - x0);
    absorb(exec, late, x.k.length - c + x0 - m_.window, c - x0, at, x0, own, far);
  }

  /// One token, whose keys are in the ring already; x.k, x.v: the one key that has left the window, if any has.
  void attend_one(exec_ref exec, const windowed_rows_of& x, const state_rows& rows, const state& ring,
                  const windowed_place& at, const scratch& own, state& far) const {
    problem p;
    p.q = x.q, p.out = at.near.slice(0, 1), p.lse = at.lse.slice(0, 1);
    p.k.length = p.v.length = 1, p.k.heads = p.v.heads = s_.G;
    detail::attend<Acc>(exact_, exec,
                        problem_list(s_.B,
                                     [&](isize b) {
                                       sequence_problem one = detail::item_of(p, b);
                                       one.kv = rows.sequence(ring, b);
                                       one.first_row = 0, one.all_rows = 1, one.all_tokens = x.position + 1;
                                       return one;
                                     }),
                        arena({own.memory, own.bytes}));
    if (first_rest(x.position, 1) == 0) absorb(exec, x, 0, 1, at, 0, own, far);
    join_rows(exec, x, at, own);
  }

  /// Near and far parts into x.out.
  void join_rows(exec_ref exec, const windowed_rows_of& x, const windowed_place& at, const scratch& own) const {
    const isize c = x.q.length, x0 = first_rest(x.position, c);
    exec.for_tasks(s_.B * s_.H, [&](isize task, isize slot) {
      Acc* row = own.row + slot * level_.scratch(s_.d);
      for (isize i = 0; i < c; ++i) join(x, at, task / s_.H, task % s_.H, i, i >= x0, row);
    });
  }

  /// Keys [from, from + count) of x join the rest. There are as many queries, or none: the partial of row i, with and up to key from + i,
  /// goes to row `to` + i.
  void absorb(exec_ref exec, const windowed_rows_of& x, isize from, isize count, const windowed_place& at, isize to,
              const scratch& own, state& far) const {
    const isize c = x.q.length;
    problem p;
    p.q = x.q, p.k = x.k.slice(from, count), p.v = x.v.slice(from, count), p.out = at.far.slice(to, c);
    const linear_partial sums{at.sums.slice(to, c), at.peaks.slice(to, c), x.first_head};
    rest_.prefill_partial(exec, p, sums, &far, arena({own.memory, own.bytes}));
  }

 private:
  /// The first of c rows, the first at `position`, that has a rest.
  isize first_rest(isize position, isize c) const {
    const isize x = m_.first + m_.window - position;
    return x < 0 ? 0 : x > c ? c : x;
  }

  /// The partials of row i under one denominator: (lse, 1, near) and (level + peak, sum, far).
  void join(const windowed_rows_of& x, const windowed_place& at, isize b, isize h, isize i, bool has_rest,
            Acc* memory) const {
    Acc* o = static_cast<Acc*>(at.near.row(b, h, i));
    Acc lse = *static_cast<const Acc*>(at.lse.row(b, h, i));
    if (has_rest) {
      const Acc* other = static_cast<const Acc*>(at.far.row(b, h, i));
      const Acc weight = *static_cast<const Acc*>(at.sums.row(b, h, i)),
                peak = *static_cast<const Acc*>(at.peaks.row(b, h, i));
      const Acc level =
          level_.of(x.q, x.k, b, h, i, x.k.length - x.q.length + i, memory, nullptr, x.first_head * s_.group());
      const Acc rest = level + peak + std::log(std::abs(weight)), top = lse > rest ? lse : rest;
      if (top > -std::numeric_limits<Acc>::infinity() || top != top) {
        // weight e^(a - top) is at most 1 in size; the numerators are as far from 1 as the values are.
        const Acc one = std::exp(lse - top), two = weight == Acc(0) ? Acc(0) : std::exp(rest - top) / std::abs(weight);
        const Acc sum = one + two * weight, inverse = sum != Acc(0) ? Acc(1) / sum : Acc(0);
        for (isize c = 0; c < s_.e; ++c) o[c] = (one * o[c] + two * other[c]) * inverse;
        lse = top + std::log(sum);
      }
    }
    simd::store_row<Arch, Acc>(x.out.type, o, s_.e, x.out.row(b, h, i));
    if (x.lse) *static_cast<Acc*>(x.lse.row(b, h, i)) = lse;
  }

  const windowed_attention& m_;
  softmax_attention exact_;
  linear_attention rest_;
  windowed_level<Acc> level_;
  shape s_;
};

/// One KV head of one item, with its query heads, as a call of its own.
inline shape windowed_unit(shape s, isize chunk) {
  s.H = s.group(), s.B = s.G = 1, s.n = chunk;
  return s;
}

/// A place and scratch for each of some tasks.
template <class Acc>
struct windowed_spot {
  windowed_place place;
  typename windowed_run<Acc>::scratch own;

  windowed_spot(arena& a, const windowed_attention& m, const shape& s, int threads)
      : place(a, s, s.n), own(a, m, s, threads) {}
  /// The one with number i of many that lie side by side.
  static windowed_spot at(arena a, isize i, const windowed_attention& m, const shape& s) {
    for (isize j = 0; j < i; ++j) windowed_spot(a, m, s, 1);
    return {a, m, s, 1};
  }
};

/// A call without a state: keys are read in place, the linear state lies in the scratch. Tasks are KV heads. Of the KV heads that are
/// left over when each thread has had as many, the chunks are tasks: their exact parts wait for nothing, their rests for each other.
template <class Acc>
class windowed_whole {
 public:
  windowed_whole(arena& a, const windowed_attention& m, const shape& s, int threads)
      : m_(m),
        chunk_(s.n < windowed_chunk ? s.n : windowed_chunk),
        heads_(s.G),
        units_(s.B * s.G),
        threads_(threads),
        unit_(windowed_unit(s, chunk_)),
        rest_(m.rest()),
        run_(m, unit_) {
    const isize over = units_ % threads;
    cut_ = over <= most_cut && 2 * over <= threads && s.n > chunk_ ? over : 0;
    bytes_ = rest_.state_bytes(unit_);
    states_ = a.take<std::byte>(units_ * static_cast<isize>(bytes_));
    memory_ = a;
    for (int t = 0; t < threads; ++t) windowed_spot<Acc>(a, m, unit_, 1);
    for (isize i = 0; i < cut_ * ring; ++i) windowed_place(a, unit_, chunk_);
  }

  void prefill(exec_ref exec, const problem& p) const {
    const isize whole = units_ - cut_, chunks = ceil_div(p.q.length, chunk_);
    std::array<progress, most_cut> rested;
    std::array<progress, most_cut * ring> joined;
    exec.for_tasks(whole + 2 * cut_ * chunks, [&](isize task, isize slot) {
      const auto at = windowed_spot<Acc>::at(memory_, slot, m_, unit_);
      if (task < whole) return head(p, task, chunks, at);
      const isize number = task - whole, c = number / (2 * cut_), u = number % (2 * cut_) / 2;
      auto& mine = rested[static_cast<std::size_t>(u)];
      auto& free = joined[static_cast<std::size_t>(u * ring + c % ring)];
      const windowed_place place = ring_place(u * ring + c % ring);
      const windowed_rows_of x = rows(p, whole + u, c);
      free.wait(c / ring);
      if (number % 2 == 0) {
        mine.wait(c);
        state far = c == 0 ? begin(p, whole + u, place, at.own) : far_of(whole + u);
        run_.rest(serial, x, place, at.own, far);
        return mine.reach(c + 1);
      }
      run_.near(serial, x, place, at.own);
      mine.wait(c + 1);
      run_.join_rows(serial, x, place, at.own);
      free.reach(c / ring + 1);
    });
  }

 private:
  static constexpr isize most_cut = 8, ring = 4;

  windowed_place ring_place(isize i) const {
    arena a = memory_;
    for (isize t = 0; t < threads_; ++t) windowed_spot<Acc>(a, m_, unit_, 1);
    for (isize j = 0; j < i; ++j) windowed_place(a, unit_, chunk_);
    return {a, unit_, chunk_};
  }
  state far_of(isize unit) const {
    return state::over(rest_.tag(), unit_, 0, {states_ + unit * static_cast<isize>(bytes_), bytes_});
  }

  /// Chunk c of a unit.
  windowed_rows_of rows(const problem& p, isize unit, isize c) const {
    const isize b = unit / heads_, g = unit % heads_, R = unit_.H, before = p.k.length - p.q.length, i = c * chunk_;
    const isize left = p.q.length - i, count = left < chunk_ ? left : chunk_;
    const isize keys = before + i + count > 0 ? before + i + count : 0;  // none: rows before the first key
    windowed_rows_of x;
    x.q = p.q.part(b, g * R, R).slice(i, count), x.out = p.out.part(b, g * R, R).slice(i, count);
    x.k = p.k.part(b, g, 1).slice(0, keys), x.v = p.v.part(b, g, 1).slice(0, keys);
    if (p.lse) x.lse = p.lse.part(b, g * R, R).slice(i, count);
    x.position = before + i, x.first_head = g;
    return x;
  }

  /// The state of the rest before the first row, with the keys that lie in no window of this call.
  state begin(const problem& p, isize unit, const windowed_place& place,
              const typename windowed_run<Acc>::scratch& own) const {
    state far = far_of(unit);
    rest_.clear(far);
    const isize unseen = p.k.length - p.q.length - m_.window - m_.first;
    if (unseen > 0) {
      windowed_rows_of x;
      x.k = p.k.part(unit / heads_, unit % heads_, 1), x.v = p.v.part(unit / heads_, unit % heads_, 1);
      x.q = x.k.slice(0, 0), x.first_head = unit % heads_;
      run_.absorb(serial, x, m_.first, unseen, place, 0, own, far);
    }
    return far;
  }

  void head(const problem& p, isize unit, isize chunks, const windowed_spot<Acc>& at) const {
    state far = begin(p, unit, at.place, at.own);
    for (isize c = 0; c < chunks; ++c) run_.attend(serial, rows(p, unit, c), at.place, at.own, far);
  }

  const windowed_attention& m_;
  isize chunk_, heads_, units_, threads_, cut_ = 0;
  shape unit_;
  linear_attention rest_;
  windowed_run<Acc> run_;
  std::size_t bytes_ = 0;
  std::byte* states_ = nullptr;
  arena memory_;
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
    detail::windowed_whole<double>(scratch, *this, p.shape(), exec.concurrency()).prefill(exec, p);
  else
    detail::windowed_whole<float>(scratch, *this, p.shape(), exec.concurrency()).prefill(exec, p);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
