// SPDX-License-Identifier: MIT
#pragma once
/// @file  Tables for RoPE, with the scalings that stretch a model beyond the positions it was trained on.
///
///   linear       f_i / factor
///   ntk          base * factor^(w / (w - 2));   with length > original > 0 (dynamic): (factor length / original - factor + 1) for factor
///   yarn         f_i (1 - r_i) + f_i / factor * r_i,   r_i a ramp from 0 where a turn is made beta_fast times in `original` positions to
///                1 where it is made beta_slow times; cos and sin are multiplied by 1 + 0.1 ln(factor)
///   llama3       f_i if its wave is shorter than original / high, f_i / factor if longer than original / low, a blend between
///   rope_factors f_i / factors[i]: LongRoPE's short or long list, GGUF's rope_freqs
///
/// Contract   width even and at least 2 (at least 4 for ntk); factor >= 1 but for linear (> 0). The names are those of the
///            `rope_parameters` of Hugging Face models, and so are the defaults.
/// Cost       positions * width / 2 pairs of cos and sin in double, once.
/// Source     kaiokendev (linear); bloc97, emozilla (NTK); Peng et al., YaRN, arXiv 2309.00071; Llama 3.1 model code; Ding et al.,
///            LongRoPE, arXiv 2402.13753.

#include <cmath>
#include <variant>
#include <vector>

#include <fovea/position/rope.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct rope_linear {
  double factor = 1;
};
struct rope_ntk {
  double factor = 1;
  isize original = 0;  ///< positions of the training; needed by the dynamic form alone
  isize length = 0;    ///< dynamic: positions of the sequence that the table is for; 0: the fixed form
};
struct rope_yarn {
  double factor = 1;
  isize original = 0;
  double beta_fast = 32, beta_slow = 1;
  bool truncate = true;                   ///< the ramp begins and ends at whole i
  double attention_factor = 0;            ///< 0: from factor, mscale and mscale_all_dim
  double mscale = 0, mscale_all_dim = 0;  ///< DeepSeek: the ratio of two magnitudes; both or none
};
struct rope_llama3 {
  double factor = 8;
  double low = 1, high = 4;  ///< low_freq_factor, high_freq_factor
  isize original = 8192;
};
struct rope_factors {
  std::vector<double> factors;  ///< [width / 2]
  double attention_factor = 1;
};
using rope_scaling = std::variant<std::monostate, rope_linear, rope_ntk, rope_yarn, rope_llama3, rope_factors>;

struct rope_options {
  double base = 10000;  ///< theta
  isize width = 0;
  isize positions = 0;
  rope::pairing pair = rope::pairing::neox;
  rope_scaling scaling = {};
  bool f64 = false;  ///< tables of double besides, for attention in double
};

namespace detail {

inline double yarn_magnitude(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

/// f_i of RoPE as it is changed in place by each scaling; returns the magnitude of cos and sin.
struct rope_scaler {
  const rope_options& o;
  std::vector<double>& f;

  double operator()(std::monostate) const { return 1; }
  double operator()(const rope_linear& s) const {
    require(s.factor > 0 && std::isfinite(s.factor), "rope factor is ", s.factor, "; it must be positive");
    for (double& x : f) x /= s.factor;
    return 1;
  }
  double operator()(const rope_ntk& s) const {
    stretched(s.factor);
    require(o.width >= 4, "rope width is ", o.width, "; NTK scaling needs at least 4");
    require(s.length == 0 || s.original >= 1, "rope original is ", s.original,
            "; the dynamic form of NTK scaling needs the positions of the training");
    double factor = s.factor;
    if (s.length > 0) {
      const isize length = s.length > s.original ? s.length : s.original;
      factor = s.factor * static_cast<double>(length) / static_cast<double>(s.original) - (s.factor - 1);
    }
    const double w = static_cast<double>(o.width), base = o.base * std::pow(factor, w / (w - 2));
    for (isize i = 0; i < o.width / 2; ++i)
      f[static_cast<std::size_t>(i)] = std::pow(base, -2.0 * static_cast<double>(i) / w);
    return 1;
  }
  double operator()(const rope_yarn& s) const {
    stretched(s.factor);
    require(s.original >= 1, "rope original is ", s.original, "; YaRN needs the positions of the training");
    require(s.beta_fast > 0 && s.beta_slow > 0, "rope beta_fast, beta_slow are ", s.beta_fast, ", ", s.beta_slow,
            "; they must be positive");
    require(o.base > 1, "rope base is ", o.base, "; YaRN needs more than 1");
    const double w = static_cast<double>(o.width);
    const auto index = [&](double turns) {  // the i that makes so many turns in `original` positions
      return w * std::log(static_cast<double>(s.original) / (turns * 2 * pi)) / (2 * std::log(o.base));
    };
    double low = index(s.beta_fast), high = index(s.beta_slow);
    if (s.truncate) low = std::floor(low), high = std::ceil(high);
    low = std::fmax(low, 0.0), high = std::fmin(high, w - 1);
    if (low == high) high += 0.001;
    for (std::size_t i = 0; i < f.size(); ++i) {
      const double ramp = std::fmin(std::fmax((static_cast<double>(i) - low) / (high - low), 0.0), 1.0);
      f[i] = f[i] * (1 - ramp) + f[i] / s.factor * ramp;
    }
    if (s.attention_factor != 0) return s.attention_factor;
    if (s.mscale != 0 && s.mscale_all_dim != 0)
      return yarn_magnitude(s.factor, s.mscale) / yarn_magnitude(s.factor, s.mscale_all_dim);
    return yarn_magnitude(s.factor, 1);
  }
  double operator()(const rope_llama3& s) const {
    stretched(s.factor);
    require(s.original >= 1 && s.low > 0 && s.high > s.low, "rope original, low, high are ", s.original, ", ", s.low,
            ", ", s.high, "; wanted positive ones, and high above low");
    const double length = static_cast<double>(s.original);
    for (double& x : f) {
      const double wave = 2 * pi / x, blend = (length / wave - s.low) / (s.high - s.low);
      if (wave > length / s.low)
        x /= s.factor;
      else if (wave >= length / s.high)
        x = (1 - blend) * x / s.factor + blend * x;
    }
    return 1;
  }
  double operator()(const rope_factors& s) const {
    require(s.factors.size() == f.size(), "rope has ", s.factors.size(), " factors; wanted width / 2 = ", f.size());
    for (std::size_t i = 0; i < f.size(); ++i) {
      require(s.factors[i] > 0 && std::isfinite(s.factors[i]), "rope factors[", i, "] is ", s.factors[i],
              "; it must be positive");
      f[i] /= s.factors[i];
    }
    return s.attention_factor;
  }

 private:
  static constexpr double pi = 3.14159265358979323846;
  static void stretched(double factor) {
    require(factor >= 1 && std::isfinite(factor), "rope factor is ", factor, "; it must be at least 1");
  }
};

}  // namespace detail

/// Owns the tables of a rope. Share one between the layers of a model.
class rope_table {
 public:
  rope_table() = default;
  explicit rope_table(const rope_options& o) : positions_(o.positions), width_(o.width), pair_(o.pair) {
    require(o.width >= 2 && o.width % 2 == 0, "rope width is ", o.width, "; it must be even and at least 2");
    require(o.positions >= 1 && o.positions <= (isize{1} << 31), "rope positions is ", o.positions,
            "; it must be at least 1, and at most 2^31");
    require(o.base > 0 && std::isfinite(o.base), "rope base is ", o.base, "; it must be positive and finite");
    for (isize i = 0; i < o.width / 2; ++i)
      frequencies_.push_back(std::pow(o.base, -2.0 * static_cast<double>(i) / static_cast<double>(o.width)));
    magnitude_ = std::visit(detail::rope_scaler{o, frequencies_}, o.scaling);
    require(magnitude_ > 0 && std::isfinite(magnitude_), "rope attention_factor is ", magnitude_,
            "; it must be positive and finite");
    fill(o.f64);
  }

  /// Valid while the table lives (moving it is allowed).
  operator rope() const {  // NOLINT(google-explicit-constructor)
    return {cos_.data(),
            sin_.data(),
            positions_,
            width_,
            pair_,
            cos_f64_.empty() ? nullptr : cos_f64_.data(),
            sin_f64_.empty() ? nullptr : sin_f64_.data()};
  }
  /// Radians a position of each pair, after scaling [width / 2].
  const std::vector<double>& frequencies() const { return frequencies_; }
  /// What cos and sin are multiplied by: 1 but for YaRN and LongRoPE.
  double magnitude() const { return magnitude_; }

 private:
  void fill(bool f64) {
    const std::size_t half = frequencies_.size(), size = half * static_cast<std::size_t>(positions_);
    cos_.resize(size), sin_.resize(size);
    if (f64) cos_f64_.resize(size), sin_f64_.resize(size);
    for (std::size_t at = 0; at < size; ++at) {
      const double angle = static_cast<double>(at / half) * frequencies_[at % half];
      const double c = magnitude_ * std::cos(angle), s = magnitude_ * std::sin(angle);
      cos_[at] = static_cast<float>(c), sin_[at] = static_cast<float>(s);
      if (f64) cos_f64_[at] = c, sin_f64_[at] = s;
    }
  }

  isize positions_ = 0, width_ = 0;
  rope::pairing pair_ = rope::pairing::neox;
  std::vector<double> frequencies_;
  double magnitude_ = 1;
  std::vector<float> cos_, sin_;
  std::vector<double> cos_f64_, sin_f64_;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
