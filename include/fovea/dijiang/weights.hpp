// SPDX-License-Identifier: MIT
#pragma once
/// @file  Weights D of a DiJiang map fitted to sampled queries and keys: the "weighted" of weighted quasi-Monte Carlo.
///
///   minimise over w >= 0    sum_ij ( (sum_f w_f phi_f(q_i) phi_f(k_j) - e^{s_ij}) / sum_j e^{s_ij} )^2,    s = scale q.k
///   D = sqrt(w)
///
/// Each row's residual is measured against the row's own softmax denominator, so a row counts by its attention weights. The problem
/// is convex (non-negative least squares), with r unknowns; it is solved by coordinate descent on its normal equations.
///
/// Contract   q and k of one head, [n][d] and [m][d], rows `q_stride` and `k_stride` apart; a cold path: n m r multiply-adds and more.
///            `tables` with D = 1. With the paper's form, which has no d^-1/4, the map sees q and k as they are.
/// Limits     fits the sampled pairs and no others: report errors on rows that it has not seen.

#include <vector>

#include <fovea/dijiang/tables.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace detail {

/// min 1/2 w'A w - b'w over w >= 0, A [r x r] symmetric with a positive diagonal.
inline std::vector<double> nonnegative_least_squares(const std::vector<double>& A, const std::vector<double>& b,
                                                     int sweeps = 500) {
  const std::size_t r = b.size();
  std::vector<double> w(r, 0.0), gradient(r);
  for (std::size_t f = 0; f < r; ++f) gradient[f] = -b[f];
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    double moved = 0, size = 0;
    for (std::size_t f = 0; f < r; ++f) {
      if (!(A[f * r + f] > 0)) continue;
      const double next = std::fmax(0.0, w[f] - gradient[f] / A[f * r + f]), change = next - w[f];
      if (change != 0)
        for (std::size_t g = 0; g < r; ++g) gradient[g] += change * A[g * r + f];
      w[f] = next;
      moved = std::fmax(moved, std::fabs(change)), size = std::fmax(size, next);
    }
    if (moved <= 1e-9 * size) break;
  }
  return w;
}

}  // namespace detail

inline std::vector<float> fit_dijiang_weights(const dijiang_tables& tables, const float* q, isize n, isize q_stride,
                                              const float* k, isize m, isize k_stride, double scale) {
  require(q != nullptr && k != nullptr && n >= 1 && m >= 1, "fit_dijiang_weights: n, m are ", n, ", ", m,
          "; wanted at least one query and one key");
  require(tables.form != dijiang_form::released,
          "fit_dijiang_weights: the released form is a softmax over features and has no weights D");
  require(std::isfinite(scale), "fit_dijiang_weights: scale is ", scale, "; it must be a finite number");
  const isize d = tables.d, r = tables.r;
  const auto size = static_cast<std::size_t>(r);
  std::vector<double> x(static_cast<std::size_t>(d)), log_q(size), log_k(static_cast<std::size_t>(m * r)),
      score(static_cast<std::size_t>(m)), phi(size), A(size * size), b(size);
  for (isize j = 0; j < m; ++j) {
    for (isize c = 0; c < d; ++c) x[static_cast<std::size_t>(c)] = static_cast<double>(k[j * k_stride + c]);
    tables.define(0, x.data(), log_k.data() + j * r);
  }
  for (isize i = 0; i < n; ++i) {
    for (isize c = 0; c < d; ++c) x[static_cast<std::size_t>(c)] = static_cast<double>(q[i * q_stride + c]);
    tables.define(0, x.data(), log_q.data());
    double top = -INFINITY, sum = 0;
    for (isize j = 0; j < m; ++j) {
      double s = 0;
      for (isize c = 0; c < d; ++c) s += x[static_cast<std::size_t>(c)] * static_cast<double>(k[j * k_stride + c]);
      score[static_cast<std::size_t>(j)] = s * scale;
      top = std::fmax(top, s * scale);
    }
    for (isize j = 0; j < m; ++j) sum += std::exp(score[static_cast<std::size_t>(j)] - top);
    for (isize j = 0; j < m; ++j) {
      const double target = std::exp(score[static_cast<std::size_t>(j)] - top) / sum;
      for (std::size_t f = 0; f < size; ++f)
        phi[f] = std::exp(std::fmin(log_q[f] + log_k[static_cast<std::size_t>(j * r) + f] - top, 80.0)) / sum;
      for (std::size_t f = 0; f < size; ++f) {
        b[f] += phi[f] * target;
        for (std::size_t g = 0; g <= f; ++g) A[f * size + g] += phi[f] * phi[g];
      }
    }
  }
  for (std::size_t f = 0; f < size; ++f)
    for (std::size_t g = 0; g < f; ++g) A[g * size + f] = A[f * size + g];
  std::vector<float> D(size);
  const auto w = detail::nonnegative_least_squares(A, b);
  for (std::size_t f = 0; f < size; ++f) D[f] = static_cast<float>(std::sqrt(w[f]));
  return D;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
