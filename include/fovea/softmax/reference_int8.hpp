// SPDX-License-Identifier: MIT
#pragma once
/// @file  Attention by the int8 recipe (kernel/int8_recipe.hpp) row by row: integers as the recipe says, everything else in double.
///
///   t_j = round(64 log2(e) score(scale q8 . k8 ...)) + 64 log2(scale of v_j),   M = max of t over the row's keys of a block
///   p_j = (2^(15 - (M - t_j) / 64) + dither) >> 7,   o = sum p v8 / sum p (1 / scale of v)
///
/// Contract   views with finite numbers, no rope; rows that the loop would leave to f32 are not told apart. Rows are rounded in float,
///            as the loop rounds them, so that both have the same integers but for scores that lie on the edge between two of them.
///            `predicted` [B H n]: the squared error of each row that independent roundings of q, k, v, p and t would make, from the
///            scales alone. Slow on purpose.

#include <vector>

#include <fovea/softmax/reference.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

/// A row rounded to 8 bits: y = scale * code.
struct int8_row {
  std::vector<int> codes;
  std::vector<double> exact;  ///< what was rounded
  double scale = 0;
};

namespace detail {
inline int8_row round_row(std::vector<float> x, bool rotate) {
  const std::size_t n = x.size(), side = rotate ? n & (~n + 1) : 1;
  for (std::size_t apart = 1; apart < side; apart *= 2)
    for (std::size_t c = 0; c < n; ++c) {
      if ((c & apart) != 0) continue;
      const float a = x[c], b = x[c + apart];
      x[c] = a + b, x[c + apart] = a - b;
    }
  float most = 0;
  for (float& y : x) {
    if (side > 1) y *= 1.0F / std::sqrt(static_cast<float>(side));
    most = std::fmax(most, std::fabs(y));
  }
  int8_row r;
  r.scale = static_cast<double>(most) / 127;
  for (const float y : x) {
    r.exact.push_back(static_cast<double>(y));
    r.codes.push_back(most > 0 ? static_cast<int>(std::nearbyint(y * (127.0F / most))) : 0);
  }
  return r;
}
inline std::vector<float> floats_of(const tensor_ref& t, isize b, isize h, isize i) {
  std::vector<float> x;
  for (isize c = 0; c < t.width; ++c) x.push_back(static_cast<float>(t.get(b, h, i, c)));
  return x;
}
/// A value: its scale is a power of 2^(1/64).
inline int8_row round_value(const std::vector<float>& x, int& fold) {
  float most = 0;
  for (const float y : x) most = std::fmax(most, std::fabs(y));
  int8_row r;
  fold = most > 0 ? static_cast<int>(kernel::detail::grid_above(most * (1.0F / 127.0F))) : -40 * 64;
  r.scale = std::exp2(fold / 64.0);
  for (const float y : x) {
    r.exact.push_back(static_cast<double>(y));
    r.codes.push_back(most > 0 ? static_cast<int>(std::nearbyint(static_cast<double>(y) / r.scale)) : 0);
  }
  return r;
}
inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}
}  // namespace detail

class int8_twin {
 public:
  int8_twin(const softmax_attention& m, const problem& p, kernel::int8_recipe recipe = {})
      : m_(m), p_(p), recipe_(recipe), s_(p.shape()) {}

  /// Writes p.out and p.lse. Returns `predicted`, if it is wanted.
  std::vector<double> prefill(bool predict = false) {
    std::vector<double> predicted;
    for (isize b = 0; b < s_.B; ++b)
      for (isize h = 0; h < s_.H; ++h) {
        if (h % s_.group() == 0) round_keys(b, h / s_.group());
        for (isize i = 0; i < s_.n; ++i) predicted.push_back(row(b, h, i, predict));
      }
    return predicted;
  }

 private:
  void round_keys(isize b, isize g) {
    k_.clear(), v_.clear(), fold_.assign(static_cast<std::size_t>(s_.m), 0);
    for (isize j = 0; j < s_.m; ++j) {
      k_.push_back(detail::round_row(detail::floats_of(p_.k, b, g, j), recipe_.rotate));
      v_.push_back(detail::round_value(detail::floats_of(p_.v, b, g, j), fold_[static_cast<std::size_t>(j)]));
    }
  }
  bool sees(isize b, isize h, isize i, isize j) const {
    mask_site at = m_.site(s_, b);
    at.h = h;
    return j < s_.m && m_.mask.visible(at, i, j);
  }
  /// Do all rows of row r's vector see keys [j, j + 16)? The denominator of those is counted in integers.
  bool in_integers(isize b, isize h, isize i, isize j) const {
    constexpr isize W = simd::words<simd::native>::size;
    const isize group = h / s_.group() * s_.group(), r = (h - group) * s_.n + i, all = s_.group() * s_.n;
    for (isize x = r / W * W; x < r / W * W + W && x < all; ++x)
      for (isize y = j; y < j + 16; ++y)
        if (!sees(b, group + x / s_.n, x % s_.n, y)) return false;
    double least = 1e300, most = 0;
    for (isize y = j; y < j + 16; ++y) least = std::fmin(least, inverse(y)), most = std::fmax(most, inverse(y));
    return most <= 16 * least;
  }
  double inverse(isize j) const { return 1 / v_[static_cast<std::size_t>(j)].scale; }

  double row(isize b, isize h, isize i, bool predict) {
    const auto e = static_cast<std::size_t>(s_.e), m = static_cast<std::size_t>(s_.m);
    const int8_row q = detail::round_row(detail::floats_of(p_.q, b, h, i), recipe_.rotate);
    const double scale = m_.scale_for(s_), log2e = 1.4426950408889634, none = -std::numeric_limits<double>::infinity();
    mask_site at = m_.site(s_, b);
    at.h = h;
    double top = none, sum = 0;
    const auto rise = [&](double to, std::vector<double>& o) {
      if (to <= top) return;
      const double shrink = std::exp2(top - to);
      for (double& x : o) x *= shrink;
      sum *= shrink, top = to;
    };
    std::vector<double> o(e, 0.0), t(m, none), height(m, none);
    if (m_.sinks != nullptr && m_.sinks[h] > -std::numeric_limits<float>::infinity())
      top = static_cast<double>(m_.sinks[h]) * log2e, sum = 255;
    for (isize j0 = 0; j0 < s_.m; j0 += recipe_.keys) {
      double high = none;
      const isize j1 = j0 + recipe_.keys < s_.m ? j0 + recipe_.keys : s_.m;
      for (isize j = j0; j < j1; ++j) {
        if (!sees(b, h, i, j)) continue;
        const auto x = static_cast<std::size_t>(j);
        double sum_of = 0;
        for (std::size_t c = 0; c < q.codes.size(); ++c) sum_of += q.codes[c] * k_[x].codes[c];
        const double s = m_.score(at, i, j, scale * q.scale * k_[x].scale * sum_of);
        if (s == none) continue;
        t[x] = std::nearbyint(64 * log2e * s + fold_[x]);
        high = std::fmax(high, t[x]);
      }
      if (high == none) continue;
      rise(high / 64, o);
      block(b, h, i, j0, j1, high, std::exp2(high / 64 - top), t, height, o, sum);
    }
    for (std::size_t c = 0; c < e; ++c) o[c] = sum > 0 ? o[c] / sum : 0;
    for (std::size_t c = 0; c < e; ++c) p_.out.set(b, h, i, static_cast<isize>(c), o[c]);
    if (p_.lse) p_.lse.set(b, h, i, 0, sum > 0 ? (top + std::log2(sum / 255)) / log2e : none);
    return predict && sum > 0 ? predicted(q, scale, t, height, top + std::log2(sum / 255), o) : 0;
  }

  /// Keys [j0, j1), whose largest score is `high` and counts `below` of the running maximum.
  void block(isize b, isize h, isize i, isize j0, isize j1, double high, double below, const std::vector<double>& t,
             std::vector<double>& height, std::vector<double>& o, double& sum) {
    const isize lane = (h % s_.group() * s_.n + i) % 16;
    double near = 0, exact = 0, coarsest = 0;
    counted_.resize(t.size());
    for (isize j = j0; j < j1; ++j) {
      const auto x = static_cast<std::size_t>(j);
      if (t[x] == -std::numeric_limits<double>::infinity()) continue;
      height[x] = high;
      const double apart = high - t[x];
      const int d = apart > 32767 ? 32767 : static_cast<int>(apart);
      const int p15 = d >> 6 > 15 ? 0 : simd::detail::exp2_entry(d & 63) >> (d >> 6);
      const int dither =
          recipe_.dither ? kernel::detail::int8_dither(static_cast<int>(j - j0), static_cast<int>(lane)) : 64;
      const int p8 = (p15 + dither) >> 7;
      for (std::size_t c = 0; c < o.size(); ++c) o[c] += below * p8 * v_[x].codes[c];
      const double fine = 255 * std::exp2(-d / 64.0) * inverse(j);
      exact += fine;
      const bool integers = in_integers(b, h, i, j / 16 * 16);
      near += integers ? p8 * inverse(j) : fine;
      counted_[x] = integers ? 1 : 0;
      if (integers) coarsest = std::fmax(coarsest, coarsest_of(j / 16 * 16));
    }
    const bool again = near < 32 * coarsest;
    sum += below * (again ? exact : near);
    for (isize j = j0; again && j < j1; ++j) counted_[static_cast<std::size_t>(j)] = 0;
  }
  double coarsest_of(isize j) const {
    double most = 0;
    for (isize y = j; y < j + 16; ++y) most = std::fmax(most, inverse(y));
    return most;
  }

  /// Variances of independent roundings: of a code 1/12, of a score (1/64 octave) 1/12, of p with its dither at most 1/4.
  double predicted(const int8_row& q, double scale, const std::vector<double>& t, const std::vector<double>& height,
                   double lse, const std::vector<double>& o) const {
    const std::size_t d = q.exact.size(), e = o.size();
    const double qq = detail::dot(q.exact, q.exact), grid = 0.6931471805599453 / 64;
    std::vector<double> turned(e * d, 0.0);  // d o / d score . d score / d q
    double sum = 0;
    for (std::size_t j = 0; j < t.size(); ++j) {
      if (t[j] == -std::numeric_limits<double>::infinity()) continue;
      const double vs = v_[j].scale, w = std::exp2(t[j] / 64 - lse) / vs, step = std::exp2(height[j] / 64 - lse) / 255;
      double apart = 0, apart8 = 0;
      for (std::size_t c = 0; c < e; ++c) {
        const double x = v_[j].exact[c] - o[c], y = v_[j].codes[c] - (counted_[j] != 0 ? o[c] / vs : 0.0);
        apart += x * x, apart8 += y * y;
        for (std::size_t z = 0; z < d; ++z) turned[c * d + z] += w * x * k_[j].exact[z];
      }
      sum += w * w * apart * (scale * scale * qq * k_[j].scale * k_[j].scale + grid * grid) / 12;
      sum += w * w * vs * vs * static_cast<double>(e) / 12 + step * step * apart8 / 4;
    }
    return sum + scale * scale * q.scale * q.scale / 12 * detail::dot(turned, turned);
  }

  const softmax_attention& m_;
  const problem& p_;
  kernel::int8_recipe recipe_;
  shape s_;
  std::vector<int8_row> k_, v_;
  std::vector<int> fold_;
  std::vector<char> counted_;  // of a row: the rounded p of a key is in the denominator, too
};

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
