// SPDX-License-Identifier: MIT
#pragma once
/// @file  Learned feature maps: T2R, the two-layer MLP, Hedgehog.
///
///   t2r            phi(x) = ReLU(s W x + b)                                         r = rows of W
///   mlp_map        phi(x) = ReLU(W2 ReLU(s W1 x + b1) + b2)                         r = rows of W2
///   hedgehog       y = W x + b:   joint      softmax([2 y; -2 y])                   r = 2 rows of W
///                                 separate   [softmax(y); softmax(-y)]
///                                 paired     [e^(y - max y); e^(min y - y)]
///
/// Contract   weights by head as in feature/projection.hpp. T2R's s multiplies queries only (d^-1/2 in the paper's code) and is 1
///            for keys. Features are >= 0; T2R's may all be 0, so its denominator needs a clamp (0.01 in the paper's code).
/// Numerics   each softmax subtracts its own row maximum. No clamp of features at 1e-12, as some implementations have.
/// Source     T2R: Kasai et al., Finetuning Pretrained Transformers into RNNs, arXiv 2103.13076. Hedgehog: the forms of the
///            flash-linear-attention (joint) and LoLCATs (separate) repositories. docs/mechanisms/feature_maps.md.

#include <algorithm>

#include <fovea/feature/projection.hpp>
#include <fovea/feature/rows.hpp>
#include <fovea/simd/reduce.hpp>
#include <fovea/tile/unroll.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct t2r {
  projection_ref query, key;
  double query_scale = 1.0;

  static constexpr bool log_scaled = false;
  isize features(isize) const { return key.rows(); }
  isize scratch(isize) const { return 0; }
  double macs(isize) const { return key.macs(); }
  bool trained() const { return query.trained() && key.trained(); }
  isize derive_scratch(isize d) const { return key.rows() * d; }
  isize weights(isize d) const { return key.rows() * (d + 1); }  // W [r][d], b [r]
  void check(const shape& s) const {
    detail::check_pair("t2r", query, key, s);
    require(std::isfinite(query_scale) && query_scale > 0, "t2r query_scale is ", query_scale, "; it must be positive");
  }
  void fingerprint(detail::fingerprint& f) const { f.text("t2r").number(static_cast<double>(key.rows())); }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    const projection_ref& w = b.key ? key : query;
    const isize head = detail::pair_head(query, key, b), r = w.rows();
    w.template apply<Arch, Acc>(head, b.x, b.x_stride, b.rows, b.out, b.out_stride);
    const Acc scale = b.key ? Acc(1) : static_cast<Acc>(query_scale);
    for (isize t = 0; t < b.rows; ++t)
      feature::row_relu<Arch, Acc>(b.out + t * b.out_stride, w.template bias<Acc>(head), r, scale,
                                   b.out + t * b.out_stride);
  }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept;
  double define(const feature_site& at, const double* x, isize, double* out) const {
    const projection_ref& w = at.key ? key : query;
    w.define(detail::pair_head(query, key, at), x, at.key ? 1.0 : query_scale, out);
    for (isize j = 0; j < w.rows(); ++j) out[j] = out[j] > 0 ? out[j] : 0.0;
    return 0.0;
  }
};

struct mlp_map {
  projection_ref query_hidden, query_out, key_hidden, key_out;
  double query_scale = 1.0;

  static constexpr bool log_scaled = false;
  isize features(isize) const { return key_out.rows(); }
  isize scratch(isize) const {
    return feature_rows * (key_hidden.rows() > query_hidden.rows() ? key_hidden.rows() : query_hidden.rows());
  }
  double macs(isize) const { return key_hidden.macs() + key_out.macs(); }
  isize derive_scratch(isize d) const {
    const isize h = key_hidden.rows() > query_hidden.rows() ? key_hidden.rows() : query_hidden.rows();
    return 2 * feature_rows * h + h * (d > key_out.rows() ? d : key_out.rows());
  }
  /// W1 [h][d], b1 [h], W2 [r][h], b2 [r]. Both sides have one hidden width where weights are learned.
  isize weights(isize d) const { return key_hidden.rows() * (d + 1) + key_out.rows() * (key_hidden.rows() + 1); }
  bool trained() const {
    return query_hidden.trained() && query_out.trained() && key_hidden.trained() && key_out.trained();
  }
  void check(const shape& s) const {
    detail::check_pair("mlp_map: the hidden layer", query_hidden, key_hidden, s);
    shape inner = s;
    inner.d = key_hidden.rows();
    detail::check_pair("mlp_map: the output layer", query_out, key_out, inner);
    require(std::isfinite(query_scale) && query_scale > 0, "mlp_map query_scale is ", query_scale,
            "; it must be positive");
  }
  void fingerprint(detail::fingerprint& f) const { f.text("mlp").number(static_cast<double>(key_out.rows())); }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc* hidden) const noexcept {
    const projection_ref& one = b.key ? key_hidden : query_hidden;
    const projection_ref& two = b.key ? key_out : query_out;
    const isize first = detail::pair_head(query_hidden, key_hidden, b),
                second = detail::pair_head(query_out, key_out, b), h = one.rows();
    one.template apply<Arch, Acc>(first, b.x, b.x_stride, b.rows, hidden, h);
    const Acc scale = b.key ? Acc(1) : static_cast<Acc>(query_scale);
    for (isize t = 0; t < b.rows; ++t)
      feature::row_relu<Arch, Acc>(hidden + t * h, one.template bias<Acc>(first), h, scale, hidden + t * h);
    two.template apply<Arch, Acc>(second, hidden, h, b.rows, b.out, b.out_stride);
    for (isize t = 0; t < b.rows; ++t)
      feature::row_relu<Arch, Acc>(b.out + t * b.out_stride, two.template bias<Acc>(second), two.rows(), Acc(1),
                                   b.out + t * b.out_stride);
  }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept;
  double define(const feature_site& at, const double* x, isize, double* out) const {
    const projection_ref& one = at.key ? key_hidden : query_hidden;
    const projection_ref& two = at.key ? key_out : query_out;
    std::vector<double> hidden(static_cast<std::size_t>(one.rows()));
    one.define(detail::pair_head(query_hidden, key_hidden, at), x, at.key ? 1.0 : query_scale, hidden.data());
    for (auto& y : hidden) y = y > 0 ? y : 0.0;
    two.define(detail::pair_head(query_out, key_out, at), hidden.data(), 1.0, out);
    for (isize j = 0; j < two.rows(); ++j) out[j] = out[j] > 0 ? out[j] : 0.0;
    return 0.0;
  }
};

enum class hedgehog_form : unsigned char { joint, separate, paired };

struct hedgehog {
  projection_ref query, key;  ///< null: the identity, the untrained start
  hedgehog_form form = hedgehog_form::joint;

  static constexpr bool log_scaled = false;
  isize features(isize d) const { return 2 * (key ? key.rows() : d); }
  isize scratch(isize) const { return 0; }
  double macs(isize) const { return key ? key.macs() : 0.0; }
  isize derive_scratch(isize d) const { return key ? key.rows() * d : 0; }
  isize weights(isize d) const { return key ? key.rows() * (d + 1) : 0; }  // W [r / 2][d], b [r / 2]
  bool trained() const { return query && key && query.trained() && key.trained(); }
  void check(const shape& s) const {
    require(static_cast<bool>(query) == static_cast<bool>(key),
            "hedgehog has weights on one side only; give both, or neither");
    if (key) detail::check_pair("hedgehog", query, key, s);
  }
  void fingerprint(detail::fingerprint& f) const {
    f.text("hedgehog").number(static_cast<double>(form)).number(key ? static_cast<double>(key.rows()) : 0.0);
  }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    const projection_ref& w = b.key ? key : query;
    const isize head = detail::pair_head(query, key, b), r = w ? w.rows() : b.width;
    if (w) w.template apply<Arch, Acc>(head, b.x, b.x_stride, b.rows, b.out, b.out_stride);
    const Acc* bias = w ? w.template bias<Acc>(head) : nullptr;
    for (isize t = 0; t < b.rows && bias != nullptr; ++t)
      feature::row_affine<Arch, Acc>(b.out + t * b.out_stride, bias, r, Acc(1), b.out + t * b.out_stride);
    constexpr isize W = simd::pack<Acc, Arch>::size;
    for (isize t = 0; t < b.rows; t += W)
      pair<Arch, Acc>(w ? b.out + t * b.out_stride : b.x + t * b.x_stride, w ? b.out_stride : b.x_stride,
                      std::min(W, b.rows - t), r, b.out + t * b.out_stride, b.out_stride);
  }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept;
  double define(const feature_site& at, const double* x, isize d, double* out) const {
    const projection_ref& w = at.key ? key : query;
    const isize r = w ? w.rows() : d;
    std::vector<double> y(static_cast<std::size_t>(r));
    if (w)
      w.define(detail::pair_head(query, key, at), x, 1.0, y.data());
    else
      y.assign(x, x + d);
    const double scale = form == hedgehog_form::joint ? 2.0 : 1.0;
    double top = y[0], low = y[0], up = 0, down = 0;
    for (const double a : y) top = std::fmax(top, a), low = std::fmin(low, a);
    if (form == hedgehog_form::joint) top = std::fmax(top, -low), low = -top;
    for (isize j = 0; j < r; ++j) {
      up += out[j] = std::exp(scale * (y[static_cast<std::size_t>(j)] - top));
      down += out[r + j] = std::exp(scale * (low - y[static_cast<std::size_t>(j)]));
    }
    if (form == hedgehog_form::paired) return 0.0;
    if (form == hedgehog_form::joint) up = down = up + down;
    for (isize j = 0; j < r; ++j) out[j] /= up, out[r + j] /= down;
    return 0.0;
  }

 private:
  /// A row of ordinary numbers: e^y and e^-y share their work, nothing is subtracted before.
  template <class Arch, class Acc>
  FOVEA_INLINE static void pair_row(const Acc* from, isize r, simd::pack<Acc, Arch> rate, Acc* to,
                                    simd::pack<Acc, Arch>& up, simd::pack<Acc, Arch>& down) {
    using P = simd::pack<Acc, Arch>;
    P above(Acc(0)), below(Acc(0));
    for (isize c = 0; c < r; c += P::size) {
      P a, b;
      simd::exp2_pair(P::load(from + c), rate, a, b);
      a.store(to + c), b.store(to + r + c);
      above = above + a, below = below + b;
    }
    up = above, down = below;
  }
  /// Any row, its largest elements subtracted.
  template <class Arch, class Acc>
  FOVEA_NOINLINE void pair_far_row(const Acc* from, isize r, Acc scale, Acc* to, simd::pack<Acc, Arch>& up,
                                   simd::pack<Acc, Arch>& down) const {
    using P = simd::pack<Acc, Arch>;
    Acc top, low;
    feature::row_range<Arch, Acc>(from, r, top, low);
    if (form == hedgehog_form::joint) top = low = top > low || top != top ? top : low;
    const P s(scale), back(-scale), zero(Acc(0)), rise(-scale * top), fall(-scale * low);
    P above = zero, below = zero;
    for (isize c = 0; c < r; c += P::size) {
      const simd::lane_bits real = r - c < P::size ? (1U << (r - c)) - 1U : ~0U;
      const P x = simd::load_n<P>(from + c, r - c);
      const P a = simd::exp(simd::fma(x, s, rise)), b = simd::exp(simd::fma(x, back, fall));
      simd::store_n(to + c, a, r - c), simd::store_n(to + r + c, b, r - c);
      above = above + simd::select(real, a, zero), below = below + simd::select(real, b, zero);
    }
    up = above, down = below;
  }
  /// The largest |y| of some rows, r a multiple of W; a NaN gives NaN or is passed over.
  template <class Arch, class Acc>
  FOVEA_INLINE static Acc reach(const Acc* y, isize y_stride, isize rows, isize r) {
    using P = simd::pack<Acc, Arch>;
    P most[4];
    tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA { most[i] = P(Acc(0)); });
    for (isize t = 0; t < rows; t += 4)
      for (isize c = 0; c < r; c += P::size)
        tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
          const Acc* row = y + std::min<isize>(t + i, rows - 1) * y_stride;
          most[i] = simd::most_magnitude(P::load(row + c), most[i]);
        });
    return simd::reduce_max(simd::most_magnitude(simd::most_magnitude(most[0], most[1]),  //
                                                 simd::most_magnitude(most[2], most[3])));
  }
  /// Up to W rows y [r] -> features [2 r], which may begin where y does. By passes over all rows: one row alone waits for its own sums.
  template <class Arch, class Acc>
  FOVEA_INLINE void pair(const Acc* y, isize y_stride, isize rows, isize r, Acc* out, isize stride) const {
    using P = simd::pack<Acc, Arch>;
    const bool joint = form == hedgehog_form::joint, near = form != hedgehog_form::paired && r % P::size == 0;
    const Acc scale = joint ? Acc(2) : Acc(1), least = Acc(40) / scale;
    const P rate(scale * static_cast<Acc>(1.4426950408889634074));
    P up[P::size], down[P::size];
    if (near && rows == P::size && reach<Arch>(y, y_stride, rows, r) <= least) {
      for (isize t = 0; t < P::size; ++t)
        pair_row<Arch, Acc>(y + t * y_stride, r, rate, out + t * stride, up[t], down[t]);
    } else {
      for (isize t = 0; t < P::size; ++t) up[t] = down[t] = P(Acc(0));
      for (isize t = 0; t < rows; ++t) {
        const Acc* from = y + t * y_stride;
        Acc* to = out + t * stride;
        if (near && reach<Arch>(from, y_stride, 1, r) <= least)
          pair_row<Arch, Acc>(from, r, rate, to, up[t], down[t]);
        else
          pair_far_row<Arch, Acc>(from, r, scale, to, up[t], down[t]);
      }
    }
    if (form != hedgehog_form::paired) divide<Arch, Acc>(up, down, joint, rows, r, out, stride);
  }
  /// Rows over their sums.
  template <class Arch, class Acc>
  FOVEA_INLINE static void divide(const simd::pack<Acc, Arch> (&up)[simd::pack<Acc, Arch>::size],
                                  const simd::pack<Acc, Arch> (&down)[simd::pack<Acc, Arch>::size], bool joint,
                                  isize rows, isize r, Acc* out, isize stride) {
    using P = simd::pack<Acc, Arch>;
    Acc first[P::size], second[P::size];
    const P a = simd::sum_each(up), b = simd::sum_each(down);
    ((P(Acc(1)) / (joint ? a + b : a))).store(first), ((P(Acc(1)) / (joint ? a + b : b))).store(second);
    const isize whole = r / P::size * P::size;
    for (isize t = 0; t < rows; ++t) {
      const P f(first[t]), g(second[t]);
      Acc *high = out + t * stride, *low = high + r;
      for (isize c = 0; c < whole; c += P::size) {
        (P::load(high + c) * f).store(high + c);
        (P::load(low + c) * g).store(low + c);
      }
      if (whole == r) continue;
      feature::row_scale<Arch, Acc>(high + whole, r - whole, first[t]);
      feature::row_scale<Arch, Acc>(low + whole, r - whole, second[t]);
    }
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea

#include <fovea/feature/learned_derivative.hpp>
