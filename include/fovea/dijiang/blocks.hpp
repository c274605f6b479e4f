// SPDX-License-Identifier: MIT
#pragma once
/// @file  Scratch of one thread of DiJiang attention, and the row operations that move features in and out of the log domain.

#include <fovea/dijiang/state.hpp>
#include <fovea/kernel/linear_weights.hpp>
#include <fovea/simd/convert.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Arch, class Acc>
struct dijiang_scratch {
  static constexpr isize tokens = feature_rows;

  isize stride, q_head, e_stride;
  Acc *x, *map;                      // converted rows; the transforms' own
  Acc *k, *q;                        // [tokens][stride]; q [heads]
  Acc *v, *out;                      // [tokens][e_stride]; out [heads]
  Acc *decay, *gain, *zeros;         // [tokens]; gain and zeros [heads][tokens]
  Acc *factor, *sums, *x_gain;       // [heads][tokens] twice, [tokens]
  Acc *fade, *scale, *spare, *keep;  // [stride] three times, [tokens]
  Acc* state;                        // where the caller keeps none
  unsigned char* settles;            // [tokens]

  dijiang_scratch(arena& a, const dijiang_sizes& n, isize d) {
    stride = n.rows * static_cast<isize>(sizeof(Acc)) % 1024 == 0 ? n.rows + 16
                                                                  : n.rows;  // rows 1 KB apart would share cache sets
    q_head = feature_rows * stride, e_stride = n.panels * n.width;
    x = a.take<Acc>(feature_rows * d), map = a.take<Acc>(2 * feature_rows * d);
    k = a.take<Acc>(q_head), q = a.take<Acc>(n.R * q_head);
    v = a.take<Acc>(feature_rows * e_stride), out = a.take<Acc>(n.R * feature_rows * e_stride);
    decay = a.take<Acc>(tokens), gain = a.take<Acc>(n.R * tokens), zeros = a.take<Acc>(n.R * tokens);
    factor = a.take<Acc>(n.R * tokens), sums = a.take<Acc>(n.R * tokens), x_gain = a.take<Acc>(tokens);
    fade = a.take<Acc>(stride), scale = a.take<Acc>(stride), spare = a.take<Acc>(stride), keep = a.take<Acc>(tokens);
    state = a.take<Acc>(n.head_elements());
    settles = a.take<unsigned char>(tokens);
  }
  /// Kernels read whole vectors: zeros behind r and behind e.
  void clear(const dijiang_sizes& n) {
    for (isize t = 0; t < feature_rows; ++t) {
      for (isize f = n.r; f < stride; ++f) {
        k[t * stride + f] = Acc(0);
        for (isize h = 0; h < n.R; ++h) q[h * q_head + t * stride + f] = Acc(0);
      }
      for (isize c = n.e; c < e_stride; ++c) v[t * e_stride + c] = Acc(0);
    }
    for (isize t = 0; t < n.R * tokens; ++t) zeros[t] = Acc(0);
  }
};

/// The fade of what was written under reference c when an exponent x arrives; raises c where x is above it.
template <class Acc>
FOVEA_INLINE Acc raise_one(double x, Acc& c) {
  const Acc before = c;
  if (!(x > static_cast<double>(c))) return Acc(1);
  c = static_cast<Acc>(x + dijiang_margin);
  return static_cast<Acc>(std::exp(static_cast<double>(before) - static_cast<double>(c)));
}

/// Is any exponent of the row above its reference? A NaN is not.
template <class Arch, class Acc>
FOVEA_INLINE bool above(const Acc* log_phi, isize r, const Acc* c) {
  using P = simd::pack<Acc, Arch>;
  P excess(Acc(-1));
  for (isize f = 0; f < r; f += P::size)
    excess = simd::max(simd::load_n<P>(log_phi + f, r - f) - simd::load_n<P>(c + f, r - f), excess);
  return simd::reduce_max(excess) > Acc(0);
}

/// out = e^(log_phi - c), <= 1
template <class Arch, class Acc>
FOVEA_INLINE void key_row(const Acc* log_phi, const Acc* c, isize r, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  for (isize f = 0; f < r; f += P::size)
    simd::store_n(out + f, simd::exp(simd::load_n<P>(log_phi + f, r - f) - simd::load_n<P>(c + f, r - f)), r - f);
}

/// out = e^(log_phi + c - top), <= 1; returns top, the largest of log_phi + c.
template <class Arch, class Acc>
FOVEA_INLINE Acc query_row(const Acc* log_phi, const Acc* c, isize r, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  for (isize f = 0; f < r; f += P::size)
    simd::store_n(out + f, simd::load_n<P>(log_phi + f, r - f) + simd::load_n<P>(c + f, r - f), r - f);
  const Acc top = std::max(feature::row_max<Arch, Acc>(out, r),
                           static_cast<Acc>(4 * dijiang_never));  // finite where nothing is visible
  feature::row_exp<Arch, Acc>(out, r, Acc(1), top, out);
  return top;
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
