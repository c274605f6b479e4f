// SPDX-License-Identifier: MIT
#pragma once
/// @file  a_i, the logarithm of what the rest of a row is multiplied by: a number a head, a product with q, the largest score of the window.

#include <limits>

#include <fovea/simd/convert.hpp>
#include <fovea/simd/reduce.hpp>
#include <fovea/windowed/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
class windowed_level {
  using Arch = simd::native;
  using P = simd::pack<Acc, Arch>;

 public:
  static isize scratch(isize d) { return 3 * d; }

  windowed_level(const windowed_attention& m, const shape& s)
      : m_(m), d_(s.d), group_(s.group()), scale_(static_cast<Acc>(m.exact().scale_for(s))) {}

  /// Of row x of q, whose own key is row `last` of k; `top`: the key with the largest score, if the level depends on it;
  /// `before`: query heads of the weights before head 0 of q.
  Acc of(const tensor_ref& q, const tensor_ref& k, isize b, isize h, isize x, isize last, Acc* scratch,
         isize* top = nullptr, isize before = 0) const {
    const Acc* row = simd::row_as<Arch, Acc>(q.type, q.row(b, h, x), d_, scratch);
    Acc a = m_.log_weight.data != nullptr ? static_cast<Acc>(*m_.log_weight.row(0, before + h, 0)) : Acc(0);
    if (m_.query_gate.data != nullptr) a += dot(row, gate(before + h, scratch + d_));
    if (m_.level == rest_level::absolute) return a;
    Acc most = -std::numeric_limits<Acc>::infinity();
    for (isize j = last < m_.window ? 0 : last - m_.window + 1; j <= last; ++j) {
      const Acc s = dot(row, simd::row_as<Arch, Acc>(k.type, k.row(b, h / group_, j), d_, scratch + 2 * d_));
      if (s <= most) continue;  // a NaN becomes the maximum and stays it
      most = s;
      if (top != nullptr) *top = j;
      if (s != s) break;
    }
    return a + scale_ * most;
  }
  /// query_gate of a head as Acc, [d].
  const Acc* gate(isize h, Acc* to) const {
    const float* w = m_.query_gate.row(0, h, 0);
    for (isize c = 0; c < d_; ++c) to[c] = static_cast<Acc>(w[c]);
    return to;
  }
  Acc scale() const { return scale_; }

 private:
  Acc dot(const Acc* x, const Acc* y) const {
    P sum(Acc(0));
    for (isize c = 0; c < d_; c += P::size)
      sum = simd::fma(simd::load_n<P>(x + c, d_ - c), simd::load_n<P>(y + c, d_ - c), sum);
    return simd::reduce_add(sum);
  }

  const windowed_attention& m_;
  isize d_, group_;
  Acc scale_;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
