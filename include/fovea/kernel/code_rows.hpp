// SPDX-License-Identifier: MIT
#pragma once
/// @file  The selection's pass for a few query rows, as in decoding: keys in the lanes, each row of codes read once for all of them.
///
/// Contract   code_pass.hpp's peak and mass, for d a multiple of a register of bytes; a key without a step makes its block's mass NaN.
/// Cost       a register of products a row, query and 64 elements, and one transposing reduction a register of keys.

#include <cmath>

#include <fovea/kernel/code_pass.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch>
class code_rows {
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  static constexpr isize W = word::size, chunk = 256;
  static constexpr bool is_signed = simd::has_dot4_signed<Arch>;

 public:
  static constexpr isize most = 4;

  static bool takes(isize d) noexcept { return d % (4 * W) == 0 && d <= detail::int8_most_width * 64; }

  /// q [rows][d] rounded, factor [rows] with their steps; peak, mass [past][ld] of row r at [J * ld + r]. f: scratch(d).
  static isize scratch(isize d) { return chunk * most + (most + 1) * d; }
  static void run(const block_summary<float>& s, const std::int8_t* q, const float* factor, isize rows, isize keys,
                  isize past, float* peak, float* mass, isize ld, float* f) noexcept {
    auto* own = reinterpret_cast<std::int8_t*>(f + chunk * most);  // as the products want them, and a row of ones
    for (isize c = 0; c < rows * s.d; ++c) own[c] = static_cast<std::int8_t>(is_signed ? q[c] : q[c] ^ -128);
    for (isize c = 0; c < s.d; ++c) own[rows * s.d + c] = 1;
    const isize last = past * s.block_k < keys ? past * s.block_k : keys;
    const isize step = s.block_k <= chunk ? chunk / s.block_k * s.block_k : s.block_k;
    for (isize j0 = 0; j0 < last; j0 += step) {
      const isize j1 = j0 + step < last ? j0 + step : last;
      for (isize a = j0; a < j1; a += chunk) {  // a block may be larger than a chunk
        const isize b = a + chunk < j1 ? a + chunk : j1;
        tile::with_constant<most>(rows, [&](auto r) { scores<r>(s, own, factor, a, b, f); });
        for (isize r = 0; r < rows; ++r)
          for (isize x = a, y = 0; x < b; x = y) {
            const isize J = x / s.block_k;
            y = (J + 1) * s.block_k < b ? (J + 1) * s.block_k : b;
            fold(f + r * chunk + x - a, y - x, peak + J * ld + r, mass + J * ld + r, x == J * s.block_k);
          }
      }
    }
  }

 private:
  /// f [row][chunk]: scores in log2 of keys [a, b).
  template <int R>
  FOVEA_NOINLINE static void scores(const block_summary<float>& s, const std::int8_t* q, const float* factor, isize a,
                                    isize b, float* f) noexcept {
    constexpr int sums = is_signed ? R : R + 1;
    const isize d = s.d;
    for (isize j = a; j < b; j += W) {
      word all[sums];
      const isize last = b - 1 - j;  // keys behind the end are replaced by the last one; nobody reads their scores
      const std::int8_t* k = s.code + j * d;
      tile::unroll<sums>([&](auto r) FOVEA_INLINE_LAMBDA {
        word acc[W];
        tile::unroll<static_cast<int>(W)>([&](auto l) FOVEA_INLINE_LAMBDA { acc[l] = word::splat(0); });
        for (isize c = 0; c < d; c += 4 * W) {
          const word x = word::load(q + r * d + c);
          tile::unroll<static_cast<int>(W)>([&](auto l) FOVEA_INLINE_LAMBDA {
            const word y = word::load(k + (l < last ? isize{l} : last) * d + c);
            acc[l] = is_signed ? simd::dot4_signed(acc[l], x, y) : simd::dot4(acc[l], x, y);
          });
        }
        all[r] = simd::sum_each(acc);
      });
      const P step = simd::load_n<P>(s.step + j, b - j);
      P correction(0.0F);
      if constexpr (!is_signed) correction = simd::to_float(all[R]) * P(128.0F);
      tile::unroll<R>([&](auto r) FOVEA_INLINE_LAMBDA {
        ((simd::to_float(all[r]) - correction) * (step * P(factor[r]))).store(f + r * chunk + j - a);
      });
    }
  }
  static void fold(const float* x, isize count, float* peak, float* mass, bool fresh) noexcept {
    P top(-std::numeric_limits<float>::infinity()), sum(0.0F);
    for (isize c = 0; c < count; c += W) {
      const auto live = static_cast<simd::lane_bits>(~std::uint64_t{0} >> (64 - (count - c < W ? count - c : W)));
      top = simd::max(top, simd::select(live, P::load(x + c), top));
    }
    float level = std::floor(simd::highest(top));
    if (!(level - level == 0)) level = 0;
    for (isize c = 0; c < count; c += W) {
      const auto live = static_cast<simd::lane_bits>(~std::uint64_t{0} >> (64 - (count - c < W ? count - c : W)));
      const P y = P::load(x + c);
      sum = sum + simd::select(live, simd::fma(y, P(0.0F), chord_of_bits<Arch>(y - P(level))), P(0.0F));
    }
    float all = simd::reduce_add(sum);
    if (!fresh) {
      const float both = *peak > level ? *peak : level;
      all = all * std::exp2(level - both) + *mass * std::exp2(*peak - both);
      level = both;
    }
    *peak = level, *mass = all;
  }
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
