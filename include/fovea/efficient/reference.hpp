// SPDX-License-Identifier: MIT
#pragma once
/// @file  Efficient Attention and the k-free forms from their definitions, in double: plain loops over positions and channels.
///
/// Contract   a row that sees nothing gives zeros; a channel whose keys are all -inf contributes zero. Slow on purpose.

#include <cmath>
#include <limits>
#include <vector>

#include <fovea/efficient.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {
namespace detail {

inline void softmax(std::vector<double>& x) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const double y : x) top = y > top ? y : top;
  for (double& y : x) y = y == top ? 1.0 : std::exp(y - top), sum += y;
  for (double& y : x) y /= sum;
}

/// All rows of one head.
inline std::vector<double> numbers(const tensor_ref& x, isize b, isize g) {
  std::vector<double> out;
  for (isize j = 0; j < x.length; ++j)
    for (isize c = 0; c < x.width; ++c) out.push_back(x.get(b, g, j, c));
  return out;
}

/// What each key weighs in each channel, for the first `count` keys of k [m x d]: e^(k_jc - top_c), or k_jc; and the sum of each channel.
struct channel_weights {
  bool exponential;
  const std::vector<double>& k;
  isize d, count = 0;
  std::vector<std::vector<double>> of = std::vector<std::vector<double>>(static_cast<std::size_t>(d));
  std::vector<double> top = std::vector<double>(of.size(), -std::numeric_limits<double>::infinity());

  double weight(std::size_t j, std::size_t c) const {
    const double key = k[j * of.size() + c];
    return !exponential ? key : key == -std::numeric_limits<double>::infinity() ? 0.0 : std::exp(key - top[c]);
  }
  void take(isize keys) {
    for (; count < keys; ++count)
      for (std::size_t c = 0; c < of.size(); ++c) {
        const auto last = static_cast<std::size_t>(count);
        const bool higher = k[last * of.size() + c] > top[c];  // then the others are made anew
        top[c] = std::fmax(top[c], k[last * of.size() + c]);
        of[c].push_back(0);
        for (std::size_t j = exponential && higher ? 0 : last; j <= last; ++j) of[c][j] = weight(j, c);
      }
  }
  /// sum_c row_c w_jc / sum_c
  std::vector<double> seen_by(const std::vector<double>& row) const {
    std::vector<double> out(static_cast<std::size_t>(count), 0.0);
    for (std::size_t c = 0; c < of.size(); ++c) {
      double sum = exponential ? 0.0 : static_cast<double>(count);
      for (const double w : of[c]) sum += exponential ? w : 0.0;
      for (std::size_t j = 0; j < out.size() && sum != 0; ++j) out[j] += row[c] / sum * of[c][j];
    }
    return out;
  }
};

}  // namespace detail

inline void prefill(const efficient_attention& m, const problem& p) {
  const shape s = p.shape();
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h) {
      const bool exponential = m.normalisation == efficient_normalisation::softmax;
      const auto k = detail::numbers(p.k, b, h / s.group()), v = detail::numbers(p.v, b, h / s.group());
      detail::channel_weights keys{exponential, k, s.d};
      for (isize i = 0; i < s.n; ++i) {
        keys.take(m.causal ? i + s.m - s.n + 1 : m.keys_of(b, s.m));
        std::vector<double> row(static_cast<std::size_t>(s.d)), o(static_cast<std::size_t>(s.e), 0.0);
        for (isize c = 0; c < s.d; ++c) row[static_cast<std::size_t>(c)] = m.scale_for() * p.q.get(b, h, i, c);
        if (exponential) detail::softmax(row);
        const std::vector<double> weight = keys.seen_by(row);
        for (isize j = 0; j < keys.count; ++j)  // o = sum_c row_c (sum_j w_jc v_j), j first
          for (isize x = 0; x < s.e; ++x)
            o[static_cast<std::size_t>(x)] +=
                weight[static_cast<std::size_t>(j)] * v[static_cast<std::size_t>(j * s.e + x)];
        for (isize x = 0; x < s.e; ++x) p.out.set(b, h, i, x, o[static_cast<std::size_t>(x)]);
      }
    }
}

inline void prefill(const kfree_reconstruction& m, const problem& p) {
  using form = kfree_reconstruction::form_type;
  if (m.form == form::efficient) return prefill(efficient_attention{.scale = m.scale}, p);
  const shape s = p.shape();
  const bool channel = m.form == form::channel;
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h) {
      const isize g = h / s.group(), columns = channel ? s.d : s.e;
      std::vector<std::vector<double>> map(static_cast<std::size_t>(s.d),
                                           std::vector<double>(static_cast<std::size_t>(columns), 0.0));
      for (isize c = 0; c < s.d; ++c) {
        auto& row = map[static_cast<std::size_t>(c)];
        for (isize x = 0; x < columns; ++x)
          for (isize j = 0; j < s.m; ++j)
            row[static_cast<std::size_t>(x)] += channel ? m.scale_for() * p.q.get(b, h, j, c) * p.k.get(b, g, j, x)
                                                        : p.k.get(b, g, j, c) * p.v.get(b, g, j, x);
        for (double& y : row) y /= s.m > 0 ? std::sqrt(static_cast<double>(s.m)) : 1.0;
        detail::softmax(row);
      }
      for (isize i = 0; i < s.n; ++i)
        for (isize x = 0; x < s.e; ++x) {
          double o = 0;
          for (isize c = 0; c < s.d; ++c)
            o += (channel ? p.v.get(b, g, i, c) : m.scale_for() * p.q.get(b, h, i, c)) *
                 map[static_cast<std::size_t>(c)][static_cast<std::size_t>(x)];
          p.out.set(b, h, i, x, s.m == 0 ? 0.0 : o);
        }
    }
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
