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

/// context [d x e] over keys [0, count) of k [m x d] and v [m x e].
inline std::vector<double> channel_context(bool exponential, const std::vector<double>& k, const std::vector<double>& v,
                                           isize d, isize e, isize count) {
  const double none = -std::numeric_limits<double>::infinity();
  std::vector<double> context(static_cast<std::size_t>(d * e), 0.0);
  for (isize c = 0; c < d; ++c) {
    double top = none, sum = 0;
    for (isize j = 0; j < count; ++j) top = std::fmax(top, k[static_cast<std::size_t>(j * d + c)]);
    for (isize j = 0; j < count; ++j) {
      const double key = k[static_cast<std::size_t>(j * d + c)];
      const double w = !exponential ? key : key == none ? 0.0 : std::exp(key - top);
      sum += w;
      for (isize x = 0; x < e; ++x)
        context[static_cast<std::size_t>(c * e + x)] += w * v[static_cast<std::size_t>(j * e + x)];
    }
    if (!exponential) sum = static_cast<double>(count);
    for (isize x = 0; x < e; ++x) {
      double& y = context[static_cast<std::size_t>(c * e + x)];
      y = sum == 0 ? 0.0 : y / sum;
    }
  }
  return context;
}

}  // namespace detail

inline void prefill(const efficient_attention& m, const problem& p) {
  const shape s = p.shape();
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h) {
      const bool exponential = m.normalisation == efficient_normalisation::softmax;
      const auto k = detail::numbers(p.k, b, h / s.group()), v = detail::numbers(p.v, b, h / s.group());
      std::vector<double> context;
      for (isize i = 0; i < s.n; ++i) {
        const isize seen = m.causal ? i + s.m - s.n + 1 : m.keys_of(b, s.m);
        if (m.causal || i == 0) context = detail::channel_context(exponential, k, v, s.d, s.e, seen);
        std::vector<double> weight(static_cast<std::size_t>(s.d));
        for (isize c = 0; c < s.d; ++c) weight[static_cast<std::size_t>(c)] = m.scale_for() * p.q.get(b, h, i, c);
        if (exponential) detail::softmax(weight);
        for (isize x = 0; x < s.e; ++x) {
          double o = 0;
          for (isize c = 0; c < s.d; ++c)
            o += weight[static_cast<std::size_t>(c)] * context[static_cast<std::size_t>(c * s.e + x)];
          p.out.set(b, h, i, x, o);
        }
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
