// SPDX-License-Identifier: MIT
#pragma once
/// @file  compensation::linear: what linear attention gives to the keys that a query block skips, under the denominator of the exact part.
///
///   rest_i = e^(a_i) sum_{j skipped} phi(q_i) . phi(k_j) [v_j, 1]                  a_i = log_weight_h + query_gate_h . q_i
///          = e^(a_i) ( phi(q_i) S_t - sum_{j < t, not skipped} + sum_{j >= t, skipped} )      S_t = sum_{j < t} phi(k_j) [v_j, 1]^T
///
/// t is the last multiple of `stretch` before the end of the last skipped block. A state for each block would be r (e + 1) numbers for block_k keys
/// of d + e, and its sums r (e + 1) / block_q additions a row and block; the states of whole prefixes are few, and what has to leave them again are
/// keys that are computed anyway: r + e multiply-adds more for each. Where fewer keys are skipped before t than are computed there, the skipped
/// ones are summed themselves.
///
/// Contract   phi >= 0, without positions and without a scale of its own. Kept keys are computed, so they are not skipped. A key reaches the rows
///            that may see it, no other: t is not behind the query block.
/// Numerics   the difference is exact but for eps (phi(q_i) S_t): of the size of eps where the map's weights do not exceed the true ones by far.
///            A rest below 64 eps of what it is the difference of counts as none.
/// Cost       r (e + 1) + min(skipped, computed) (r + e) multiply-adds a row. Scratch: r numbers a key, r (e + 1) for each stretch, of every KV head.
/// Reference  hybrid/reference.hpp.       Source  the gate: the query gate of windowed_attention; SLA's difference of states (2509.24006).

#include <cmath>

#include <fovea/core/exec.hpp>
#include <fovea/hybrid/mechanism.hpp>
#include <fovea/kernel/sparse_tiles.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
class linear_rest {
  using Arch = simd::native;
  static constexpr isize some = feature_rows;  ///< rows of a pass: of queries, of keys

 public:
  linear_rest() = default;
  /// Everything that the rows of a call share.
  linear_rest(arena& memory, const hybrid_attention& m, const shape& s, int threads)
      : m_(&m), s_(s), r_(m.map.features(s.d)), ld_(ceil_div(r_, isize{16}) * 16), width_(s.e + 1) {
    stretch_ = ceil_div(isize{256}, m.block_k) * m.block_k;
    phi_of_ = s.m * ld_, states_of_ = s.m / stretch_ * r_ * width_;
    phi_ = memory.take<Acc>(s.B * s.G * phi_of_), states_ = memory.take<Acc>(s.B * s.G * states_of_);
    work_ = memory.take<Acc>(threads * work());
  }
  bool on() const { return m_ != nullptr; }

  struct slot {
    Acc *x, *map, *q, *turned;  // [some][d]; the map's own; phi(q): [some][ld], [r][some]
    Acc *k, *v, *w;             // [some][ld], [some][e + 1] of listed keys; their products [some][some]
    Acc* sum;                   // [some][e + 1]
    slot(arena& memory, const linear_rest& of) {
      x = memory.take<Acc>(some * of.s_.d), map = memory.take<Acc>(of.m_->map.scratch(of.s_.d));
      q = memory.take<Acc>(some * of.ld_), turned = memory.take<Acc>(of.r_ * some);
      k = memory.take<Acc>(some * of.ld_), v = memory.take<Acc>(some * of.width_), w = memory.take<Acc>(some * some);
      sum = memory.take<Acc>(some * of.width_);
    }
  };

  /// Features of all keys, and the states.
  void prepare(exec_ref exec, const problem& p) const {
    exec.for_tasks(s_.B * s_.G, [&](isize task, isize index) {
      const isize b = task / s_.G, g = task % s_.G;
      Acc *const x = work_ + index * work(), *const map = x + some * s_.d,
                 *const v = map + ceil_div(m_->map.scratch(s_.d), isize{16}) * 16;
      for (isize j = 0; j < s_.m; j += some) {
        const isize count = std::min(some, s_.m - j);
        features(p.k, b, g, j, count, true, x, map, phi_ + task * phi_of_ + j * ld_);
      }
      for (isize t = 0; t < s_.m / stretch_; ++t) {
        Acc* const state = states_ + task * states_of_ + t * r_ * width_;
        for (isize c = 0; c < r_ * width_; ++c) state[c] = t > 0 ? state[c - r_ * width_] : Acc(0);
        for (isize j = t * stretch_; j < (t + 1) * stretch_; j += some) {
          const isize count = std::min(some, (t + 1) * stretch_ - j);
          for (isize y = 0; y < count; ++y) value(p, b, g, j + y, Acc(1), v + y * width_);
          tile::gemm<Arch, Acc>(r_, width_, count, phi_ + task * phi_of_ + j * ld_, 1, ld_, v, width_, state, width_,
                                true);
        }
      }
    });
  }

  /// What becomes of the keys before a query block. Blocks of `members` 0 hold nothing but kept keys.
  struct fates {
    kernel::block_list computed, skipped, kept;  ///< blocks, blocks, keys
  };
  /// f(x, m, o) for rows i0 + x of head h that have a rest: its denominator e^m, its output o [e].
  template <class F>
  void each_row(slot& at, const problem& p, isize b, isize h, isize i0, isize count, const fates& of, F&& f) const {
    for (isize i = i0; of.skipped.count > 0 && i < i0 + count; i += some)
      pass(at, p, b, h, i, std::min(some, i0 + count - i), of,
           [&](isize x, Acc m, const Acc* o) { f(i - i0 + x, m, o); });
  }

 private:
  isize work() const {
    return ceil_div(some * (s_.d + width_), isize{16}) * 16 + ceil_div(m_->map.scratch(s_.d), isize{16}) * 16;
  }
  /// phi of rows [i, i + count) of head h of q or k.
  void features(const tensor_ref& from, isize b, isize h, isize i, isize count, bool key, Acc* x, Acc* map,
                Acc* to) const {
    for (isize y = 0; y < count; ++y) simd::load_row<Arch, Acc>(from.type, from.row(b, h, i + y), s_.d, x + y * s_.d);
    feature_block<Acc> block;
    block.x = x, block.x_stride = block.width = s_.d, block.rows = count, block.out = to, block.out_stride = ld_;
    block.head = key ? h * s_.group() : h, block.kv_head = key ? h : h / s_.group(), block.key = key;
    m_->map.apply(block, map);
  }
  /// sign [v_j, 1]
  void value(const problem& p, isize b, isize g, isize j, Acc sign, Acc* to) const {
    simd::load_row<Arch, Acc>(p.v.type, p.v.row(b, g, j), s_.e, to);
    for (isize c = 0; c < s_.e; ++c) to[c] *= sign;
    to[s_.e] = sign;
  }

  /// sum += sign phi(q) . phi(k_j) [v_j, 1] over keys that come one by one, in passes.
  struct adder {
    const linear_rest& of;
    slot& at;
    const problem& p;
    isize b, g, rows, held = 0;
    void add(isize j, Acc sign) {
      const Acc* from = of.phi_ + (b * of.s_.G + g) * of.phi_of_ + j * of.ld_;
      std::copy_n(from, of.r_, at.k + held * of.ld_);
      of.value(p, b, g, j, sign, at.v + held * of.width_);
      if (++held == some) flush();
    }
    void flush() {
      tile::gemm<Arch, Acc>(held, rows, of.r_, at.k, of.ld_, 1, at.turned, some, at.w, some, false);
      tile::gemm<Arch, Acc>(rows, of.width_, held, at.w, 1, some, at.v, of.width_, at.sum, of.width_, true);
      held = 0;
    }
  };

  template <class F>
  void pass(slot& at, const problem& p, isize b, isize h, isize i, isize rows, const fates& of, F&& f) const {
    const isize g = h / s_.group(), size = m_->block_k;
    features(p.q, b, h, i, rows, false, at.x, at.map, at.q);
    for (isize x = 0; x < rows; ++x)
      for (isize c = 0; c < r_; ++c) at.turned[c * some + x] = at.q[x * ld_ + c];
    const isize end = std::min((of.skipped.at[of.skipped.count - 1] + isize{1}) * size, s_.m);
    isize t = end / stretch_;
    const isize below = before(of.skipped, t), above = before(of.computed, t);
    if (below <= above) t = 0;
    for (isize x = 0; x < rows * width_; ++x) at.sum[x] = Acc(0);
    if (t > 0)
      tile::gemm<Arch, Acc>(rows, width_, r_, at.q, ld_, 1,
                            states_ + (b * s_.G + g) * states_of_ + (t - 1) * r_ * width_, width_, at.sum, width_,
                            false);
    alignas(64) Acc whole[some];
    for (isize x = 0; x < rows; ++x) whole[x] = at.sum[x * width_ + s_.e];
    adder all{*this, at, p, b, g, rows};
    const isize from = t * stretch_;
    for (isize y = 0; y < of.computed.count && of.computed.at[y] * size < from; ++y)
      for (isize j = of.computed.at[y] * size; j < (of.computed.at[y] + isize{1}) * size; ++j) all.add(j, Acc(-1));
    isize z = 0;
    for (; z < of.kept.count && of.kept.at[z] < from; ++z) all.add(of.kept.at[z], Acc(-1));
    for (isize y = 0; y < of.skipped.count; ++y) {
      const isize j0 = of.skipped.at[y] * size;
      if (j0 < from) continue;
      for (isize j = j0; j < std::min(j0 + size, s_.m); ++j) {
        while (z < of.kept.count && of.kept.at[z] < j) ++z;
        if (z == of.kept.count || of.kept.at[z] != j) all.add(j, Acc(1));
      }
    }
    all.flush();
    finish(at, p, b, h, i, rows, whole, f);
  }
  /// Blocks of a list before state t.
  isize before(const kernel::block_list& list, isize t) const {
    isize count = 0;
    while (count < list.count && list.at[count] * m_->block_k < t * stretch_) ++count;
    return count;
  }
  template <class F>
  void finish(slot& at, const problem& p, isize b, isize h, isize i, isize rows, const Acc* whole, F&& f) const {
    constexpr Acc least = 64 * std::numeric_limits<Acc>::epsilon();
    for (isize x = 0; x < rows; ++x) {
      Acc* const o = at.sum + x * width_;
      const Acc mass = o[s_.e];
      if (mass <= least * whole[x]) continue;  // NaN goes on
      for (isize c = 0; c < s_.e; ++c) o[c] /= mass;
      f(x, level(p, b, h, i + x, at.x) + std::log(mass), o);
    }
  }
  Acc level(const problem& p, isize b, isize h, isize i, Acc* scratch) const {
    Acc a = m_->log_weight.data != nullptr ? static_cast<Acc>(*m_->log_weight.row(0, h, 0)) : Acc(0);
    if (m_->query_gate.data == nullptr) return a;
    const Acc* q = simd::row_as<Arch, Acc>(p.q.type, p.q.row(b, h, i), s_.d, scratch);
    const float* gate = m_->query_gate.row(0, h, 0);
    for (isize c = 0; c < s_.d; ++c) a += q[c] * static_cast<Acc>(gate[c]);
    return a;
  }

  const hybrid_attention* m_ = nullptr;
  shape s_;
  isize r_ = 0, ld_ = 0, width_ = 0, stretch_ = 1, phi_of_ = 0, states_of_ = 0;
  Acc *phi_ = nullptr, *states_ = nullptr, *work_ = nullptr;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
