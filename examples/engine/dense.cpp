// SPDX-License-Identifier: MIT
#include "dense.hpp"

#include <cmath>

#define EIGEN_DONT_PARALLELIZE  // threads come from the engine's pool
#include <Eigen/Core>

#include <fovea/core/workspace.hpp>
#include <fovea/simd/convert.hpp>
#include <fovea/tile/unroll.hpp>

namespace engine {
namespace {

using A = fovea::simd::native;
using P = fovea::simd::pack<float, A>;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Rows = Eigen::Map<const Matrix, 0, Eigen::OuterStride<>>;
using RowsOut = Eigen::Map<Matrix, 0, Eigen::OuterStride<>>;

constexpr isize few_rows = 8;        // up to here W is read as it is stored
constexpr isize few_panel = 64;      // rows of W a task of a few rows
constexpr isize panel = 192;         // rows of W a task of many rows: 440 KB of floats at width 576, 77 % of the peak
constexpr isize ahead_bytes = 1024;  // of a row of W, asked for before it is needed

/// y[i * rows_of_y + r] = w_r . x_i for N rows x and R rows w_r = w + r * stride. The rows of W are far apart on purpose: several
/// streams keep the memory busy where one waits at each page (13.9 against 11.2 GB/s here).
template <int N, int R, class S>
void dot_rows(const S* w, isize stride, isize columns, const float* x, float* y, isize y_stride) {
  namespace tile = fovea::tile;
  constexpr int U = 2;  // chains of each sum
  P sum[R][N][U];
  tile::unroll<R * N * U>([&](auto i) FOVEA_INLINE_LAMBDA { sum[i / (N * U)][i / U % N][i % U] = P(0.0F); });
  isize c = 0;
  for (; c + U * P::size <= columns; c += U * P::size)
    tile::unroll<R>([&](auto r) FOVEA_INLINE_LAMBDA {
      const S* from = w + r * stride + c;
      for (isize b = 0; b < U * P::size * static_cast<isize>(sizeof(S)); b += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead_bytes + b);
      tile::unroll<U>([&](auto u) FOVEA_INLINE_LAMBDA {
        const P a = fovea::simd::load_as<P>(from + u * P::size);
        tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA {
          sum[r][i][u] = fovea::simd::fma(a, P::load(x + i * columns + c + u * P::size), sum[r][i][u]);
        });
      });
    });
  for (; c < columns; c += P::size) {
    const isize count = columns - c < P::size ? columns - c : P::size;
    tile::unroll<R>([&](auto r) FOVEA_INLINE_LAMBDA {
      const P a = fovea::simd::load_as_n<P>(w + r * stride + c, count);
      tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA {
        sum[r][i][0] = fovea::simd::fma(a, fovea::simd::load_n<P>(x + i * columns + c, count), sum[r][i][0]);
      });
    });
  }
  tile::unroll<R * N>([&](auto z) FOVEA_INLINE_LAMBDA {
    constexpr int r = z / N, i = z % N;
    y[i * y_stride + r] = fovea::simd::reduce_add(sum[r][i][0] + sum[r][i][1]);
  });
}

/// Rows [first, last) of W against N rows of x.
template <int N, class S>
void multiply_few(const float* x, const product& p, isize first, isize last) {
  constexpr int R = N <= 2 ? 4 : 2;
  const isize columns = p.w->columns, stride = (last - first) / R;
  const auto put = [&](isize j, isize i, float y) {
    float& to = p.out[i * p.w->rows + j];
    to = p.add ? to + y : y;
  };
  float y[N * R];
  for (isize j = first; j < first + stride; ++j) {
    dot_rows<N, R>(static_cast<const S*>(p.w->row(j)), stride * columns, columns, x, y, R);
    for (isize z = 0; z < N * R; ++z) put(j + z % R * stride, z / R, y[z]);
  }
  for (isize j = first + R * stride; j < last; ++j) {
    dot_rows<N, 1>(static_cast<const S*>(p.w->row(j)), 0, columns, x, y, 1);
    for (isize i = 0; i < N; ++i) put(j, i, y[i]);
  }
}

template <class S>
void multiply_few(const float* x, isize rows, product p, isize first, isize last) {
  for (isize r = 0; r < rows; r += 4) {
    fovea::tile::with_constant<4>(rows - r < 4 ? rows - r : 4, [&](auto N) {
      multiply_few<decltype(N)::value, S>(x + r * p.w->columns, p, first, last);
    });
    p.out += 4 * p.w->rows;
  }
}

void multiply_many(const float* x, isize rows, const product& p, isize first, isize last, float* scratch) {
  const isize columns = p.w->columns, count = last - first;
  const float* w = static_cast<const float*>(p.w->row(first));
  if (p.w->type != fovea::dtype::f32) {
    for (isize j = 0; j < count; ++j) widen_row(*p.w, first + j, scratch + j * columns);
    w = scratch;
  }
  const Rows X(x, rows, columns, Eigen::OuterStride<>(columns)), W(w, count, columns, Eigen::OuterStride<>(columns));
  RowsOut out(p.out + first, rows, count, Eigen::OuterStride<>(p.w->rows));
  if (p.add)
    out.noalias() += X * W.transpose();
  else
    out.noalias() = X * W.transpose();
}

}  // namespace

void widen_row(const matrix& w, isize row, float* out) {
  fovea::simd::load_row<A, float>(w.type, w.row(row), w.columns, out);
}

void multiply(fovea::exec_ref exec, const float* x, isize rows, std::span<const product> products) {
  const bool few = rows <= few_rows;
  const isize height = few ? few_panel : panel;
  isize tasks = 0, columns = 0;
  for (const product& p : products) tasks += fovea::ceil_div(p.w->rows, height), columns = p.w->columns;
  const isize slots = std::min<isize>(exec.concurrency(), tasks);
  std::vector<float> scratch(few ? 0 : static_cast<std::size_t>(slots * panel * columns));
  exec.for_tasks(tasks, [&](isize task, isize slot) {
    const product* p = products.data();
    for (; task >= fovea::ceil_div(p->w->rows, height); ++p) task -= fovea::ceil_div(p->w->rows, height);
    const isize first = task * height, last = std::min(first + height, p->w->rows);
    if (!few) return multiply_many(x, rows, *p, first, last, scratch.data() + slot * panel * columns);
    switch (p->w->type) {
      case fovea::dtype::f16: return multiply_few<fovea::f16>(x, rows, *p, first, last);
      case fovea::dtype::bf16: return multiply_few<fovea::bf16>(x, rows, *p, first, last);
      default: return multiply_few<float>(x, rows, *p, first, last);
    }
  });
}

namespace {
/// f(first, count) over rows, in tasks of about 16 K numbers; a few rows stay on the calling thread.
template <class F>
void by_rows(fovea::exec_ref exec, isize rows, isize width, const F& f) {
  const isize block = std::max<isize>(1, 16384 / width);
  exec.for_tasks(fovea::ceil_div(rows, block),
                 [&](isize t, isize) { f(t * block, std::min(block, rows - t * block)); });
}
}  // namespace

void rms_norm(fovea::exec_ref exec, const float* x, isize rows, const std::vector<float>& weight, double eps,
              float* out) {
  using Row = Eigen::Map<const Eigen::ArrayXf>;
  const auto width = static_cast<isize>(weight.size());
  const Row w(weight.data(), width);
  by_rows(exec, rows, width, [&](isize first, isize count) {
    for (isize i = first; i < first + count; ++i) {
      const Row from(x + i * width, width);
      const double mean = static_cast<double>(from.square().sum()) / static_cast<double>(width);
      const auto scale = static_cast<float>(1.0 / std::sqrt(mean + eps));
      Eigen::Map<Eigen::ArrayXf>(out + i * width, width) = from * scale * w;
    }
  });
}

void swiglu(fovea::exec_ref exec, float* gate, const float* up, isize rows, isize width) {
  by_rows(exec, rows, width, [&](isize first, isize count) {
    Eigen::Map<Eigen::ArrayXf> g(gate + first * width, count * width);
    const Eigen::Map<const Eigen::ArrayXf> u(up + first * width, count * width);
    g = g / (1.0F + (-g).exp()) * u;
  });
}

double log_sum_exp(std::span<const float> x) {
  using Row = Eigen::Map<const Eigen::ArrayXf>;
  const auto size = static_cast<isize>(x.size());
  const float top = Row(x.data(), size).maxCoeff();
  double sum = 0;
  for (isize i = 0; i < size; i += 1024)
    sum += static_cast<double>((Row(x.data() + i, std::min<isize>(1024, size - i)) - top).exp().sum());
  return static_cast<double>(top) + std::log(sum);
}

}  // namespace engine
