// SPDX-License-Identifier: MIT
#include "calibrate/low_rank/spectrum.hpp"

#include <Eigen/Cholesky>
#include <Eigen/Eigenvalues>

namespace calibrate {
namespace {

using matrix = Eigen::MatrixXd;
using fovea::train::projection_fit;
using fovea::train::projection_sharing;

/// Rows [at, at + W) of a head.
matrix rows_of(const std::vector<float>& x, isize head, isize n, isize width, isize at, isize W) {
  matrix out(W, width);
  for (isize i = 0; i < W; ++i)
    for (isize c = 0; c < width; ++c)
      out(i, c) = static_cast<double>(x[static_cast<std::size_t>((head * n + at + i) * width + c)]);
  return out;
}
matrix softmax(matrix s) {
  for (isize i = 0; i < s.rows(); ++i) {
    s.row(i) = (s.row(i).array() - s.row(i).maxCoeff()).exp();
    s.row(i) /= s.row(i).sum();
  }
  return s;
}
matrix queries(const compare::input& in, isize h, isize at, isize W) { return rows_of(in.q, h, in.n, in.d, at, W); }
matrix keys(const compare::input& in, isize h, isize at, isize W) {
  return rows_of(in.k, h / (in.H / in.G), in.n, in.d, at, W);
}
matrix values(const compare::input& in, isize h, isize at, isize W) {
  return rows_of(in.v, h / (in.H / in.G), in.n, in.e, at, W);
}
matrix attention(const compare::input& in, isize h, isize at, isize W) {
  return softmax(in.scale * queries(in, h, at, W) * keys(in, h, at, W).transpose());
}
/// Rows that are learned from; all of a window but the last ones where the whole text is the window.
matrix seen(const projection_fit& fit, const matrix& P) { return P.topRows(fit.train_rows()); }

/// Eigenvectors of a symmetric matrix, the largest first.
matrix directions(const matrix& gram) {
  const Eigen::SelfAdjointEigenSolver<matrix> solver(gram);
  return solver.eigenvectors().rowwise().reverse();
}
/// sum over the windows learned from of P^T P, for the heads of one map.
matrix gram_of(const compare::input& in, const projection_fit& fit, isize first, isize last) {
  matrix gram = matrix::Zero(fit.positions(), fit.positions());
  for (isize h = first; h < last; ++h)
    for (const isize at : fit.train_windows()) {
      const matrix P = seen(fit, attention(in, h, at, fit.positions()));
      gram += P.transpose() * P;
    }
  return gram;
}
void store(const matrix& x, isize map, std::vector<float>& to) {
  for (isize i = 0; i < x.rows(); ++i)
    for (isize s = 0; s < x.cols(); ++s)
      to[static_cast<std::size_t>((map * x.rows() + i) * x.cols() + s)] = static_cast<float>(x(i, s));
}
matrix pooling(isize W, isize slots) {
  matrix E = matrix::Zero(W, slots);
  for (isize s = 0; s < slots; ++s) {
    const isize first = s * W / slots, last = (s + 1) * W / slots;
    for (isize i = first; i < last; ++i) E(i, s) = 1 / static_cast<double>(last - first);
  }
  return E;
}

}  // namespace

const char* name_of(start_kind k) {
  return k == start_kind::means ? "pooling, F by least squares" : "singular directions, F by least squares";
}

std::vector<spectrum_row> spectrum(const compare::input& in, const projection_fit& fit, const std::vector<isize>& ks) {
  std::vector<spectrum_row> out;
  for (const isize k : ks) out.push_back({.k = k});
  const isize W = fit.positions();
  const double share = 1 / static_cast<double>(in.H * static_cast<isize>(fit.held_out_windows().size()));
  for (isize h = 0; h < in.H; ++h) {
    const matrix fixed = directions(gram_of(in, fit, h, h + 1));
    for (const isize at : fit.held_out_windows()) {
      matrix P = attention(in, h, at, W);
      if (fit.whole()) P = matrix(P.bottomRows(W - fit.train_rows()));
      const matrix V = values(in, h, at, W), O = P * V, own = directions(P.transpose() * P);
      for (spectrum_row& r : out) {
        const auto measure = [&](const matrix& all, double& energy, double& error) {
          const matrix first = all.leftCols(r.k), near = P * first;
          energy += share * near.squaredNorm() / P.squaredNorm();
          error += share * (near * (first.transpose() * V) - O).norm() / O.norm();
        };
        measure(own, r.own_energy, r.own_error), measure(fixed, r.fixed_energy, r.fixed_error);
      }
    }
  }
  return out;
}

projections segment_means(const projection_fit& fit, isize slots) {
  projections out;
  out.E.resize(static_cast<std::size_t>(fit.maps() * fit.positions() * slots));
  for (isize map = 0; map < fit.maps(); ++map) store(pooling(fit.positions(), slots), map, out.E);
  out.F = out.E;
  return out;
}

projections start_of(start_kind kind, const compare::input& in, const projection_fit& fit, isize slots,
                     projection_sharing share) {
  projections out = segment_means(fit, slots);
  const isize W = fit.positions(), maps = fit.maps(), heads = in.H / maps;
  for (isize map = 0; map < maps; ++map) {
    matrix E = pooling(W, slots);
    if (kind == start_kind::singular) {
      E = directions(gram_of(in, fit, map * heads, (map + 1) * heads)).leftCols(slots);
      for (isize s = 0; s < slots; ++s) E.col(s) *= (E.col(s).sum() < 0 ? -1 : 1) / E.col(s).cwiseAbs().sum();
    }
    matrix left = matrix::Zero(slots, slots), right = matrix::Zero(slots, W);
    for (isize h = map * heads; h < (map + 1) * heads; ++h)
      for (const isize at : fit.train_windows()) {
        const matrix P = seen(fit, attention(in, h, at, W));
        const matrix near =
            seen(fit, softmax(in.scale * queries(in, h, at, W) * (E.transpose() * keys(in, h, at, W)).transpose()));
        left += near.transpose() * near, right += near.transpose() * P;
      }
    left.diagonal().array() += 0.01 * left.trace() / static_cast<double>(slots);
    const matrix F = left.ldlt().solve(right).transpose();
    store(E, map, out.E);
    store(share == projection_sharing::key_value ? E : F, map, out.F);
  }
  return out;
}

}  // namespace calibrate
