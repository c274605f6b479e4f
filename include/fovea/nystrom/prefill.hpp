// SPDX-License-Identifier: MIT
#pragma once
/// @file  nystrom_attention: landmarks, exact attention of the landmark queries, the pseudo-inverse, exact attention over landmark keys.
///        Items with padding are calls of their own, one after the other.

#include <algorithm>
#include <cstring>
#include <limits>

#include <fovea/core/absorb.hpp>
#include <fovea/kernel/project_sequence.hpp>
#include <fovea/nystrom/mechanism.hpp>
#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Z ~ pinv(A), A [l x l] row-stochastic; `room` holds 3 l^2 numbers.
template <class Arch>
void iterate_inverse(isize l, isize iterations, const double* A, double* Z, double* room) {
  double *product = room, *inner = room + l * l, *next = room + 2 * l * l;
  double most = 0;
  for (isize j = 0; j < l; ++j) {
    double sum = 0;
    for (isize i = 0; i < l; ++i) sum += A[i * l + j];
    most = sum > most || !(sum == sum) ? sum : most;  // NaN goes through
  }
  for (isize i = 0; i < l; ++i)
    for (isize j = 0; j < l; ++j) Z[j * l + i] = A[i * l + j] / most;
  const auto minus = [l](double diagonal, double* x) {  // x = diagonal I - x
    for (isize i = 0; i < l * l; ++i) x[i] = -x[i];
    for (isize i = 0; i < l; ++i) x[i * l + i] += diagonal;
  };
  const auto multiply = [l](const double* a, const double* b, double* c) {
    tile::gemm<Arch, double>(l, l, l, a, l, 1, b, l, c, l, false);
  };
  for (isize x = 0; x < iterations; ++x) {
    multiply(A, Z, product);
    std::copy_n(product, l * l, inner);
    minus(7, inner);
    multiply(product, inner, next), minus(15, next);
    multiply(product, next, inner), minus(13, inner);
    multiply(Z, inner, next);
    for (isize i = 0; i < l * l; ++i) Z[i] = next[i] / 4;
  }
}

template <class Acc>
class nystrom_run {
  using Arch = simd::native;
  using projector = kernel::sequence_projector<Arch, double>;
  static constexpr isize stretch = 64;  // rows of a task of the convolution

 public:
  /// `keeps`: for backward, which needs A and the outputs before the convolution.
  nystrom_run(arena& memory, const nystrom_attention& m, const shape& s, int threads, bool keeps = false)
      : m_(m), s_(s), l_(m.used(s)), heads_(s.B * s.H) {
    q_ = memory.take<Acc>(heads_ * l_ * s.d), k_ = memory.take<Acc>(heads_ * l_ * s.d);
    v_ = memory.take<Acc>(heads_ * l_ * s.e), z_ = memory.take<Acc>(heads_ * l_ * s.e);
    inverse_ = memory.take<double>(heads_ * l_ * l_), kept_ = memory.take<double>(keeps ? heads_ * l_ * l_ : 0);
    if (!keeps) kept_ = nullptr;
    wide_ = memory.take<Acc>(keeps || skips() ? heads_ * s.n * s.e : 0);
    arena one;
    lay_out(one);
    piece_ = round_up(one.bytes(), alignment);
    pieces_ = memory.take<std::byte>(static_cast<isize>(piece_) * threads);
    const auto softmax_needs = [&](const shape& x) {
      const std::size_t bytes = softmax().workspace_size(x, threads);
      return keeps ? std::max(bytes, softmax().workspace_size_backward(x, threads)) : bytes;
    };
    softmax_bytes_ = l_ == 0 ? softmax_needs(s) : std::max(softmax_needs(summary()), softmax_needs(answer()));
    softmax_ = memory.take<std::byte>(static_cast<isize>(softmax_bytes_));
  }

  void run(exec_ref exec, const problem& p) const {
    // With a convolution the sum is rounded once, at its end.
    attend(exec, p, skips() ? all_rows() : p.out, {}, {});
    if (!skips()) return;
    const isize blocks = ceil_div(s_.n, stretch);
    exec.for_tasks(heads_ * blocks,
                   [&](isize task, isize slot) { convolve(p, task / blocks, task % blocks * stretch, piece(slot)); });
  }

 protected:
  bool skips() const { return m_.skip.data != nullptr; }
  tensor_mut all_rows() const { return bhnd(wide_, s_.B, s_.H, s_.n, s_.e); }
  /// Everything but the convolution; the log-sum-exps of the two products where they are asked for.
  void attend(exec_ref exec, const problem& p, const tensor_mut& out, const tensor_mut& summary_lse,
              const tensor_mut& answer_lse) const {
    problem inner = p;
    if (l_ == 0) {
      inner.out = out, inner.lse = answer_lse;
      return softmax().prefill(exec, inner, softmax_memory());
    }
    exec.for_tasks(heads_, [&](isize head, isize slot) { average(p, head, piece(slot)); });
    inner.q = over(q_, s_.d), inner.out = over(v_, s_.e), inner.lse = summary_lse;
    softmax().prefill(exec, inner, softmax_memory());
    exec.for_tasks(heads_, [&](isize head, isize slot) { weigh(head, piece(slot)); });
    inner.q = p.q, inner.k = over(k_, s_.d), inner.v = over(z_, s_.e), inner.out = out, inner.lse = answer_lse;
    softmax().prefill(exec, inner, softmax_memory());
  }

  struct room {
    projector means;
    double *q, *k, *A, *products, *wide;
    Acc *row, *sum;
  };
  room lay_out(arena& a) const {
    const isize most = std::max(s_.d, s_.e);
    return {
        projector(a, s_.d),          a.take<double>(l_ * s_.d),     a.take<double>(l_ * s_.d), a.take<double>(l_ * l_),
        a.take<double>(3 * l_ * l_), a.take<double>(2 * l_ * s_.e), a.take<Acc>(most),         a.take<Acc>(most)};
  }
  arena piece(isize slot) const {
    return arena(std::span<std::byte>(pieces_ + static_cast<std::size_t>(slot) * piece_, piece_));
  }
  arena softmax_memory() const { return arena(std::span<std::byte>(softmax_, softmax_bytes_)); }
  softmax_attention softmax() const { return {.mask = no_mask{}, .scale = m_.scale_for(s_)}; }
  tensor_mut over(Acc* data, isize width) const { return bhnd(data, s_.B, s_.H, l_, width); }
  shape summary() const {  // landmark queries over all keys
    shape x = s_;
    x.n = l_;
    return x;
  }
  shape answer() const {  // all queries over landmark keys, which every query head has of its own
    shape x = s_;
    x.m = l_, x.G = s_.H;
    return x;
  }

  /// Landmarks of a head, and Z [l x l].
  void average(const problem& p, isize head, arena memory) const {
    room r = lay_out(memory);
    const isize b = head / s_.H, h = head % s_.H;
    const kernel::projection means{sequence_projection::mean, l_, nullptr, 0};
    const auto into = [&](const tensor_ref& x, isize of, double* wide, Acc* to) {
      projector::clear(means, s_.d, 0, l_, wide);
      r.means.absorb(means, x.row(b, of, 0), x.type, x.row_stride, 0, x.length, x.length, s_.d, 0, l_, wide);
      for (isize i = 0; i < l_ * s_.d; ++i) to[i] = static_cast<Acc>(wide[i]);
    };
    into(p.q, h, r.q, q_ + head * l_ * s_.d);
    into(p.k, h / s_.group(), r.k, k_ + head * l_ * s_.d);
    const double scale = m_.scale_for(s_);
    for (isize i = 0; i < l_; ++i) {
      double *row = r.A + i * l_, top = -std::numeric_limits<double>::infinity(), sum = 0;
      for (isize j = 0; j < l_; ++j) {
        double score = 0;
        for (isize c = 0; c < s_.d; ++c) score += r.q[i * s_.d + c] * r.k[j * s_.d + c];
        row[j] = score * scale, top = std::max(top, row[j]);
      }
      for (isize j = 0; j < l_; ++j) row[j] = std::exp(row[j] - top), sum += row[j];
      for (isize j = 0; j < l_; ++j) row[j] /= sum;
    }
    if (kept_ != nullptr) std::copy_n(r.A, l_ * l_, kept_ + head * l_ * l_);
    iterate_inverse<Arch>(l_, m_.iterations, r.A, inverse_ + head * l_ * l_, r.products);
  }

  /// z = Z v of a head.
  void weigh(isize head, arena memory) const {
    const room r = lay_out(memory);
    const isize count = l_ * s_.e;
    double* product = r.wide + count;
    for (isize i = 0; i < count; ++i) r.wide[i] = static_cast<double>(v_[head * count + i]);
    tile::gemm<Arch, double>(l_, s_.e, l_, inverse_ + head * l_ * l_, l_, 1, r.wide, s_.e, product, s_.e, false);
    for (isize i = 0; i < count; ++i) z_[head * count + i] = static_cast<Acc>(product[i]);
  }

  /// out_i += sum_t w_t v_(i + t - taps / 2), rows [first, first + stretch) of a head.
  void convolve(const problem& p, isize head, isize first, arena memory) const {
    const room r = lay_out(memory);
    const isize b = head / s_.H, h = head % s_.H, taps = m_.skip.width, last = std::min(first + stretch, s_.n);
    for (isize i = first; i < last; ++i) {
      std::copy_n(wide_ + (head * s_.n + i) * s_.e, s_.e, r.sum);
      for (isize t = 0; t < taps; ++t) {
        const isize j = i + t - taps / 2;
        if (j < 0 || j >= s_.m) continue;
        const Acc* v = simd::row_as<Arch, Acc>(p.v.type, p.v.row(b, h / s_.group(), j), s_.e, r.row);
        const Acc w = static_cast<Acc>(m_.skip(0, m_.skip.heads == 1 ? 0 : h, 0, t));
        for (isize c = 0; c < s_.e; ++c) r.sum[c] += w * v[c];
      }
      simd::store_row<Arch, Acc>(p.out.type, r.sum, s_.e, p.out.row(b, h, i));
    }
  }

  nystrom_attention m_;
  shape s_;
  isize l_, heads_;
  Acc *q_, *k_, *v_, *z_;    // landmarks; exact outputs of the landmark queries; the same times Z
  double *inverse_, *kept_;  // Z; A
  Acc* wide_;                // outputs before the convolution is added
  std::byte *pieces_, *softmax_;
  std::size_t piece_, softmax_bytes_;
};

/// Rows from `first` on of item b.
inline void clear_rows(const tensor_mut& x, isize b, isize first) {
  for (isize h = 0; x && h < x.heads; ++h)
    for (isize i = first; i < x.length; ++i)
      std::memset(x.row(b, h, i), 0, static_cast<std::size_t>(x.width) * size_of(x.type));
}
/// The first rows of item b.
template <class View>
View item_of(const View& x, isize b, isize rows) {
  return x ? x.part(b, 0, x.heads).slice(0, rows) : x;
}

template <class Acc>
void nystrom_prefill(const nystrom_attention& m, exec_ref exec, const problem& p, arena memory) {
  const shape s = p.shape();
  if (!m.padded()) return nystrom_run<Acc>(memory, m, s, exec.concurrency()).run(exec, p);
  for (isize b = 0; b < s.B; ++b) {
    const shape one = m.item(s, b);
    problem item = p;
    item.q = item_of(p.q, b, one.n), item.out = item_of(p.out, b, one.n);
    item.k = item_of(p.k, b, one.m), item.v = item_of(p.v, b, one.m);
    arena own = memory;
    if (one.n > 0) nystrom_run<Acc>(own, m, one, exec.concurrency()).run(exec, item);
    clear_rows(p.out, b, one.n);
  }
}

/// `bytes(shape)`, or the most of any item.
template <class Bytes>
std::size_t most_of_items(const nystrom_attention& m, const shape& s, Bytes&& bytes) {
  if (!m.padded()) return bytes(s);
  std::size_t most = 0;
  for (isize b = 0; b < s.B; ++b) most = std::max(most, bytes(m.item(s, b)));
  return most;
}

}  // namespace detail

inline void nystrom_attention::check_settings() const {
  if (scale) {
    require_finite("scale", *scale);
    require(*scale > 0, "scale is ", *scale, "; it must be positive");
  }
  require(landmarks >= 1, "landmarks is ", landmarks, "; wanted at least 1");
  require(iterations >= 1 && iterations <= 64, "iterations is ", iterations, "; wanted 1 to 64");
  if (skip.width == 0 && skip.data == nullptr) return;
  require(skip.data != nullptr && skip.batch == 1 && skip.length == 1 && skip.heads >= 1, "skip is [", skip.batch, ", ",
          skip.heads, ", ", skip.length, ", ", skip.width, "]; wanted [1, 1 or H, 1, taps]");
  require(skip.width % 2 == 1, "skip has ", skip.width, " taps; wanted an odd number, the middle one of the own row");
}

inline void nystrom_attention::check(const problem& p) const {
  detail::check_problem(p);
  check_settings();
  detail::check_lengths(lengths, p.q.batch, p.k.length);
  require(query_lengths.empty() || static_cast<isize>(query_lengths.size()) == p.q.batch, "query_lengths has ",
          query_lengths.size(), " entries; wanted one for each of ", p.q.batch, " batch items");
  for (std::size_t b = 0; b < query_lengths.size(); ++b)
    require(query_lengths[b] >= 0 && query_lengths[b] <= p.q.length, "query_lengths[", b, "] is ", query_lengths[b],
            "; wanted 0 to n = ", p.q.length);
  require(!p.lse, "lse was given; the weights of Nystrom attention may be negative and have no log-sum-exp");
  if (skip.data == nullptr) return;
  require(skip.heads == 1 || skip.heads == p.q.heads, "skip has ", skip.heads, " heads and q has ", p.q.heads,
          "; wanted one, or as many");
  require(p.q.length == p.k.length, "q has ", p.q.length, " rows and k has ", p.k.length,
          "; the convolution of skip wants as many of each");
}

inline std::size_t nystrom_attention::workspace_size(const shape& s, int threads) const {
  return detail::most_of_items(*this, s, [&](const shape& x) {
    arena measure;
    s.type == dtype::f64 ? (void)detail::nystrom_run<double>(measure, *this, x, threads)
                         : (void)detail::nystrom_run<float>(measure, *this, x, threads);
    return measure.bytes();
  });
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void nystrom_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? detail::nystrom_prefill<double>(*this, exec, p, scratch)
                         : detail::nystrom_prefill<float>(*this, exec, p, scratch);
}
#endif

inline double nystrom_attention::macs(const shape& s) const {
  if (padded()) {
    nystrom_attention full = *this;
    full.lengths = {}, full.query_lengths = {};
    double sum = 0;
    for (isize b = 0; b < s.B; ++b) sum += full.macs(item(s, b));
    return sum;
  }
  const double l = static_cast<double>(used(s)), heads = static_cast<double>(s.B * s.H), n = static_cast<double>(s.n),
               m = static_cast<double>(s.m), width = static_cast<double>(s.d + s.e);
  const double convolution = heads * n * static_cast<double>(skip.width * s.e);
  if (l == 0) return heads * n * m * width + convolution;
  return heads * ((n + m) * l * width + l * l * (static_cast<double>(4 * iterations) * l + width)) + convolution;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
