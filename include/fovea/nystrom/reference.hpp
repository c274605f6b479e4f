// SPDX-License-Identifier: MIT
#pragma once
/// @file  Nystrom attention from its definition, in double: the three softmax matrices are written out, the pseudo-inverse by plain loops.
///
/// Contract   no keys give zeros (and the convolution of what there is), rows of padding too. Slow on purpose.

#include <algorithm>
#include <cmath>
#include <vector>

#include <fovea/nystrom.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {
namespace detail {

using matrix = std::vector<std::vector<double>>;

inline matrix zeros(isize height, isize width) {
  return matrix(static_cast<std::size_t>(height), std::vector<double>(static_cast<std::size_t>(width), 0.0));
}
/// The first rows of a head.
inline matrix matrix_of(const tensor_ref& x, isize b, isize h, isize count) {
  matrix out = zeros(count, x.width);
  for (isize i = 0; i < count; ++i)
    for (isize c = 0; c < x.width; ++c)
      out[static_cast<std::size_t>(i)][static_cast<std::size_t>(c)] = x.get(b, h, i, c);
  return out;
}
inline matrix segment_means(const matrix& x, isize parts) {
  const auto length = static_cast<isize>(x.size());
  matrix out;
  for (isize s = 0; s < parts; ++s) {
    const isize first = s * length / parts, last = (s + 1) * length / parts;
    std::vector<double> mean(x.front().size(), 0.0);
    for (isize i = first; i < last; ++i)
      for (std::size_t c = 0; c < mean.size(); ++c)
        mean[c] += x[static_cast<std::size_t>(i)][c] / static_cast<double>(last - first);
    out.push_back(mean);
  }
  return out;
}
inline matrix product(const matrix& a, const matrix& b) {
  matrix out = zeros(static_cast<isize>(a.size()), b.empty() ? 0 : static_cast<isize>(b.front().size()));
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t k = 0; k < b.size(); ++k)
      for (std::size_t j = 0; j < b[k].size(); ++j) out[i][j] += a[i][k] * b[k][j];
  return out;
}
/// Softmax over the rows of scale * a b^T.
inline matrix softmax_weights(double scale, const matrix& a, const matrix& b) {
  matrix out = zeros(static_cast<isize>(a.size()), static_cast<isize>(b.size()));
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t j = 0; j < b.size(); ++j)
      for (std::size_t c = 0; c < a[i].size(); ++c) out[i][j] += scale * a[i][c] * b[j][c];
    const double top = out[i].empty() ? 0.0 : *std::max_element(out[i].begin(), out[i].end());
    double sum = 0;
    for (double& x : out[i]) x = std::exp(x - top), sum += x;
    for (double& x : out[i]) x /= sum;
  }
  return out;
}
/// diagonal I - a
inline matrix minus_from(double diagonal, matrix a) {
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t j = 0; j < a.size(); ++j) a[i][j] = (i == j ? diagonal : 0.0) - a[i][j];
  return a;
}
inline matrix pseudo_inverse(const matrix& A, isize iterations) {
  const std::size_t l = A.size();
  std::vector<double> column(l, 0.0);
  for (const auto& row : A)
    for (std::size_t j = 0; j < l; ++j) column[j] += row[j];
  const double most = *std::max_element(column.begin(), column.end());
  matrix Z(l, std::vector<double>(l));
  for (std::size_t i = 0; i < l; ++i)
    for (std::size_t j = 0; j < l; ++j) Z[i][j] = A[j][i] / most;
  for (isize x = 0; x < iterations; ++x) {
    const matrix AZ = product(A, Z);
    Z = product(Z, minus_from(13, product(AZ, minus_from(15, product(AZ, minus_from(7, AZ))))));
    for (auto& row : Z)
      for (double& y : row) y *= 0.25;
  }
  return Z;
}

}  // namespace detail

inline void prefill(const nystrom_attention& m, const problem& p) {
  using namespace detail;
  const shape all = p.shape();
  const double scale = m.scale_for(all);
  const isize taps = m.skip.data == nullptr ? 0 : m.skip.width;
  for (isize b = 0; b < all.B; ++b) {
    const shape s = m.item(all, b);  // rows and keys behind it are padding
    const isize l = m.used(s);
    for (isize h = 0; h < s.H; ++h) {
      const matrix q = matrix_of(p.q, b, h, s.n), k = matrix_of(p.k, b, h / s.group(), s.m),
                   v = matrix_of(p.v, b, h / s.group(), s.m);
      matrix o = zeros(all.n, s.e), seen;
      if (l == 0 && s.m > 0) {
        seen = product(softmax_weights(scale, q, k), v);
      } else if (l > 0) {
        const matrix few_q = segment_means(q, l), few_k = segment_means(k, l);
        const matrix values = product(softmax_weights(scale, few_q, k), v);
        const matrix inverse = pseudo_inverse(softmax_weights(scale, few_q, few_k), m.iterations);
        seen = product(softmax_weights(scale, q, few_k), product(inverse, values));
      }
      std::copy(seen.begin(), seen.end(), o.begin());
      for (isize i = 0; i < all.n; ++i)
        for (isize c = 0; c < s.e; ++c) {
          double y = o[static_cast<std::size_t>(i)][static_cast<std::size_t>(c)];
          for (isize t = 0; i < s.n && t < taps; ++t) {
            const isize j = i + t - taps / 2;
            if (j >= 0 && j < s.m)
              y += static_cast<double>(m.skip(0, m.skip.heads == 1 ? 0 : h, 0, t)) *
                   v[static_cast<std::size_t>(j)][static_cast<std::size_t>(c)];
          }
          p.out.set(b, h, i, c, y);
        }
    }
  }
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
