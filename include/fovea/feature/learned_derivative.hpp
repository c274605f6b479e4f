// SPDX-License-Identifier: MIT
#pragma once
/// @file  Derivatives of the learned feature maps: by the row, and by the weights of one head. Included by feature/learned.hpp.
///
///   y = s W x + b:   dx = s W^T dy,   dW += s dy x^T,   db += dy
///
/// Contract   the slope of ReLU at 0 is 0; where several elements share a row's maximum, the first has its whole derivative.

#include <fovea/feature/learned.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace feature {

/// The formulas above for a block of rows; dy is multiplied by `scale` on the way. `matrix` holds rows x width elements.
template <class Arch, class Acc>
FOVEA_NOINLINE void derive_projection(const projection_ref& w, isize head, isize count, const Acc* x, isize x_stride,
                                      Acc scale, Acc* dy, isize dy_stride, Acc* dx, isize dx_stride, Acc* dweights,
                                      Acc* matrix) noexcept {
  const isize r = w.rows(), d = w.width();
  if (dweights != nullptr && w.table->has_bias) {
    Acc* db = dweights + r * d;
    for (isize t = 0; t < count; ++t)
      for (isize j = 0; j < r; ++j) db[j] += dy[t * dy_stride + j];
  }
  for (isize t = 0; t < count && scale != Acc(1); ++t)
    for (isize j = 0; j < r; ++j) dy[t * dy_stride + j] *= scale;
  if (dweights != nullptr) tile::gemm<Arch, Acc>(r, d, count, dy, 1, dy_stride, x, x_stride, dweights, d, true);
  if (dx == nullptr) return;
  const Acc* stored = w.table->template weights<Acc>(w.pick(head));  // [d][r]
  for (isize j = 0; j < r; ++j)
    for (isize c = 0; c < d; ++c) matrix[j * d + c] = stored[c * r + j];
  tile::gemm<Arch, Acc>(count, d, r, dy, dy_stride, 1, matrix, d, dx, dx_stride, false);
}

/// dy = 0 where the feature is: the derivative of ReLU.
template <class Acc>
FOVEA_INLINE void derive_relu(const Acc* phi, isize r, Acc* dy) {
  for (isize j = 0; j < r; ++j) dy[j] = phi[j] > Acc(0) ? dy[j] : Acc(0);
}

}  // namespace feature

template <class Arch, class Acc>
void t2r::derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept {
  const projection_ref& w = b.key ? key : query;
  for (isize t = 0; t < b.rows; ++t)
    feature::derive_relu(b.out + t * b.out_stride, w.rows(), g.dphi + t * g.dphi_stride);
  feature::derive_projection<Arch, Acc>(w, detail::pair_head(query, key, b), b.rows, b.x, b.x_stride,
                                        b.key ? Acc(1) : static_cast<Acc>(query_scale), g.dphi, g.dphi_stride, g.dx,
                                        g.dx_stride, g.dweights, scratch);
}

template <class Arch, class Acc>
void mlp_map::derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept {
  const projection_ref& one = b.key ? key_hidden : query_hidden;
  const projection_ref& two = b.key ? key_out : query_out;
  const isize first = detail::pair_head(query_hidden, key_hidden, b), second = detail::pair_head(query_out, key_out, b),
              h = one.rows();
  Acc *hidden = scratch, *dhidden = hidden + feature_rows * h, *matrix = dhidden + feature_rows * h;
  const Acc scale = b.key ? Acc(1) : static_cast<Acc>(query_scale);
  one.template apply<Arch, Acc>(first, b.x, b.x_stride, b.rows, hidden, h);
  for (isize t = 0; t < b.rows; ++t) {
    feature::row_relu<Arch, Acc>(hidden + t * h, one.template bias<Acc>(first), h, scale, hidden + t * h);
    feature::derive_relu(b.out + t * b.out_stride, two.rows(), g.dphi + t * g.dphi_stride);
  }
  Acc* tail = g.dweights == nullptr ? nullptr : g.dweights + h * (one.width() + 1);
  feature::derive_projection<Arch, Acc>(two, second, b.rows, hidden, h, Acc(1), g.dphi, g.dphi_stride, dhidden, h, tail,
                                        matrix);
  for (isize t = 0; t < b.rows; ++t) feature::derive_relu(hidden + t * h, h, dhidden + t * h);
  feature::derive_projection<Arch, Acc>(one, first, b.rows, b.x, b.x_stride, scale, dhidden, h, g.dx, g.dx_stride,
                                        g.dweights, matrix);
}

namespace feature {

/// From the gradient by the features of a Hedgehog row to that by y, in place: the first r elements of `g`.
template <class Arch, class Acc>
FOVEA_INLINE void derive_softmax_pair(const Acc* phi, isize r, hedgehog_form form, Acc* g) {
  using P = simd::pack<Acc, Arch>;
  P up(Acc(0)), down(Acc(0));
  for (isize j = 0; j < r; j += P::size) {
    up = simd::fma(simd::load_n<P>(phi + j, r - j), simd::load_n<P>(g + j, r - j), up);
    down = simd::fma(simd::load_n<P>(phi + r + j, r - j), simd::load_n<P>(g + r + j, r - j), down);
  }
  Acc mean_up = simd::reduce_add(up), mean_down = simd::reduce_add(down);
  const Acc sum_up = mean_up, sum_down = mean_down;
  if (form == hedgehog_form::joint) mean_up = mean_down = sum_up + sum_down;
  if (form == hedgehog_form::paired) mean_up = mean_down = Acc(0);
  const P a(mean_up), b(mean_down), twice(form == hedgehog_form::joint ? Acc(2) : Acc(1));
  for (isize j = 0; j < r; j += P::size) {
    const P rise = simd::load_n<P>(phi + j, r - j) * (simd::load_n<P>(g + j, r - j) - a),
            fall = simd::load_n<P>(phi + r + j, r - j) * (simd::load_n<P>(g + r + j, r - j) - b);
    simd::store_n(g + j, twice * (rise - fall), r - j);
  }
  if (form != hedgehog_form::paired) return;
  isize top = 0, low = 0;
  for (isize j = r - 1; j >= 0; --j) top = phi[j] == Acc(1) ? j : top, low = phi[r + j] == Acc(1) ? j : low;
  g[top] -= sum_up, g[low] += sum_down;
}

}  // namespace feature

template <class Arch, class Acc>
void hedgehog::derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept {
  const projection_ref& w = b.key ? key : query;
  const isize r = w ? w.rows() : b.width;
  for (isize t = 0; t < b.rows; ++t) {
    Acc* dy = g.dphi + t * g.dphi_stride;
    feature::derive_softmax_pair<Arch, Acc>(b.out + t * b.out_stride, r, form, dy);
    for (isize c = 0; c < r && !w && g.dx != nullptr; ++c) g.dx[t * g.dx_stride + c] = dy[c];
  }
  if (w)
    feature::derive_projection<Arch, Acc>(w, detail::pair_head(query, key, b), b.rows, b.x, b.x_stride, Acc(1), g.dphi,
                                          g.dphi_stride, g.dx, g.dx_stride, g.dweights, scratch);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
