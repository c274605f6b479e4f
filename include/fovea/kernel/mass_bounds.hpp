// SPDX-License-Identifier: MIT
#pragma once
/// @file  Bounds of the softmax weight that rows leave out, key by key, from keys and queries rounded to 8 bits.
///
///   s q.k_j = x_j + r,   x_j = s q'.k'_j,   |r| <= h_j = s ( |q - q'| |k'_j| + |q| |k_j - k'_j| )
///   l_j = e^(x_j - h_j) <= w_j = e^(s q.k_j) <= u_j = e^(x_j + h_j)          t_j: weight that a pooled token gives to key j, or 0
///   upper = sum u_j     lower = sum l_j     moved = sum max(u_j - t_j, t_j - l_j)     moved_v = sum max(u_j - t_j, t_j - l_j) |v_j|
///
/// Up to 64 rows lie along the lanes; all weights are relative to a reference of each row (log2).
///
/// Contract   load or clear every lane, then absorb blocks; the sums run over the (row, key) pairs whose bit is set. With the factor
///            `slack` that bounds() applies, upper, moved and moved_v are upper bounds, and lower is a lower bound, of their values in
///            exact arithmetic (docs/mechanisms/hybrid.md, "The certificate"). A key or row that is not finite gives NaN.
/// Cost       d products of bytes (VNNI) or floats and two exponentials' work a pair.    Source  docs/mechanisms/hybrid.md.

#include <fovea/kernel/block_summary.hpp>
#include <fovea/simd/exp.hpp>
#include <fovea/tile/codes.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch, class Acc>
class mass_bounds {
  using P = simd::pack<Acc, Arch>;
  using limits = std::numeric_limits<Acc>;
  static constexpr isize W = P::size;
  static constexpr Acc log2e = static_cast<Acc>(1.4426950408889634074);

 public:
  static constexpr isize rows = 64, chunk = 128;  ///< lanes; keys of an absorb, at most
  /// Exponents are cut off here: a sum that reaches it says nothing any more.
  static constexpr Acc ceiling = 100;

  struct sums {
    Acc upper, lower, moved, moved_v, pooled;
  };
  static constexpr isize kinds = 5;  ///< of sums, in that order

  mass_bounds(arena& memory, isize d) : d_(d) {
    q_ = memory.take<Acc>(d * rows), code_q_ = memory.take<Acc>(d * rows);
    panel_ = memory.take<std::uint8_t>(ceil_div(d, 4) * 256);
    code_ = memory.take<std::int8_t>(2 * d + 8);
    k_ = memory.take<Acc>(chunk * d), s_ = memory.take<Acc>(chunk * rows), share_ = memory.take<Acc>(chunk * rows);
  }

  /// One row of queries into a lane. `reference`: log2 of the weight that 1 stands for.
  void load(isize lane, const Acc* q, double scale, Acc reference) noexcept {
    const Acc unit = static_cast<Acc>(scale) * log2e, eps = limits::epsilon();
    const Acc step = round_row<Arch>(q, d_, 127, code_);
    const auto rounded = size_of_rounding<Arch>(q, code_, step, d_);
    const Acc length = norm_above<Arch, Acc>(q, d_);
    const Acc wide = unit * (1 + 32 * eps);  // the products below, and x itself, are rounded as well
    factor_[lane] = unit * step, reference_[lane] = reference;
    by_size_[lane] = wide * (rounded.residual + static_cast<Acc>(d_ + 16) * eps * rounded.size);
    by_residual_[lane] = wide * length;
    for (isize c = 0; c < d_; ++c)
      q_[c * rows + lane] = q[c] * unit, code_q_[c * rows + lane] = static_cast<Acc>(code_[c]);
    if constexpr (integers) tile::load_code_lane(code_, d_, lane, panel_);
    upper_[lane] = lower_[lane] = moved_[lane] = moved_v_[lane] = pooled_[lane] = Acc(0);
  }
  void clear(isize lane) noexcept {
    for (isize c = 0; c < d_; ++c) code_[c] = 0, q_[c * rows + lane] = code_q_[c * rows + lane] = Acc(0);
    if constexpr (integers) tile::load_code_lane(code_, d_, lane, panel_);
    factor_[lane] = reference_[lane] = by_size_[lane] = by_residual_[lane] = Acc(0);
    upper_[lane] = lower_[lane] = moved_[lane] = moved_v_[lane] = pooled_[lane] = Acc(0);
  }

  /// Keys [j0, j1), at most `chunk`. left_out[j - j0]: lanes that leave key j out. pooled: lanes whose pooled tokens, `part` keys each,
  /// stand for these keys.
  void absorb(const block_summary<Acc>& s, isize j0, isize j1, isize lanes, const std::uint64_t* left_out,
              std::uint64_t pooled, isize part) noexcept {
    const isize width = ceil_div(lanes, W) * W;
    products(s, j0, j1 - j0, width);
    const isize pool0 = j0 / part;
    if (pooled != 0)
      tile::gemm<Arch, Acc>((j1 - 1) / part + 1 - pool0, width, d_, s.pool_k() + pool0 * d_, d_, 1, q_, rows, share_,
                            rows, false);
    for (isize x = 0; x < width; x += W) {
      const auto of_pool = static_cast<simd::lane_bits>(pooled >> x & lane_mask);
      P upper(Acc(0)), lower = upper, moved = upper, moved_v = upper, all = upper, share = upper;
      for (isize j = j0; j < j1; ++j) {
        if (of_pool != 0 && (j == j0 || j % part == 0))
          share = weight(P::load(share_ + (j / part - pool0) * rows + x), x);
        const auto bits = static_cast<simd::lane_bits>(left_out[j - j0] >> x & lane_mask);
        if (bits == 0) continue;
        const P dot = P::load(s_ + (j - j0) * rows + x);
        const P h =
            simd::fma(P::load(by_size_ + x), P(s.size[j]), P::load(by_residual_ + x) * P(s.residual[j])) + P(tiny);
        const P u = weight(simd::fma(dot, P::load(factor_ + x) * P(s.step[j]), h), x);
        const P l = u * simd::max(P(Acc(0)), P(Acc(1)) - h * P(two_ln2));
        const P t = simd::select(of_pool, share, P(Acc(0)));
        const P most = simd::max(u - t, t - l);
        upper = upper + simd::select(bits, u, P(Acc(0))), lower = lower + simd::select(bits, l, P(Acc(0)));
        const P counted = simd::select(bits, most, P(Acc(0)));
        moved = moved + counted, moved_v = simd::fma(counted, P(s.norm_v[j]), moved_v);
        all = all + simd::select(bits, t, P(Acc(0)));
      }
      add(upper_ + x, upper), add(lower_ + x, lower), add(moved_ + x, moved), add(moved_v_ + x, moved_v);
      add(pooled_ + x, all);
    }
  }

  /// The sums of a lane so far, as they are.
  sums so_far(isize lane) const noexcept {
    return {upper_[lane], lower_[lane], moved_[lane], moved_v_[lane], pooled_[lane]};
  }
  /// The sums of all lanes, to[kind][lane], which begin again at 0. One that reached the ceiling becomes infinite.
  void take(Acc* to) noexcept {
    for (isize x = 0; x < rows; x += W) {
      const P upper = P::load(upper_ + x), limit(over_ceiling), none(Acc(0));
      const P beyond = simd::select_greater(limit, upper, none, P(limits::infinity()));  // NaN: infinity as well
      (upper + beyond).store(to + x), P::load(lower_ + x).store(to + rows + x);
      (P::load(moved_ + x) + beyond).store(to + 2 * rows + x);
      (P::load(moved_v_ + x) + beyond).store(to + 3 * rows + x), P::load(pooled_ + x).store(to + 4 * rows + x);
      for (Acc* y : {upper_, lower_, moved_, moved_v_, pooled_}) none.store(y + x);
    }
  }
  /// Sums over `keys` pairs at most, values up to `value`, as bounds; `share_error`: relative error of the pooled weights.
  static sums bounds(const sums& x, isize keys, Acc value, Acc share_error) noexcept {
    const Acc slack = base_slack + static_cast<Acc>(keys + 64) * limits::epsilon();
    const Acc lost = static_cast<Acc>(keys) * floor_weight;  // weights that underflowed
    const Acc off = 2 * slack * (x.upper + x.pooled) + share_error * x.pooled + lost;
    const Acc less = 1 - 4 * slack;
    return {x.upper * (1 + slack) + lost, less > 0 ? x.lower * less : Acc(0), x.moved * (1 + slack) + off,
            x.moved_v * (1 + slack) + off * value, x.pooled};
  }

 private:
  static constexpr bool integers = tile::has_code_panel<Arch, Acc>;
  static constexpr std::uint64_t lane_mask = W >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << W) - 1;
  static constexpr Acc over_ceiling = static_cast<Acc>(0x1p99);  // 2^ceiling, well below
  static constexpr Acc two_ln2 = static_cast<Acc>(1.3862943611198908);
  static constexpr Acc tiny = limits::epsilon() * limits::epsilon();  // over any underflow of the products
  /// Of exp2 and of the rounding of its argument, at most 126 (1022) in size; and of a weight that came out as 0.
  static constexpr Acc base_slack = sizeof(Acc) == 4 ? static_cast<Acc>(0x1p-15) : static_cast<Acc>(0x1p-38);
  static constexpr Acc floor_weight = sizeof(Acc) == 4 ? static_cast<Acc>(0x1p-120) : static_cast<Acc>(0x1p-1000);

  static void add(Acc* to, P x) noexcept { (P::load(to) + x).store(to); }
  P weight(P x, isize lane) const noexcept {
    x = x - P::load(reference_ + lane);
    return simd::exp2(simd::min(P(ceiling), x));  // x second: NaN survives
  }

  /// s_[j - j0][lane] = q code . k code: an exact integer on the way through VNNI, within d eps of |q'||k'| else.
  void products(const block_summary<Acc>& s, isize j0, isize count, isize width) noexcept {
    if constexpr (integers)
      if (d_ <= 512) {
        std::int8_t* ones = code_ + d_ + 4;
        for (isize c = 0; c < d_; ++c) ones[c] = 1;
        return tile::code_panel(count, width, d_, s.code + j0 * d_, ones, panel_, s_, rows);
      }
    for (isize x = 0; x < count * d_; ++x) k_[x] = static_cast<Acc>(s.code[j0 * d_ + x]);
    tile::gemm<Arch, Acc>(count, width, d_, k_, d_, 1, code_q_, rows, s_, rows, false);
  }

  isize d_;
  Acc *q_, *code_q_, *k_, *s_, *share_;
  std::uint8_t* panel_;
  std::int8_t* code_;
  alignas(64) Acc factor_[rows], reference_[rows], by_size_[rows], by_residual_[rows];
  alignas(64) Acc upper_[rows], lower_[rows], moved_[rows], moved_v_[rows], pooled_[rows];
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
