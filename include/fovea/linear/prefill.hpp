// SPDX-License-Identifier: MIT
#pragma once
/// @file  Causal linear attention: blocks of 126 tokens per state head, made ready in scratch, then the sweep of kernel/linear_sweep.hpp.
///
/// Tasks are heads. The heads that are left over when each thread has had as many as every other come last, cut into ranges of column
/// panels: each range by itself where rows are read as they lie, or where two ranges make cheap features; else blocks pass through two
/// kinds of tasks, in this order: what a block needs (one task a block, in turn), and the sweep (a range a task, block by block).
/// Either way every number is computed by the same instructions in the same order, so results do not depend on threads.

#include <algorithm>
#include <array>

#include <fovea/kernel/linear_step.hpp>
#include <fovea/linear/bidirectional.hpp>
#include <fovea/linear/blocks.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Arch, class Acc>
class linear_sweeper {
 public:
  linear_sweeper(const linear_attention& m, const problem& p, const linear_partial* partial, state* s, arena scratch,
                 int threads)
      : m_(m),
        p_(p),
        partial_(partial),
        state_(s == nullptr ? nullptr : s->as<Acc>()),
        blocks_(m, p, partial, s == nullptr ? 0 : s->tokens(), s != nullptr),
        n_(blocks_.sizes()),
        shares_(n_, threads),
        ranges_(shares_.ranges),
        threads_(threads) {
    apart_ = ranges_ > 1 && ranges_apart();
    if (ranges_ > 1) surveys_ = scratch.take<Acc>(n_.B * n_.S);
    if (apart_ && state_ != nullptr) tails_ = scratch.take<Acc>(n_.B * n_.S * n_.tail_elements());
    memory_ = scratch;
    const isize first = p.k.length - p.q.length;  // queries begin at this key
    held_ = state_ != nullptr && first < 0 ? -first : 0, unread_ = first > 0 ? first : 0;
    per_head_ =
        std::max(isize{1}, ceil_div(held_, most) + ceil_div(unread_, most) + ceil_div(p.k.length - unread_, most));
  }

  void run(exec_ref exec) const {
    if (ranges_ > 1) return apart_ ? run_apart(exec) : pass_blocks(exec);
    exec.for_tasks(n_.B * n_.S, [&](isize index, isize slot) { whole_head(index, slot); });
  }

  static void lay_out(arena& a, const linear_attention& m, const shape& s, int threads) {
    const auto n = sizes_of(m, s);
    const shares cut(n, threads);
    if (cut.ranges > 1) a.take<Acc>(n.B * n.S), a.take<Acc>(n.B * n.S * n.tail_elements());
    const isize places = cut.ranges > 1 ? std::max<isize>(threads, ring_at(cut, threads) + depth) : threads;
    for (isize t = 0; t < places; ++t) scratch_type(a, m, n, s.d);
  }

 private:
  using scratch_type = linear_scratch<Arch, Acc>;
  using site = linear_site<Acc>;
  using block = linear_block<Acc>;
  static constexpr isize most = kernel::sweep_tokens, depth = 3, most_ranges = 64, most_ahead = 12;

  /// The first `whole` heads are a task each; the columns of the others, fewer than there are threads, are cut into `ranges`.
  struct shares {
    isize whole, ranges = 1;
    /// A range does about a fifth of a head's work whatever its columns: keys, queries and features are read in full.
    shares(const linear_sizes& n, isize threads) : whole(n.B * n.S) {
      const isize rest = whole % threads, most_cuts = std::min({n.panels, threads, most_ranges});
      double least = 1;  // time for the rest, one head = 1
      for (isize cuts = 2; rest > 0 && whole < 16 * threads && cuts <= most_cuts; ++cuts) {
        const double part = static_cast<double>(ceil_div(n.panels, cuts)) / static_cast<double>(n.panels);
        const double time = static_cast<double>(ceil_div(rest * cuts, threads)) * (0.2 + 0.8 * part);
        if (time < least) least = time, ranges = cuts;
      }
      if (ranges > 1) whole -= rest;
    }
  };
  /// Before the ring lie the places of whole heads, one a thread.
  static isize ring_at(const shares& cut, isize threads) { return cut.whole > 0 ? threads : 0; }
  isize cut_heads() const { return n_.B * n_.S - shares_.whole; }

  scratch_type scratch_at(isize slot) const {
    arena a = memory_;
    for (isize i = 0; i < slot; ++i) scratch_type(a, m_, n_, p_.q.width);
    return scratch_type(a, m_, n_, p_.q.width);
  }
  void whole_head(isize index, isize slot) const {
    scratch_type s = scratch_at(slot);
    s.clear_padding(n_, used());
    site at = open(s, s, index, true);
    for (isize j = 0; j < per_head_; ++j) {
      block x;
      prepare(s, at, j, x);
      if (j == 0) clear(at, 0, n_.panels);
      sweep(s, at, x, 0, n_.panels);
    }
  }

  /// May each range prepare its blocks by itself? What a block needs is then a few numbers a token; or there are two ranges, and
  /// features without products are made sooner than they come from the cache of another core.
  bool ranges_apart() const {
    const feature_map map = m_.phi();
    if (partial_ != nullptr || map.surveys() || map.log_scaled()) return false;
    if (map.identity() && !m_.normalised() && !(by_channel(m_.rule) && p_.gates.log_decay.width > 1)) return true;
    return ranges_ == 2 && map.macs(p_.q.width) == 0.0;
  }
  /// Every range of columns goes through the sequence alone, with a tail of its own: no thread waits for another.
  void run_apart(exec_ref exec) const {
    const isize tail = n_.tail_elements(), whole = shares_.whole;
    for (isize i = whole; tails_ != nullptr && i < n_.B * n_.S; ++i)
      std::copy_n(state_ + i * n_.head_elements() + n_.S_elements(), tail, tails_ + i * tail);
    exec.for_tasks(whole + cut_heads() * ranges_, [&](isize task, isize slot) {
      if (task < whole) return whole_head(task, slot);
      const isize index = whole + (task - whole) / ranges_, r = (task - whole) % ranges_,
                  first = n_.panels * r / ranges_, last = n_.panels * (r + 1) / ranges_;
      scratch_type s = scratch_at(slot);
      s.clear_padding(n_, used());
      site at = open(s, s, index, true);
      if (tails_ != nullptr) {
        Acc* own = s.state + n_.S_elements();
        std::copy_n(tails_ + index * tail, tail, own);
        at.tail = state_tail<Acc>(own, n_);
      }
      for (isize j = 0; j < per_head_; ++j) {
        block x;
        prepare(s, at, j, x, r == 0);
        if (j == 0) clear(at, first, last);
        sweep(s, at, x, first, last);
      }
      if (tails_ != nullptr && r == 0) std::copy_n(s.state + n_.S_elements(), tail, at.S + n_.S_elements());
    });
  }

  /// Blocks are prepared one ahead of those that are swept, in a ring of scratch memories.
  void pass_blocks(exec_ref exec) const {
    const isize base = ring_at(shares_, threads_);
    std::array<scratch_type, depth> ring{scratch_at(base), scratch_at(base + 1), scratch_at(base + 2)};
    for (auto& s : ring) s.clear_padding(n_, used());
    std::array<block, depth> ready;
    std::array<progress, most_ranges> swept;
    progress prepared;
    const isize whole = shares_.whole, blocks = cut_heads() * per_head_, unit = ranges_ + 1;
    const auto make = [&](isize g) {
      for (isize r = 0; r < ranges_; ++r) swept[static_cast<std::size_t>(r)].wait(g - depth + 1);
      prepared.wait(g);
      const auto slot = static_cast<std::size_t>(g % depth);
      site at = open(ring[slot], ring[0], whole + g / per_head_, g % per_head_ == 0);
      prepare(ring[slot], at, g % per_head_, ready[slot]);
      prepared.reach(g + 1);
    };
    exec.for_tasks(whole + 1 + blocks * unit, [&](isize number, isize own) {
      if (number < whole) return whole_head(number, own);
      const isize task = number - whole - 1;
      if (task < 0) return make(0);
      const isize g = task / unit, r = task % unit - 1, first = n_.panels * r / ranges_,
                  last = n_.panels * (r + 1) / ranges_;
      if (r < 0) {
        if (g + 1 < blocks) make(g + 1);
        return;
      }
      auto& mine = swept[static_cast<std::size_t>(r)];
      prepared.wait(g + 1), mine.wait(g);
      const auto slot = static_cast<std::size_t>(g % depth);
      const site at = open(ring[slot], ring[0], whole + g / per_head_, false);
      if (g % per_head_ == 0) clear(at, first, last);
      sweep(ring[slot], at, ready[slot], first, last);
      mine.reach(g + 1);
    });
  }

  isize used() const { return std::min(most, std::max(p_.k.length, held_)); }

  /// The head's place; `fresh`: its first block, whose memory for a state (`own`) is then cleared behind S.
  site open(scratch_type& s, const scratch_type& own, isize index, bool fresh) const {
    Acc* S = state_ != nullptr ? state_ + index * n_.head_elements() : own.state;
    const isize head = index % n_.S;
    site at{index / n_.S, head, head / (n_.S / p_.k.heads), S, state_tail<Acc>(S + n_.S_elements(), n_), Acc(0)};
    const auto& rows = blocks_.rows();
    if (fresh && state_ == nullptr) clear_tail(S + n_.S_elements(), n_, rows.map.log_scaled());
    if (!rows.map.surveys()) return at;
    if (fresh) at.survey = rows.template survey<Arch, Acc>(s.x, s.map, at.b, at.k_head);
    if (surveys_ != nullptr) fresh ? void(surveys_[index] = at.survey) : void(at.survey = surveys_[index]);
    return at;
  }
  void clear(const site& at, isize first_panel, isize last_panel) const {
    const isize panel = n_.r * n_.width;
    for (isize i = first_panel * panel; state_ == nullptr && i < last_panel * panel; ++i) at.S[i] = Acc(0);
  }

  /// Block j of a head: queries before all keys where a state is held, keys before all queries, then both.
  void prepare(scratch_type& s, site& at, isize j, block& x, bool writes = true) const {
    const isize first = p_.k.length - p_.q.length, keyless = ceil_div(held_, most), mute = ceil_div(unread_, most);
    if (j == 0 && state_ == nullptr && writes)
      for (isize i = 0; i < std::min(p_.q.length, -first); ++i) zero_row(s, at, i);
    const isize begin = j < keyless          ? 0
                        : j < keyless + mute ? 0
                                             : unread_,
                end = j < keyless          ? held_
                      : j < keyless + mute ? unread_
                                           : p_.k.length;
    const isize done = (j < keyless ? j : j < keyless + mute ? j - keyless : j - keyless - mute) * most;
    x.t = j < keyless ? -1 : begin + done, x.count = std::min(most, end - begin - done);
    x.query = j < keyless ? done : j < keyless + mute ? -1 : x.t - first;
    if (x.count > 0) blocks_.prepare(s, at, x);
  }

  void zero_row(scratch_type& s, const site& at, isize i) const {
    for (isize c = 0; c < n_.e; ++c) s.out[c] = Acc(0);
    for (isize h = 0; h < n_.R; ++h) {
      const isize head = at.head * n_.R + h;
      simd::store_row<Arch, Acc>(p_.out.type, s.out, n_.e, p_.out.row(at.b, head, i));
      if (partial_ == nullptr) continue;
      partial_->template row<Acc>(partial_->l, at.b, head, i) = Acc(0);
      if (partial_->m) partial_->template row<Acc>(partial_->m, at.b, head, i) = -std::numeric_limits<Acc>::infinity();
    }
  }

  void sweep(scratch_type& s, const site& at, const block& x, isize first, isize last) const {
    const bool reads = x.query >= 0;
    if (x.count == 0) return;
    if (x.count == 1 && reads) return single(s, at, x, first, last);
    kernel::sweep_columns<Acc> to{x.v, x.v_stride, s.out, s.e_stride, most * s.e_stride};
    const bool in_place = reads && p_.out.type == dtype_of<Acc> && n_.e == s.e_stride;
    if (in_place) {
      to.out = static_cast<Acc*>(p_.out.row(at.b, at.head * n_.R, x.query));
      to.out_stride = p_.out.row_stride, to.out_head_stride = p_.out.head_stride;
    }
    kernel::sweep_ahead next[most_ahead];
    kernel::sweep_block<Acc> b = x.sweep;
    b.ahead = next, b.aheads = ahead(at, x, first, last, next);
    blocks_.delta() ? kernel::sweep_panels<Arch, Acc, true>(b, at.S, first, last, to)
                    : kernel::sweep_panels<Arch, Acc, false>(b, at.S, first, last, to);
    if (!reads || in_place) return;
    for (isize h = 0; h < n_.R; ++h)
      for (isize i = 0; i < x.count; ++i)
        store_columns(at, h, x.query + i, to.out + h * to.out_head_stride + i * s.e_stride, first, last);
  }

  /// The rows of the block behind x that this thread will read, and columns [first, last) of those that it will write.
  isize ahead(const site& at, const block& x, isize first, isize last, kernel::sweep_ahead* to) const {
    const isize keys = std::min(most, p_.k.length - x.t - x.count), query = x.query + x.count;
    if (x.t < 0 || x.query < 0 || keys <= 0) return 0;
    isize count = 0;
    const auto add = [&](const auto& rows, isize head, isize row, isize column, isize width) {
      const isize size = static_cast<isize>(size_of(rows.type));
      if (count == most_ahead || width <= 0) return;
      const auto* at_row = static_cast<const char*>(static_cast<const void*>(rows.row(at.b, head, row)));
      to[count++] = kernel::sweep_ahead::of(at_row + column * size, keys, width * size, rows.row_stride * size);
    };
    const isize column = first * n_.width, width = std::min(n_.e, last * n_.width) - column;
    const bool prepares = ranges_ == 1 || apart_;
    if (prepares) add(p_.k, at.k_head, x.t + x.count, 0, p_.k.width);
    for (isize h = 0; prepares && h < n_.R; ++h) add(p_.q, blocks_.query_head(at, h), query, 0, p_.q.width);
    if (prepares && p_.gates.log_decay.width > 1) {
      add(p_.gates.log_decay, at.head, x.t + x.count, 0, p_.gates.log_decay.width);
    }
    add(p_.v, at.head, x.t + x.count, column, width);
    for (isize h = 0; h < n_.R; ++h) add(p_.out, at.head * n_.R + h, query, column, width);
    return count;
  }

  void store_columns(const site& at, isize h, isize i, const Acc* row, isize first, isize last) const {
    const isize c = first * n_.width, count = std::min(n_.e, last * n_.width) - c;
    auto* to = static_cast<unsigned char*>(p_.out.row(at.b, at.head * n_.R + h, i)) +
               c * static_cast<isize>(size_of(p_.out.type));
    simd::store_row<Arch, Acc>(p_.out.type, row + c, count, to);
  }

  /// A block of one token: the decode step.
  void single(scratch_type& s, const site& at, const block& x, isize first, isize last) const {
    isize step = 0;
    const Acc* keep = blocks_.single_keep(s, step);
    for (isize panel = first; panel < last; ++panel) {
      Acc* S = at.S + panel * n_.r * n_.width;
      const isize column = panel * n_.width;
      const Acc* v = x.v + column;
      if (!blocks_.delta()) {
        kernel::step_panel<Arch, Acc>(n_.r, S, keep, step, s.k, v, n_.R, s.q, s.q_head, s.out + column, s.e_stride);
        continue;
      }
      Acc *y = s.y + column, *row = s.x_row + column;
      kernel::step_panel<Arch, Acc>(n_.r, S, keep, step, nullptr, nullptr, n_.R + 1, s.lines, s.stride, y, s.e_stride);
      for (isize c = 0; c < n_.width; ++c) row[c] = s.beta[0] * (v[c] - y[c]);
      kernel::step_panel<Arch, Acc>(n_.r, S, keep, step, s.k, row, 0, nullptr, 0, nullptr, 0);
      for (isize h = 0; h < n_.R; ++h)
        for (isize c = 0; c < n_.width; ++c)
          s.out[h * s.e_stride + column + c] = y[(h + 1) * s.e_stride + c] + s.single_dot[h] * row[c];
    }
    for (isize h = 0; h < n_.R; ++h) {
      Acc* row = s.out + h * s.e_stride;
      for (isize c = first * n_.width; c < last * n_.width; ++c) row[c] *= s.single_gain[h];
      store_columns(at, h, x.query, row, first, last);
    }
  }

  const linear_attention& m_;
  const problem& p_;
  const linear_partial* partial_;
  Acc *state_, *surveys_ = nullptr, *tails_ = nullptr;
  bool apart_ = false;
  linear_blocks<Arch, Acc> blocks_;
  linear_sizes n_;
  shares shares_;
  isize ranges_, threads_, held_ = 0, unread_ = 0, per_head_ = 1;
  arena memory_;
};

}  // namespace detail

#if FOVEA_DEFINES_LOOPS
template <class Arch, class Acc>
void linear_attention::run(exec_ref exec, const problem& p, const linear_partial* partial, state* s,
                           arena scratch) const {
  if (is_causal)
    detail::linear_sweeper<Arch, Acc>(*this, p, partial, s, scratch, exec.concurrency()).run(exec);
  else
    detail::linear_bidirectional<Arch, Acc>(*this, p, scratch, exec.concurrency()).run(exec);
}
FOVEA_INSTANTIATE(template void linear_attention::run<simd::native, float>(exec_ref, const problem&,
                                                                           const linear_partial*, state*, arena) const;
                  template void linear_attention::run<simd::native, double>(exec_ref, const problem&,
                                                                            const linear_partial*, state*, arena)
                      const;)
#endif

inline std::size_t linear_attention::workspace_size(const shape& s, int threads) const {
  arena a;
  const auto lay_out = [&](auto zero) {
    using Acc = decltype(zero);
    if (is_causal)
      detail::linear_sweeper<simd::native, Acc>::lay_out(a, *this, s, threads);
    else
      detail::linear_bidirectional<simd::native, Acc>::lay_out(a, *this, s, threads);
  };
  s.type == dtype::f64 ? lay_out(0.0) : lay_out(0.0F);
  return a.bytes();
}

inline void linear_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? run<simd::native, double>(exec, p, nullptr, nullptr, scratch)
                         : run<simd::native, float>(exec, p, nullptr, nullptr, scratch);
}

inline void linear_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  p.q.type == dtype::f64 ? run<simd::native, double>(exec, p, nullptr, &s, scratch)
                         : run<simd::native, float>(exec, p, nullptr, &s, scratch);
  s.set_tokens(s.tokens() + p.k.length);
}

inline void linear_attention::prefill_partial(exec_ref exec, const problem& p, const linear_partial& to, state* s,
                                              arena scratch) const {
  p.q.type == dtype::f64 ? run<simd::native, double>(exec, p, &to, s, scratch)
                         : run<simd::native, float>(exec, p, &to, s, scratch);
  if (s != nullptr) s->set_tokens(s->tokens() + p.k.length);
}

inline double linear_attention::macs(const shape& s) const {
  const double r = static_cast<double>(phi().features(s.d)), e = static_cast<double>(s.e), B = static_cast<double>(s.B);
  const double queries = static_cast<double>(s.n * std::max(s.H, s.G)), keys = static_cast<double>(s.m * s.G);
  const double maps = phi().macs(s.d) * static_cast<double>(s.n * s.H + s.m * s.G);
  return B * (queries * r * (e + (normalised() ? 1.0 : 0.0)) + keys * r * (is_delta(rule) ? 2.0 : 1.0) * e + maps);
}

inline double linear_attention::step_macs(const shape& s) const {
  shape one = s;
  one.n = one.m = 1;
  return macs(one);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
