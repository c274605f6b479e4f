// SPDX-License-Identifier: MIT
#pragma once
/// @file  2^x for x <= 0 and a little above, in registers: the only transcendental of the hot loops.
///
///   2^x = 2^n * poly(r),   n = round(x),   r = x - n in [-1/2, 1/2]
///
/// Contract   exact 0 for x <= -126 (double: -1022) and -inf; never a denormal; NaN stays NaN; valid up to x = 127 (1023).
/// Numerics   float: degree 5, exact at integers, 1.9 ulp (AVX-512: 2.1). double: degree 13 (Taylor), 1 ulp. Without fma (sse2): 2 and 1.2 ulp.
/// Source     minimax coefficients, float ones searched with c0 = 1; docs/numerics.md.

#include <fovea/simd/pack.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {
namespace detail {

template <class T>
struct exp2_constants;
template <>
struct exp2_constants<float> {
  using word = std::int32_t;
  static constexpr int mantissa = 23;
  static constexpr float least = -126.0F, magic = 12582912.0F + 126.0F;  // 1.5 * 2^23 + (bias - 1)
  static constexpr float c[] = {1.0F, 0.693146884F, 0.240222335F, 0.0555089265F, 0.00967202522F, 0.00132127956F};
};
template <>
struct exp2_constants<double> {
  using word = std::int64_t;
  static constexpr int mantissa = 52;
  static constexpr double least = -1022.0, magic = 6755399441055744.0 + 1022.0;
  static constexpr double c[] = {1.0,
                                 0.69314718055994530942,
                                 0.24022650695910071233,
                                 0.055504108664821579953,
                                 0.0096181291076284771619,
                                 0.0013333558146428443423,
                                 0.00015403530393381609954,
                                 1.5252733804059840280e-05,
                                 1.3215486790144309488e-06,
                                 1.0178086009239699728e-07,
                                 7.0549116208011233299e-09,
                                 4.4455382718708114976e-10,
                                 2.5678435993488205141e-11,
                                 1.3691488853904128881e-12};
};

/// 2^(n + r) from t = n + magic, whose low bits are n + bias - 1: shifted up they are the float 2^(n-1), and 0 for n = least.
template <class T, class A>
FOVEA_INLINE pack<T, A> exp2_parts(pack<T, A> t, pack<T, A> r) {
  using P = pack<T, A>;
  using K = exp2_constants<T>;
  constexpr int degree = static_cast<int>(sizeof(K::c) / sizeof(T)) - 1;
  P p(2 * K::c[degree]);
  for (int i = degree - 1; i >= 0; --i) p = fma(p, r, P(2 * K::c[i]));
  if constexpr (std::is_same_v<A, scalar>) {
    using U = std::make_unsigned_t<typename K::word>;
    return p * P(std::bit_cast<T>(static_cast<U>(std::bit_cast<U>(t.v) << K::mantissa)));
  } else {
    using words = xsimd::batch<typename K::word, typename xsimd_of<A>::type>;
    static_assert(sizeof(words) == sizeof(t.v));
    words w;
    std::memcpy(static_cast<void*>(&w), &t.v, sizeof w);
    w = w << K::mantissa;
    P scale;
    std::memcpy(static_cast<void*>(&scale.v), &w, sizeof w);
    return p * scale;
  }
}

/// Is there an instruction for p * 2^floor(n)?
template <class P>
inline constexpr bool has_scalef = false;
#if defined(FOVEA_HAS_AVX512)
template <>
inline constexpr bool has_scalef<pack<float, avx512>> = true;
#endif

/// up * 2^n and down * 2^-n (halved as above) from the same t.
template <class T, class A>
FOVEA_INLINE void scale_both(pack<T, A> t, pack<T, A> p, pack<T, A> q, pack<T, A>& up, pack<T, A>& down) {
  using K = exp2_constants<T>;
  constexpr auto twice = static_cast<typename K::word>(sizeof(T) == 4 ? 252 : 2044);  // 2 (bias - 1)
  if constexpr (std::is_same_v<A, scalar>) {
    using U = std::make_unsigned_t<typename K::word>;
    const U bits = static_cast<U>(std::bit_cast<U>(t.v) << K::mantissa);
    up = p * pack<T, A>(std::bit_cast<T>(bits));
    down = q * pack<T, A>(std::bit_cast<T>(static_cast<U>((static_cast<U>(twice) << K::mantissa) - bits)));
  } else {
    using words = xsimd::batch<typename K::word, typename xsimd_of<A>::type>;
    words w;
    std::memcpy(static_cast<void*>(&w), &t.v, sizeof w);
    w = w << K::mantissa;
    const words back = words(twice << K::mantissa) - w;
    pack<T, A> scale;
    std::memcpy(static_cast<void*>(&scale.v), &w, sizeof w);
    up = p * scale;
    std::memcpy(static_cast<void*>(&scale.v), &back, sizeof w);
    down = q * scale;
  }
}

#if defined(FOVEA_HAS_AVX512)
/// With AVX-512's own instructions: r = x - floor(x) in [0, 1], whose polynomial scalef multiplies by 2^floor(x).
struct exp2_floor {
  static constexpr float c[] = {1.0F, 0.693152189F, 0.240155488F, 0.0558279306F, 0.00898282137F, 0.00188144413F};
  static constexpr int floor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
};
FOVEA_INLINE pack<float, avx512> exp2_scalef(pack<float, avx512> x) {
  const __m512 y = x.v, r = _mm512_reduce_ps(y, exp2_floor::floor);
  __m512 p = _mm512_set1_ps(exp2_floor::c[5]);
  for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(exp2_floor::c[i]));
  const __mmask16 large = _mm512_cmp_ps_mask(y, _mm512_set1_ps(exp2_constants<float>::least), _CMP_NLE_UQ);  // NaN is
  return pack<float, avx512>(pack<float, avx512>::batch(_mm512_maskz_scalef_ps(large, p, y)));
}
/// e^x the same way, with the bits of the general form.
FOVEA_INLINE pack<float, avx512> exp_scalef(pack<float, avx512> x) {
  using K = exp2_constants<float>;
  const __m512 magic = _mm512_set1_ps(12582912.0F), log2e = _mm512_set1_ps(1.44269504F);
  const __m512 t = _mm512_fmadd_ps(x.v, log2e, magic), n = _mm512_sub_ps(t, magic), r = _mm512_fmsub_ps(x.v, log2e, n);
  __m512 p = _mm512_set1_ps(K::c[5]);
  for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(K::c[i]));
  const __mmask16 large = _mm512_cmp_ps_mask(n, _mm512_set1_ps(K::least), _CMP_NLE_UQ);  // NaN is
  return pack<float, avx512>(pack<float, avx512>::batch(_mm512_maskz_scalef_ps(large, p, n)));
}
/// e^x in (-87, -0], where bits read as integers grow with |x|; 0 below, 1 + x above.
FOVEA_INLINE pack<float, avx512> exp_floor_then_line(pack<float, avx512> x) {
  __m512 a = x.v;
#if defined(__GNUC__) || defined(__clang__)
  __asm__("" : "+v"(a));  // three uses: one load that misses the first-level cache, not three
#endif
  const __m512 y = _mm512_mul_ps(a, _mm512_set1_ps(1.44269504F)), r = _mm512_reduce_ps(y, exp2_floor::floor);
  __m512 p = _mm512_set1_ps(exp2_floor::c[5]);
  for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(exp2_floor::c[i]));
  const __m512i end = _mm512_castps_si512(_mm512_set1_ps(-87.0F));
  const __m512 line = _mm512_max_ps(_mm512_setzero_ps(), _mm512_add_ps(a, _mm512_set1_ps(1.0F)));  // NaN survives
  const __mmask16 falls = _mm512_cmplt_epi32_mask(_mm512_castps_si512(a), end);
  return pack<float, avx512>(pack<float, avx512>::batch(_mm512_mask_scalef_ps(line, falls, p, y)));
}
#endif

}  // namespace detail

template <class T, class A>
FOVEA_INLINE pack<T, A> exp2(pack<T, A> x) {
  using P = pack<T, A>;
  using K = detail::exp2_constants<T>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<P, pack<float, avx512>>) return detail::exp2_scalef(x);
#endif
  x = max(P(K::least), x);  // x second: NaN survives
  const P t = x + P(K::magic);
  return detail::exp2_parts(t, x - (t - P(K::magic)));
}

/// 2^(x - shift) for many x and one shift, which `shift_for` makes of their maximum: not below it, and less than 1 above.
template <class T, class A>
struct exp2_shifted {
  using P = pack<T, A>;
  static P shift_for(P most) { return most; }
  static bool near(P) { return true; }
  struct far_form {};
  P shift;
  explicit FOVEA_INLINE exp2_shifted(P s) : shift(s) {}
  FOVEA_INLINE P operator()(P x) const { return exp2(x - shift); }
};
#if defined(FOVEA_HAS_AVX512)
/// Shifts are whole numbers, so that x and x - shift have the same fraction: where 2^-shift is a float (`near`), it goes into the
/// coefficients, and nothing is left to subtract: 8 operations instead of 10. The far form gives the same bits.
template <>
struct exp2_shifted<float, avx512> {
  using P = pack<float, avx512>;
  static FOVEA_INLINE P shift_for(P most) {
    return P(P::batch(_mm512_roundscale_ps(most.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)));
  }
  static FOVEA_INLINE bool near(P s) {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(s.v), _mm512_set1_ps(100.0F), _CMP_NLE_UQ) == 0;
  }
  struct far_form {
    __m512 shift, least;
    explicit FOVEA_INLINE far_form(P s) : shift(s.v) {  // an infinite shift: least is NaN, and everything is greater
      least = _mm512_add_ps(_mm512_sub_ps(s.v, _mm512_set1_ps(126.0F)), _mm512_sub_ps(s.v, s.v));
    }
    FOVEA_INLINE P operator()(P x) const {
      const __m512 r = _mm512_reduce_ps(x.v, detail::exp2_floor::floor);
      __m512 p = _mm512_set1_ps(detail::exp2_floor::c[5]);
      for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(detail::exp2_floor::c[i]));
      const __m512 n = _mm512_sub_ps(_mm512_sub_ps(x.v, r), shift);
      return P(P::batch(_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, least, _CMP_NLE_UQ), p, n)));
    }
  };
  __m512 c[6], least;
  explicit FOVEA_INLINE exp2_shifted(P s) : least(_mm512_sub_ps(s.v, _mm512_set1_ps(126.0F))) {
    const __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), s.v);
    FOVEA_UNROLL
    for (int i = 0; i < 6; ++i) c[i] = _mm512_scalef_ps(_mm512_set1_ps(detail::exp2_floor::c[i]), minus);
  }
  FOVEA_INLINE P operator()(P x) const {
    const __m512 r = _mm512_reduce_ps(x.v, detail::exp2_floor::floor);
    __m512 p = c[5];
    FOVEA_UNROLL
    for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, r, c[i]);
    return P(P::batch(_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, least, _CMP_NLE_UQ), p, x.v)));
  }
};
#endif

/// e^x = 2^(x log2 e), the product in one rounding with n; for x in [-86.9, 88] (float), 0 below. Relative error up to |x| 2^-26.
template <class T, class A>
FOVEA_INLINE pack<T, A> exp(pack<T, A> x) {
  using P = pack<T, A>;
  using K = detail::exp2_constants<T>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<P, pack<float, avx512>>) return detail::exp_scalef(x);
#endif
  const P log2e(static_cast<T>(1.4426950408889634074));
  x = max(P(static_cast<T>(K::least * 0.69314718055994530942)), x);
  const P t = fma(x, log2e, P(K::magic));
  return detail::exp2_parts(t, fma(x, log2e, P(K::magic) - t));
}

/// e^x for x < 0, 1 + x from 0 on; relative error up to |x| 2^-24 below 0.
template <class T, class A>
FOVEA_INLINE pack<T, A> exp_then_line(pack<T, A> x) {
  using P = pack<T, A>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<P, pack<float, avx512>>) return detail::exp_floor_then_line(x);
#endif
  const P zero(T(0));
  return max(zero, x) + exp(min(zero, x));  // x second: NaN survives
}

/// 2^y and 2^-y for y = rate x, |y| <= 115: one reduction, and the even and odd parts of one polynomial. e^x: rate = log2 e.
template <class T, class A>
FOVEA_INLINE void exp2_pair(pack<T, A> x, pack<T, A> rate, pack<T, A>& up, pack<T, A>& down) {
  using P = pack<T, A>;
  using K = detail::exp2_constants<T>;
  constexpr bool scales = detail::has_scalef<P>;
  constexpr int degree = static_cast<int>(sizeof(K::c) / sizeof(T)) - 1;
  static_assert(degree % 2 == 1);
  constexpr T times(scales ? 1 : 2), magic = scales ? T(12582912) : K::magic;
  const P t = fma(x, rate, P(magic)), back = P(magic) - t, r = fma(x, rate, back), square = r * r;
  P odd(times * K::c[degree]), even(times * K::c[degree - 1]);
  for (int i = degree - 2; i > 0; i -= 2) {
    odd = fma(odd, square, P(times * K::c[i]));
    even = fma(even, square, P(times * K::c[i - 1]));
  }
  const P rises = fma(odd, r, even), falls = fnma(odd, r, even);
#if defined(FOVEA_HAS_AVX512)
  if constexpr (scales) {
    up = P(typename P::batch(_mm512_scalef_ps(rises.v, (t - P(magic)).v)));
    down = P(typename P::batch(_mm512_scalef_ps(falls.v, back.v)));
  } else
#endif
    detail::scale_both(t, rises, falls, up, down);
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
