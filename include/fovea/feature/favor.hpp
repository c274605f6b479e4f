// SPDX-License-Identifier: MIT
#pragma once
/// @file  FAVOR+: positive random features of the softmax kernel, and their random directions.
///
///   y = x d^-1/4,   u = W y   [r]
///   favor_plain    phi(x) = e^(u - |y|^2 / 2) / sqrt(r)             E phi(q).phi(k) = e^(q.k / sqrt d) for rows of W ~ N(0, I)
///   favor          phi(q) = (e^(u - |y|^2/2 - max_j u) + eps) / sqrt(r)
///                  phi(k) = (e^(u - |y|^2/2 - max over all keys and j of u) + eps) / sqrt(r)
///
/// Contract   W [r, d] for all heads, or [H, r, d] with H the KV heads. favor_plain is the form for streams: a log-scale per row
///            takes the place of the maximum, and nothing depends on later keys. `favor` is the published code's stabilised form:
///            its epsilon enters relative to the largest exponent of *all* keys, so even its causal use looks ahead by that one
///            number. It therefore surveys the keys before the first feature is made, and cannot keep a state.
/// Numerics   the maximum cancels in the quotient but for eps; exponents are <= 0.
/// Source     Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794.

#include <fovea/feature/projection.hpp>
#include <fovea/feature/quantile.hpp>
#include <fovea/feature/rows.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace feature {

enum class direction_norm : unsigned char { chi, root_d };

/// [r x d]: blocks of d orthogonal directions, each of the length of a Gaussian vector (chi) or of length sqrt(d).
inline std::vector<float> orthogonal_directions(isize r, isize d, std::uint64_t seed,
                                                direction_norm norm = direction_norm::chi) {
  require(r >= 1 && d >= 1, "orthogonal_directions: r, d are ", r, ", ", d, "; they must be positive");
  random_source rng(seed);
  std::vector<float> w(static_cast<std::size_t>(r * d));
  std::vector<double> block(static_cast<std::size_t>(d * d));
  for (isize first = 0; first < r; first += d) {
    for (isize i = 0; i < d; ++i) {
      double* row = block.data() + i * d;
      double length = 0;
      while (length < 1e-6) {  // Gram-Schmidt, twice; a nearly dependent draw is drawn again
        for (isize c = 0; c < d; ++c) row[c] = normal_quantile(rng.uniform());
        for (int pass = 0; pass < 2; ++pass)
          for (isize k = 0; k < i; ++k) {
            double dot = 0;
            for (isize c = 0; c < d; ++c) dot += row[c] * block[static_cast<std::size_t>(k * d + c)];
            for (isize c = 0; c < d; ++c) row[c] -= dot * block[static_cast<std::size_t>(k * d + c)];
          }
        length = 0;
        for (isize c = 0; c < d; ++c) length += row[c] * row[c];
        length = std::sqrt(length);
      }
      for (isize c = 0; c < d; ++c) row[c] /= length;
    }
    for (isize i = 0; i < d && first + i < r; ++i) {
      const double length =
          norm == direction_norm::chi ? chi_quantile(d, rng.uniform()) : std::sqrt(static_cast<double>(d));
      for (isize c = 0; c < d; ++c)
        w[static_cast<std::size_t>((first + i) * d + c)] =
            static_cast<float>(length * block[static_cast<std::size_t>(i * d + c)]);
    }
  }
  return w;
}

}  // namespace feature

struct favor_plain {
  projection_ref directions;

  static constexpr bool log_scaled = true;
  isize features(isize) const { return directions.rows(); }
  double macs(isize) const { return directions.macs(); }
  bool trained() const { return directions.trained(); }
  isize scratch(isize) const { return 0; }
  isize derive_scratch(isize d) const { return directions.rows() * d; }
  isize weights(isize) const { return 0; }  // directions are drawn, not learned
  void check(const shape& s) const { detail::check_pair("favor_plain", directions, directions, s); }
  void fingerprint(detail::fingerprint& f) const {
    f.text("favor_plain").number(static_cast<double>(directions.rows()));
  }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    const isize r = directions.rows();
    const Acc shrink = static_cast<Acc>(std::pow(static_cast<double>(b.width), -0.25));
    directions.template apply<Arch, Acc>(b.kv_head, b.x, b.x_stride, b.rows, b.out, b.out_stride);
    for (isize t = 0; t < b.rows; ++t) {
      Acc* u = b.out + t * b.out_stride;
      const Acc top = feature::row_max<Arch, Acc>(u, r, shrink);
      feature::row_exp<Arch, Acc>(u, r, shrink, top, u);
      const Acc half_square = feature::row_square<Arch, Acc>(b.x + t * b.x_stride, b.width) * shrink * shrink / 2;
      b.log_scale[t] = top - half_square - static_cast<Acc>(0.5 * std::log(static_cast<double>(r)));
    }
  }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept;
  double define(const feature_site& at, const double* x, isize d, double* out) const {
    const isize r = directions.rows();
    directions.define(at.kv_head, x, std::pow(static_cast<double>(d), -0.25), out);
    double square = 0, top = out[0];
    for (isize c = 0; c < d; ++c) square += x[c] * x[c];
    for (isize j = 0; j < r; ++j) top = std::fmax(top, out[j]);
    for (isize j = 0; j < r; ++j) out[j] = std::exp(out[j] - top);
    return top - square / std::sqrt(static_cast<double>(d)) / 2 - 0.5 * std::log(static_cast<double>(r));
  }
};

struct favor {
  projection_ref directions;
  double feature_eps = 1e-4;

  static constexpr bool log_scaled = false;
  isize features(isize) const { return directions.rows(); }
  double macs(isize) const { return directions.macs(); }
  bool trained() const { return directions.trained(); }
  isize scratch(isize) const { return feature_rows * directions.rows(); }
  bool surveys() const { return true; }
  isize derive_scratch(isize d) const { return directions.rows() * d; }
  isize weights(isize) const { return 0; }
  void check(const shape& s) const {
    detail::check_pair("favor", directions, directions, s);
    require(std::isfinite(feature_eps) && feature_eps >= 0, "favor feature_eps is ", feature_eps,
            "; it must not be negative");
  }
  void fingerprint(detail::fingerprint& f) const {
    f.text("favor").number(feature_eps).number(static_cast<double>(directions.rows()));
  }

  template <class Arch, class Acc>
  Acc survey(const feature_block<Acc>& b, Acc* u) const noexcept {  // the largest exponent of these keys
    const isize r = directions.rows();
    directions.template apply<Arch, Acc>(b.kv_head, b.x, b.x_stride, b.rows, u, r);
    return feature::row_max<Arch, Acc>(u, b.rows * r, static_cast<Acc>(std::pow(static_cast<double>(b.width), -0.25)));
  }
  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    using P = simd::pack<Acc, Arch>;
    const isize r = directions.rows();
    const Acc shrink = static_cast<Acc>(std::pow(static_cast<double>(b.width), -0.25));
    const P norm(static_cast<Acc>(1 / std::sqrt(static_cast<double>(r)))), eps(static_cast<Acc>(feature_eps));
    directions.template apply<Arch, Acc>(b.kv_head, b.x, b.x_stride, b.rows, b.out, b.out_stride);
    for (isize t = 0; t < b.rows; ++t) {
      Acc* u = b.out + t * b.out_stride;
      const Acc top = b.key ? b.survey : feature::row_max<Arch, Acc>(u, r, shrink);
      const Acc half_square = feature::row_square<Arch, Acc>(b.x + t * b.x_stride, b.width) * shrink * shrink / 2;
      feature::row_exp<Arch, Acc>(u, r, shrink, top + half_square, u);
      for (isize j = 0; j < r; j += P::size) simd::store_n(u + j, (simd::load_n<P>(u + j, r - j) + eps) * norm, r - j);
    }
  }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept;
  double define_survey(const feature_site& at, const double* x, isize d) const {
    std::vector<double> u(static_cast<std::size_t>(directions.rows()));
    directions.define(at.kv_head, x, std::pow(static_cast<double>(d), -0.25), u.data());
    double top = u[0];
    for (const double a : u) top = std::fmax(top, a);
    return top;
  }
  double define(const feature_site& at, const double* x, isize d, double* out) const {
    const isize r = directions.rows();
    const double top = at.key ? at.survey : define_survey(at, x, d);
    directions.define(at.kv_head, x, std::pow(static_cast<double>(d), -0.25), out);
    double square = 0;
    for (isize c = 0; c < d; ++c) square += x[c] * x[c];
    const double half = square / std::sqrt(static_cast<double>(d)) / 2;
    for (isize j = 0; j < r; ++j)
      out[j] = (std::exp(out[j] - half - top) + feature_eps) / std::sqrt(static_cast<double>(r));
    return 0.0;
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea

#include <fovea/feature/favor_derivative.hpp>
