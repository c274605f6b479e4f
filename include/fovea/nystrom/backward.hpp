// SPDX-License-Identifier: MIT
#pragma once
/// @file  nystrom_attention, backward: through both attention products by softmax's own backward, through the iteration step by step.
///
///   O = attention(Q, k~, z),  z = Z w,  w = attention(q~, K, V):   dZ = dz w^T,  dw = Z^T dz,  and back through each attention
///   one step  X = A Z,  Y1 = 7 I - X,  Y2 = 15 I - X Y1,  Y3 = 13 I - X Y2,  Z' = Z Y3 / 4   is undone from the last to the first
///
/// Contract   as backward of core/backward.hpp without lse; no gradient by skip. Z_0 is divided by the largest column sum: where two are
///            equal, its gradient is that of the first. Same bits for any number of threads.
/// Cost       two and a half times the forward; scratch H n (2 d + 2 e) + G m (d + e) + H (iterations + 1) l^2 numbers and what softmax needs.

#include <fovea/core/backward.hpp>
#include <fovea/nystrom/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Products of [l x l] matrices, in double.
template <class Arch>
struct square {
  isize l;
  void multiply(const double* a, const double* b, double* c, bool add = false) const {
    tile::gemm<Arch, double>(l, l, l, a, l, 1, b, l, c, l, add);
  }
  void multiply_turned_left(const double* a, const double* b, double* c) const {  // a^T b
    tile::gemm<Arch, double>(l, l, l, a, 1, l, b, l, c, l, false);
  }
  void multiply_turned_right(const double* a, const double* b, double* c, double* room) const {  // a b^T
    turn(b, room), multiply(a, room, c);
  }
  void turn(const double* a, double* to) const {
    for (isize i = 0; i < l; ++i)
      for (isize j = 0; j < l; ++j) to[j * l + i] = a[i * l + j];
  }
  void minus(double diagonal, const double* x, double* to) const {  // diagonal I - x
    for (isize i = 0; i < l * l; ++i) to[i] = -x[i];
    for (isize i = 0; i < l; ++i) to[i * l + i] += diagonal;
  }
  void subtract(double* x, const double* y) const {
    for (isize i = 0; i < l * l; ++i) x[i] -= y[i];
  }
};

/// dA of Z = the iteration of A, given dZ (which is used up); `room` holds (steps + 9) l^2 numbers.
template <class Arch>
void inverse_back(isize l, isize steps, const double* A, double* dZ, double* dA, double* room) {
  const square<Arch> s{l};
  const isize size = l * l;
  double *Z = room, *X = Z + (steps + 1) * size, *Y1 = X + size, *Y2 = Y1 + size, *Y3 = Y2 + size, *dX = Y3 + size,
         *dY = dX + size, *one = dY + size, *two = one + size;
  double most = 0;
  isize at = 0;
  for (isize j = 0; j < l; ++j) {
    double sum = 0;
    for (isize i = 0; i < l; ++i) sum += A[i * l + j];
    if (sum > most) most = sum, at = j;
  }
  const auto step = [&](const double* from, double* to) {
    s.multiply(A, from, X), s.minus(7, X, Y1);
    s.multiply(X, Y1, one), s.minus(15, one, Y2);
    s.multiply(X, Y2, one), s.minus(13, one, Y3);
    if (to == nullptr) return;
    s.multiply(from, Y3, to);
    for (isize i = 0; i < size; ++i) to[i] /= 4;
  };
  s.turn(A, Z);
  for (isize i = 0; i < size; ++i) Z[i] /= most;
  for (isize t = 0; t < steps; ++t) step(Z + t * size, Z + (t + 1) * size);
  std::fill_n(dA, size, 0.0);
  for (isize t = steps - 1; t >= 0; --t) {
    const double* from = Z + t * size;
    step(from, nullptr);
    for (isize i = 0; i < size; ++i) dZ[i] /= 4;
    s.multiply_turned_left(from, dZ, dY);      // dY3
    s.multiply_turned_right(dZ, Y3, dX, one);  // what stays of dZ
    std::copy_n(dX, size, dZ);
    s.multiply_turned_right(dY, Y2, dX, one);  // -dX so far
    s.multiply_turned_left(X, dY, two);        // -dY2
    for (isize i = 0; i < size; ++i) dY[i] = -two[i];
    s.multiply_turned_right(dY, Y1, two, one);
    for (isize i = 0; i < size; ++i) dX[i] += two[i];
    s.multiply_turned_left(X, dY, two);  // -dY1, which is dX
    for (isize i = 0; i < size; ++i) dX[i] = -dX[i] + two[i];
    s.turn(from, one), s.multiply(dX, one, dA, true);
    s.multiply_turned_left(A, dX, two);
    for (isize i = 0; i < size; ++i) dZ[i] += two[i];
  }
  double along = 0;
  for (isize i = 0; i < l; ++i)
    for (isize j = 0; j < l; ++j) along += dZ[j * l + i] * A[i * l + j], dA[i * l + j] += dZ[j * l + i] / most;
  for (isize i = 0; i < l; ++i) dA[i * l + at] -= along / (most * most);
}

template <class Acc>
class nystrom_backward_run : nystrom_run<Acc> {
  using Arch = simd::native;
  using base = nystrom_run<Acc>;
  using base::heads_, base::k_, base::l_, base::m_, base::q_, base::s_, base::v_, base::z_;

 public:
  nystrom_backward_run(arena& memory, const nystrom_attention& m, const shape& s, int threads)
      : base(memory, m, s, threads, true) {
    lse_ = memory.take<Acc>(heads_ * l_), lse_all_ = memory.take<Acc>(heads_ * s.n);
    dq_ = memory.take<Acc>(heads_ * s.n * s.d);
    dk_ = memory.take<Acc>(s.B * s.G * s.m * s.d), dv_ = memory.take<Acc>(s.B * s.G * s.m * s.e);
    dq_few_ = memory.take<Acc>(heads_ * l_ * s.d), dk_few_ = memory.take<Acc>(heads_ * l_ * s.d);
    by_A_ = memory.take<Acc>(heads_ * l_ * s.d);
    dz_ = memory.take<Acc>(heads_ * l_ * s.e), dw_ = memory.take<Acc>(heads_ * l_ * s.e);
    piece_of_ = (m.iterations + 11) * l_ * l_ + 4 * l_ * std::max(s.d, s.e);
    doubles_ = memory.take<double>(piece_of_ * threads);
  }

  void run(exec_ref exec, const backward_problem& p) const {
    const problem forward = p.forward();
    const tensor_mut lse = bhnd(lse_all_, s_.B, s_.H, s_.n, 1), few = bhnd(lse_, s_.B, s_.H, l_, 1);
    this->attend(exec, forward, this->all_rows(), few, lse);
    backward_problem inner = p;
    inner.out = this->all_rows(), inner.lse = lse;
    const tensor_mut dk = bhnd(dk_, s_.B, s_.G, s_.m, s_.d), dv = bhnd(dv_, s_.B, s_.G, s_.m, s_.e);
    inner.to = {.dq = bhnd(dq_, s_.B, s_.H, s_.n, s_.d), .dk = dk, .dv = dv};
    if (l_ > 0) {
      inner.k = this->over(k_, s_.d), inner.v = this->over(z_, s_.e);
      inner.to.dk = this->over(dk_few_, s_.d), inner.to.dv = this->over(dz_, s_.e);
    }
    this->softmax().backward(exec, inner, this->softmax_memory());
    if (l_ > 0) {
      exec.for_tasks(heads_, [&](isize head, isize slot) { middle(head, doubles_ + slot * piece_of_); });
      inner = p;
      inner.q = this->over(q_, s_.d), inner.out = this->over(v_, s_.e), inner.lse = few;
      inner.dout = this->over(dw_, s_.e), inner.to = {.dq = this->over(dq_few_, s_.d), .dk = dk, .dv = dv};
      this->softmax().backward(exec, inner, this->softmax_memory());
    }
    exec.for_tasks(heads_, [&](isize head, isize) { spread_queries(p, head); });
    exec.for_tasks(s_.B * s_.G, [&](isize head, isize) { spread_keys(p, head); });
  }

 private:
  static void widen(const Acc* from, isize count, double* to) {
    for (isize i = 0; i < count; ++i) to[i] = static_cast<double>(from[i]);
  }
  /// From dz to dw, and by way of Z and A to the landmarks.
  void middle(isize head, double* numbers) const {
    const isize size = l_ * l_, narrow = l_ * s_.e, d = s_.d;
    const double *A = base::kept_ + head * size, *Z = base::inverse_ + head * size;
    double *dZ = numbers, *dA = dZ + size, *x = dA + size, *y = x + l_ * std::max(d, s_.e),
           *turned = y + l_ * std::max(d, s_.e), *steps = turned + 2 * l_ * std::max(d, s_.e);
    widen(dz_ + head * narrow, narrow, x), widen(v_ + head * narrow, narrow, y);
    for (isize i = 0; i < l_; ++i)
      for (isize c = 0; c < s_.e; ++c) turned[c * l_ + i] = y[i * s_.e + c];
    tile::gemm<Arch, double>(l_, l_, s_.e, x, s_.e, 1, turned, l_, dZ, l_, false);
    tile::gemm<Arch, double>(l_, s_.e, l_, Z, 1, l_, x, s_.e, y, s_.e, false);
    for (isize i = 0; i < narrow; ++i) dw_[head * narrow + i] = static_cast<Acc>(y[i]);
    inverse_back<Arch>(l_, m_.iterations, A, dZ, dA, steps);
    for (isize i = 0; i < l_; ++i) {
      double along = 0;
      for (isize j = 0; j < l_; ++j) along += A[i * l_ + j] * dA[i * l_ + j];
      for (isize j = 0; j < l_; ++j) dA[i * l_ + j] = m_.scale_for(s_) * A[i * l_ + j] * (dA[i * l_ + j] - along);
    }
    widen(k_ + head * l_ * d, l_ * d, x);
    tile::gemm<Arch, double>(l_, d, l_, dA, l_, 1, x, d, y, d, false);
    for (isize i = 0; i < l_ * d; ++i) by_A_[head * l_ * d + i] = static_cast<Acc>(y[i]);
    widen(q_ + head * l_ * d, l_ * d, x);
    tile::gemm<Arch, double>(l_, d, l_, dA, 1, l_, x, d, y, d, false);
    for (isize i = 0; i < l_ * d; ++i) dk_few_[head * l_ * d + i] += static_cast<Acc>(y[i]);
  }

  /// Rows of a segment get its landmark's gradient in equal parts.
  template <class Each>
  void segments(isize length, Each&& each) const {
    for (isize s = 0; s < l_; ++s) {
      const isize first = s * length / l_, last = (s + 1) * length / l_;
      for (isize i = first; i < last; ++i) each(i, s, Acc(1) / static_cast<Acc>(last - first));
    }
  }
  void spread_queries(const backward_problem& p, isize head) const {
    if (!p.to.dq) return;
    const isize d = s_.d;
    Acc* dq = dq_ + head * s_.n * d;
    segments(s_.n, [&](isize i, isize s, Acc share) {
      const Acc *one = dq_few_ + (head * l_ + s) * d, *two = by_A_ + (head * l_ + s) * d;
      for (isize c = 0; c < d; ++c) dq[i * d + c] += share * (one[c] + two[c]);
    });
    for (isize i = 0; i < s_.n; ++i)
      simd::store_row<Arch, Acc>(p.to.dq.type, dq + i * d, d, p.to.dq.row(head / s_.H, head % s_.H, i));
  }
  void spread_keys(const backward_problem& p, isize kv) const {
    const isize b = kv / s_.G, g = kv % s_.G, d = s_.d, e = s_.e, group = s_.group(), taps = m_.skip.width;
    Acc *dk = dk_ + kv * s_.m * d, *dv = dv_ + kv * s_.m * e;
    for (isize h = g * group; h < (g + 1) * group; ++h) {
      segments(s_.m, [&](isize j, isize s, Acc share) {
        const Acc* few = dk_few_ + ((b * s_.H + h) * l_ + s) * d;
        for (isize c = 0; c < d; ++c) dk[j * d + c] += share * few[c];
      });
      for (isize i = 0; this->skips() && p.to.dv && i < s_.n; ++i) {
        Acc* row = base::wide_ + ((b * s_.H + h) * s_.n + i) * e;  // no longer needed
        simd::load_row<Arch, Acc>(p.dout.type, p.dout.row(b, h, i), e, row);
        for (isize t = 0; t < taps; ++t) {
          const isize j = i + t - taps / 2;
          if (j < 0 || j >= s_.m) continue;
          const Acc w = static_cast<Acc>(m_.skip(0, m_.skip.heads == 1 ? 0 : h, 0, t));
          for (isize c = 0; c < e; ++c) dv[j * e + c] += w * row[c];
        }
      }
    }
    for (isize j = 0; j < s_.m; ++j) {
      if (p.to.dk) simd::store_row<Arch, Acc>(p.to.dk.type, dk + j * d, d, p.to.dk.row(b, g, j));
      if (p.to.dv) simd::store_row<Arch, Acc>(p.to.dv.type, dv + j * e, e, p.to.dv.row(b, g, j));
    }
  }

  isize piece_of_;
  Acc *lse_, *lse_all_, *dq_, *dk_, *dv_;      // lse_: of the landmark queries
  Acc *dq_few_, *dk_few_, *by_A_, *dz_, *dw_;  // of the landmarks; by_A_: of landmark queries, by way of A
  double* doubles_;
};

template <class Acc>
void nystrom_backward(const nystrom_attention& m, exec_ref exec, const backward_problem& p, arena memory) {
  const shape s = p.shape();
  if (!m.padded()) return nystrom_backward_run<Acc>(memory, m, s, exec.concurrency()).run(exec, p);
  for (isize b = 0; b < s.B; ++b) {
    const shape one = m.item(s, b);
    backward_problem item = p;
    item.q = item_of(p.q, b, one.n), item.k = item_of(p.k, b, one.m), item.v = item_of(p.v, b, one.m);
    item.out = item_of(p.out, b, one.n), item.dout = item_of(p.dout, b, one.n);
    item.to = {.dq = item_of(p.to.dq, b, one.n), .dk = item_of(p.to.dk, b, one.m), .dv = item_of(p.to.dv, b, one.m)};
    arena own = memory;
    const bool any = one.n > 0;
    if (any) nystrom_backward_run<Acc>(own, m, one, exec.concurrency()).run(exec, item);
    clear_rows(p.to.dq, b, one.n), clear_rows(p.to.dk, b, any ? one.m : 0), clear_rows(p.to.dv, b, any ? one.m : 0);
  }
}

}  // namespace detail

inline void nystrom_attention::check(const backward_problem& p) const {
  check(p.forward());
  const gradients& to = p.to;
  require(to.dE == nullptr && to.dF == nullptr && to.dbias == nullptr && to.dsinks == nullptr &&
              to.dlog_weight == nullptr && to.dquery_gate == nullptr && !to.of_a_recurrence() && !p.from.given() &&
              !p.dS_end && !p.dz_end,
          "a gradient other than dq, dk and dv was asked for, or a state was given; this mechanism has none");
  detail::check_gradients(p);
}

inline std::size_t nystrom_attention::workspace_size_backward(const shape& s, int threads) const {
  return detail::most_of_items(*this, s, [&](const shape& x) {
    arena measure;
    s.type == dtype::f64 ? (void)detail::nystrom_backward_run<double>(measure, *this, x, threads)
                         : (void)detail::nystrom_backward_run<float>(measure, *this, x, threads);
    return measure.bytes();
  });
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void nystrom_attention::backward(exec_ref exec, const backward_problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? detail::nystrom_backward<double>(*this, exec, p, scratch)
                         : detail::nystrom_backward<float>(*this, exec, p, scratch);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
