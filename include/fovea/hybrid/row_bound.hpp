// SPDX-License-Identifier: MIT
#pragma once
/// @file  The bound of one row's error, from sums over the keys that it leaves out: the last step of the certificate.
///
///   |o* - o| <= sum over skipped keys j of |w_j - t_j| (|v_j| + |o|) / (a + sum w_j) + R        a: weight of the computed keys
///
/// w_j is the true weight of key j, t_j what a pooled token gives to it, R the rounding of the computed output itself. Derived in docs/mechanisms/hybrid.md.
///
/// Contract   sums of kernel/mass_bounds.hpp, relative to e^reference; everything else from above. Always at most the hull |o| + max |v_j|.

#include <cmath>
#include <limits>

#include <fovea/kernel/block_choose.hpp>
#include <fovea/kernel/mass_bounds.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// What is known of a row.
template <class Acc>
struct row_facts {
  isize seen = 0, terms = 0;   ///< keys that it may see; terms of its sums
  Acc key = 0, value = 0;      ///< the largest |k_j| and |v_j| among those keys
  Acc length = 0, size = 0;    ///< |q|, |o|
  Acc lse = 0, reference = 0;  ///< of the computed keys, nats; what the sums are relative to
};

/// The largest |k| and |v| of keys; NaN or infinity stays.
template <class Acc>
struct largest_sizes {
  Acc key = 0, value = 0;
  void extend(const kernel::block_summary<Acc>& of, isize first, isize end) {
    using P = simd::pack<Acc, simd::native>;
    P k(Acc(0)), v = k, odd = k;
    for (isize j = first; j < end; j += P::size) {
      const isize left = end - j;
      const P size = simd::load_n<P>(of.size + j, left) + simd::load_n<P>(of.residual + j, left);
      const P norm = simd::load_n<P>(of.norm_v + j, left);
      k = simd::max(k, size), v = simd::max(v, norm);
      odd = simd::fma(size, P(Acc(0)), simd::fma(norm, P(Acc(0)), odd));
    }
    const Acc wrong = simd::reduce_add(odd);  // 0, or NaN
    key = larger(key, simd::highest(k) + wrong), value = larger(value, simd::highest(v) + wrong);
  }
  static Acc larger(Acc x, Acc y) { return y > x || y != y || x != x ? (x != x ? x : y) : x; }
};

/// Is key j of `tokens` a kept one?
template <class Acc>
bool is_kept(const kernel::block_summary<Acc>& of, isize tokens, isize j) {
  return of.keeps(j, tokens);
}

/// `sums_of`: additions that made the sums. d: width of a key.
template <class Acc>
Acc row_bound(const kernel::block_rule& rule, isize d, const row_facts<Acc>& of,
              const typename kernel::mass_bounds<simd::native, Acc>::sums& sum, isize sums_of) {
  using limits = std::numeric_limits<Acc>;
  constexpr Acc eps = limits::epsilon();
  constexpr Acc exp_error = sizeof(Acc) == 4 ? static_cast<Acc>(0x1p-20) : static_cast<Acc>(0x1p-46);
  if (of.seen == 0) return 0;
  for (const Acc x : {of.key, of.value, of.length, of.size})
    if (!(x < limits::infinity())) return limits::infinity();
  // delta: error of a logit and of its exponential; whole: of a sum of so many terms, relative to the sum of their sizes
  const Acc delta = (static_cast<Acc>(d) / 2 + 8) * eps * static_cast<Acc>(rule.scale) * of.length * of.key + exp_error;
  const Acc whole = (static_cast<Acc>(of.terms) * Acc(0.625) + static_cast<Acc>(rule.block_k) + 64) * eps;
  const Acc rounding =
      (of.value + of.size) * (std::expm1(delta) * std::exp(delta) + whole) * (1 + 16 * eps + 4 * whole);
  const Acc hull = (of.size + of.value) * (1 + 4 * eps);  // o* is a mean of values
  const auto x = kernel::mass_bounds<simd::native, Acc>::bounds(sum, sums_of, of.value, 2 * std::expm1(delta));
  // The weight of the computed keys against the reference: at most e^60, a lower bound all the same.
  const Acc grown = of.lse - of.reference < Acc(60) ? of.lse - of.reference : Acc(60);
  const Acc doubt = delta + whole + 4 * eps * (std::abs(of.lse) + std::abs(of.reference));
  const Acc least = std::exp(grown - doubt) * (1 - 16 * eps) + x.lower;
  const Acc skipped = (x.moved_v + (of.size + rounding) * x.moved) / least * (1 + 16 * eps);
  const Acc all = skipped + rounding;
  return of.lse > -limits::infinity() && all < hull ? all * (1 + 4 * eps) : hull;
}

/// As a number of `type`, not below x.
template <class Acc>
double upward(Acc x, dtype type) {
  return type == dtype::f64 || std::isinf(x) ? static_cast<double>(x)
                                             : static_cast<double>(std::nextafter(static_cast<float>(x), HUGE_VALF));
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
