// SPDX-License-Identifier: MIT
#pragma once
/// @file  Rows of stored elements to and from the accumulator type, with the hardware's conversions where they exist.
///
/// Contract   any length, no alignment, nothing behind the row is touched. f32 -> bf16 and f16 round to nearest even.

#include <fovea/core/rows.hpp>
#include <fovea/simd/pack.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {
namespace detail {

template <class Arch>
FOVEA_INLINE isize widen(const f16* p, isize n, float* out) {  // returns how many were done
  isize i = 0;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<Arch, avx512>)
    for (; i + 16 <= n; i += 16)
      _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i))));
#endif
#if defined(__F16C__)
  if constexpr (std::is_same_v<Arch, avx512> || std::is_same_v<Arch, avx2>)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
#endif
  (void)p, (void)n, (void)out;
  return i;
}
template <class Arch>
FOVEA_INLINE isize widen(const bf16* p, isize n, float* out) {
  isize i = 0;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<Arch, avx512>)
    for (; i + 16 <= n; i += 16) {
      const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)));
      _mm512_storeu_ps(out + i, _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)));
    }
#endif
  (void)p, (void)n, (void)out;  // elsewhere a plain loop of shifts, which compilers vectorise
  return i;
}
template <class Arch>
FOVEA_INLINE isize narrow(const float* p, isize n, f16* out) {
  isize i = 0;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<Arch, avx512>)
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm512_cvtps_ph(_mm512_loadu_ps(p + i), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  if constexpr (std::is_same_v<Arch, avx512> || std::is_same_v<Arch, avx2>)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(p + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  (void)p, (void)n, (void)out;
  return i;
}
template <class Arch>
FOVEA_INLINE isize narrow(const float*, isize, bf16*) {
  return 0;
}

template <class Arch, class From, class To>
FOVEA_INLINE void copy_row(const From* p, isize n, To* out) {
  isize i = 0;
  if constexpr (std::is_same_v<From, To>) {  // in whole registers: what reads them next finds each in one store
    using P = pack<To, Arch>;
    for (; i + P::size <= n; i += P::size) P::load(p + i).store(out + i);
  }
  if constexpr (sizeof(From) == 2 && std::is_same_v<To, float>) i = widen<Arch>(p, n, out);
  if constexpr (sizeof(To) == 2 && std::is_same_v<From, float>) i = narrow<Arch>(p, n, out);
  p += i, out += i;
  for (const From* const end = p + (n - i); p != end;
       ++p, ++out) {  // by pointer: g++ 12 warns of an index past PTRDIFF_MAX
    if constexpr (sizeof(From) == 2 && sizeof(To) == 8)
      *out = static_cast<To>(static_cast<float>(*p));
    else if constexpr (sizeof(To) == 2)
      *out = To(static_cast<float>(*p));
    else
      *out = static_cast<To>(*p);
  }
}
}  // namespace detail

/// n stored elements -> Acc.
template <class Arch, class Acc>
FOVEA_NOINLINE void load_row(dtype type, const void* p, isize n, Acc* out) {
  switch (type) {
    case dtype::f32: return detail::copy_row<Arch>(static_cast<const float*>(p), n, out);
    case dtype::f64: return detail::copy_row<Arch>(static_cast<const double*>(p), n, out);
    case dtype::bf16: return detail::copy_row<Arch>(static_cast<const bf16*>(p), n, out);
    case dtype::f16: return detail::copy_row<Arch>(static_cast<const f16*>(p), n, out);
    case dtype::i8: return;  // has scales: load_scaled_row
  }
}
/// n int8 elements, times one scale or times one for each `scale_group` of them -> Acc.
template <class Arch, class Acc>
FOVEA_NOINLINE void load_scaled_row(const void* p, const float* scales, isize scale_count, isize n, Acc* out) {
  const auto* x = static_cast<const std::int8_t*>(p);
  const isize run = scale_count == 1 ? n : scale_group;
  for (isize first = 0; first < n; first += run, ++scales) {
    const isize last = first + run < n ? first + run : n;
    const Acc scale = static_cast<Acc>(*scales);
    for (isize c = first; c < last; ++c) out[c] = static_cast<Acc>(x[c]) * scale;
  }
}
/// Row j of a packed int8 source -> Acc.
template <class Arch, class Acc>
FOVEA_NOINLINE void load_packed_row(const row_source& from, isize j, isize n, Acc* out) {
  constexpr isize most = 256;
  std::int8_t codes[most];
  const slot_place p = from.place(j);
  const isize element = from.form == row_form::packed_keys ? 16 : 4;  // bytes from one to the next, on average
  for (isize c = 0; c < n; c += most) {
    const isize count = n - c < most ? n - c : most;
    load_codes(from.form, p.data + c * element, from.row_bytes, p.slot, count, codes);
    load_scaled_row<Arch, Acc>(codes, p.scales + p.slot, 1, count, out + c);
  }
}
/// n elements of Acc -> storage.
template <class Arch, class Acc>
FOVEA_NOINLINE void store_row(dtype type, const Acc* p, isize n, void* out) {
  switch (type) {
    case dtype::f32: return detail::copy_row<Arch>(p, n, static_cast<float*>(out));
    case dtype::f64: return detail::copy_row<Arch>(p, n, static_cast<double*>(out));
    case dtype::bf16: return detail::copy_row<Arch>(p, n, static_cast<bf16*>(out));
    case dtype::f16: return detail::copy_row<Arch>(p, n, static_cast<f16*>(out));
    case dtype::i8: return;  // stores write those: cache/
  }
}

/// The first `count` of W stored elements as a register of the accumulator type, the rest 0.
template <class P, class S>
FOVEA_INLINE P load_as_n(const S* p, isize count) {
  using T = typename P::value_type;
  if constexpr (std::is_same_v<S, T>) {
    return load_n<P>(p, count);
  } else {
    T lanes[P::size] = {};
    for (isize l = 0; l < count && l < P::size; ++l) lanes[l] = static_cast<T>(static_cast<float>(p[l]));
    return P::load(lanes);
  }
}
/// W stored elements as a register of the accumulator type.
template <class P, class S>
FOVEA_INLINE P load_as(const S* p) {
  if constexpr (std::is_same_v<S, typename P::value_type>) return P::load(p);
#if defined(FOVEA_HAS_AVX512)
  else if constexpr (std::is_same_v<P, pack<float, avx512>> && std::is_same_v<S, std::int8_t>) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return P(typename P::batch(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))));
  } else if constexpr (std::is_same_v<P, pack<float, avx512>>) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (std::is_same_v<S, f16>)
      return P(typename P::batch(_mm512_cvtph_ps(h)));
    else
      return P(typename P::batch(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))));
  }
#endif
#if defined(FOVEA_HAS_AVX2) && defined(__F16C__)
  else if constexpr (std::is_same_v<P, pack<float, avx2>> && std::is_same_v<S, std::int8_t>) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return P(typename P::batch(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))));
  } else if constexpr (std::is_same_v<P, pack<float, avx2>>) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (std::is_same_v<S, f16>)
      return P(typename P::batch(_mm256_cvtph_ps(h)));
    else
      return P(typename P::batch(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))));
  }
#endif
  else
    return load_as_n<P>(p, P::size);
}

/// Row i of a view as Acc: the view's own memory if it is stored so, else converted into `scratch` [width].
template <class Arch, class Acc>
FOVEA_INLINE const Acc* row_as(dtype type, const void* p, isize width, Acc* scratch) {
  if (type == dtype_of<Acc>) return static_cast<const Acc*>(p);
  load_row<Arch, Acc>(type, p, width, scratch);
  return scratch;
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
