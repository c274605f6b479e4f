// SPDX-License-Identifier: MIT
#pragma once
/// @file  efficient_attention and kfree_reconstruction, backward: products of the same shapes as forward, the other way round.
///
///   o_i = p_i C,   C = g(W^T V):   dC = sum_i p_i^T do_i,   dp_i = do_i C^T,   dv_j = w_j dM,   dw_j = v_j dM^T
///   softmax over positions   dk_jc = w_jc (dw_jc - C_c . dC_c): the sum over positions is a product of two rows of the context
///
/// Contract   as backward of core/backward.hpp without lse. Keys behind an item's length get zeros. Same bits for any number of threads.
/// Cost       G m 4 d e + H n 2 d e multiply-adds an item and the contexts anew; scratch independent of n and m. Causal: efficient/
///            backward_causal.hpp.       Reference  efficient/reference_backward.hpp.

#include <fovea/core/backward.hpp>
#include <fovea/efficient/backward_causal.hpp>
#include <fovea/efficient/kfree.hpp>
#include <fovea/kernel/linear_backward_pairs.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Where the gradients of the three roles of a channel_plan go.
struct channel_gradients {
  tensor_ref dout;
  tensor_mut left, right, query;
};

template <class Acc>
class channel_backward {
  using Arch = simd::native;
  using states = kernel::channel_state<Acc>;
  static constexpr isize rows = 64;

 public:
  channel_backward(arena& memory, isize d, isize e, isize B, isize contexts, isize length, int threads)
      : forward_(memory, d, e, B, contexts, length, threads), d_(d), e_(e) {
    const isize size = B * contexts * d * e;
    slope_ = memory.take<Acc>(size), turned_ = memory.take<Acc>(size), slope_turned_ = memory.take<Acc>(size);
    along_ = memory.take<Acc>(B * contexts * d);
    piece_ = rows * 3 * std::max(d, e);
    pieces_ = memory.take<Acc>(piece_ * threads);
  }

  void run(exec_ref exec, const channel_plan& p, const channel_gradients& to) const {
    forward_.contexts_of(exec, p);
    const isize heads = forward_.B * forward_.contexts;
    exec.for_tasks(heads, [&](isize head, isize slot) { context_back(p, to.dout, head, pieces_ + slot * piece_); });
    const auto blocks_of = [&](const tensor_mut& g, auto&& one) {
      if (!g) return;
      const isize blocks = ceil_div(g.length, rows);
      exec.for_tasks(g.batch * g.heads * blocks, [&](isize task, isize slot) {
        const isize i0 = task % blocks * rows, count = std::min(rows, g.length - i0);
        one(task / blocks / g.heads, task / blocks % g.heads, i0, count, pieces_ + slot * piece_);
      });
    };
    blocks_of(to.query, [&](auto... x) { query_back(p, to, x...); });
    blocks_of(to.left, [&](auto... x) { left_back(p, to, x...); });
    blocks_of(to.right, [&](auto... x) { right_back(p, to, x...); });
  }

 private:
  const Acc* context(isize b, isize c) const { return forward_.context + (b * forward_.contexts + c) * d_ * e_; }
  isize at(isize b, isize c) const { return (b * forward_.contexts + c) * d_ * e_; }
  static void load(const tensor_ref& x, isize b, isize h, isize first, isize count, Acc* to) {
    for (isize i = 0; i < count; ++i)
      simd::load_row<Arch, Acc>(x.type, x.row(b, h, first + i), x.width, to + i * x.width);
  }
  static void store(const tensor_mut& x, isize b, isize h, isize first, isize count, const Acc* from) {
    for (isize i = 0; i < count; ++i)
      simd::store_row<Arch, Acc>(x.type, from + i * x.width, x.width, x.row(b, h, first + i));
  }
  void features(const channel_plan& p, isize b, isize qh, isize first, isize count, Acc* to) const {
    kernel::feature_rows<Arch, Acc>({p.query.row(b, qh, first), p.query.type, p.query.row_stride}, count, d_,
                                    p.query_scale, p.feature_softmax, to);
  }
  /// w_j: what the context is a sum of, complete with its divisor where that is the channel's own.
  void weights(const channel_plan& p, isize b, isize c, isize first, isize count, Acc* to) const {
    load(p.left.t, b, c / p.left.share, first, count, to);
    if (!p.exponential) return;
    const states s = states::at(forward_.part(b * forward_.contexts + c, 0), d_, e_);
    using P = simd::pack<Acc, Arch>;
    const P to_log2(kernel::detail::log2_of_e<Acc>), zero(Acc(0)), one(Acc(1));
    for (isize x = 0; x < d_; x += P::size) {
      const isize left = d_ - x;
      const P shift = simd::max(simd::load_n<P>(s.top + x, left), P(kernel::detail::lowest<Acc>)),
              sum = simd::load_n<P>(s.sum + x, left), inverse = simd::select_greater(sum, zero, one / sum, sum * zero);
      for (Acc* row = to + x; row < to + x + count * d_; row += d_)
        simd::store_n(row, simd::exp2((simd::load_n<P>(row, left) - shift) * to_log2) * inverse, left);
    }
  }

  /// dC of a context, then dM, both and C turned.
  void context_back(const channel_plan& p, const tensor_ref& dout, isize head, Acc* room) const {
    const isize b = head / forward_.contexts, c = head % forward_.contexts, length = p.keys_of(b);
    Acc *features_of = room, *gradient = room + rows * std::max(d_, e_), *dC = slope_ + head * d_ * e_;
    std::fill_n(dC, d_ * e_, Acc(0));
    for (isize h = c * p.context_share; h < (c + 1) * p.context_share; ++h)
      for (isize i = 0; i < dout.length; i += rows) {
        const isize count = std::min(rows, dout.length - i);
        features(p, b, h / p.query_share, i, count, features_of), load(dout, b, h, i, count, gradient);
        tile::gemm<Arch, Acc>(d_, e_, count, features_of, 1, d_, gradient, e_, dC, e_, true);
      }
    const Acc* C = context(b, c);
    const Acc factor = static_cast<Acc>(length == 0 ? 0.0
                                        : p.mean    ? p.context_scale / static_cast<double>(length)
                                                    : p.context_scale);
    for (isize x = 0; x < d_; ++x) {
      Acc along = 0;
      for (isize y = 0; y < e_; ++y) along += C[x * e_ + y] * dC[x * e_ + y];
      along_[head * d_ + x] = along;
      for (isize y = 0; y < e_; ++y) {
        Acc& z = dC[x * e_ + y];
        z = p.context_softmax ? factor * C[x * e_ + y] * (z - along) : factor * z;
      }
    }
    using pairs = kernel::chunk_pairs<Arch, Acc>;
    pairs::turn(C, d_, e_, e_, turned_ + head * d_ * e_, d_);
    pairs::turn(dC, d_, e_, e_, slope_turned_ + head * d_ * e_, d_);
  }

  void query_back(const channel_plan& p, const channel_gradients& to, isize b, isize qh, isize i0, isize count,
                  Acc* room) const {
    Acc *gradient = room, *dp = room + rows * std::max(d_, e_), *w = dp + rows * std::max(d_, e_);
    for (isize x = 0; x < p.query_share; ++x) {
      const isize h = qh * p.query_share + x;
      load(to.dout, b, h, i0, count, gradient);
      tile::gemm<Arch, Acc>(count, d_, e_, gradient, e_, 1, turned_ + at(b, h / p.context_share), d_, dp, d_, x > 0);
    }
    const Acc scale = static_cast<Acc>(p.query_scale);
    if (p.feature_softmax) features(p, b, qh, i0, count, w);
    for (isize i = 0; i < count; ++i) {
      Acc along = 0, *row = dp + i * d_;
      for (isize c = 0; p.feature_softmax && c < d_; ++c) along += w[i * d_ + c] * row[c];
      for (isize c = 0; c < d_; ++c) row[c] = scale * (p.feature_softmax ? w[i * d_ + c] * (row[c] - along) : row[c]);
    }
    store(to.query, b, qh, i0, count, dp);
  }

  /// Rows of `left` and `right` that a context has seen; the others have no gradient.
  isize seen(const channel_plan& p, isize b, isize i0, isize count) const {
    return std::clamp(p.keys_of(b) - i0, isize{0}, count);
  }
  void left_back(const channel_plan& p, const channel_gradients& to, isize b, isize h, isize i0, isize count,
                 Acc* room) const {
    const isize some = seen(p, b, i0, count), c = h, most = std::max(d_, e_);
    Acc *values = room, *dw = room + rows * most, *w = dw + rows * most;
    std::fill_n(dw, count * d_, Acc(0));
    load(p.right.t, b, c / p.right.share, i0, some, values);
    tile::gemm<Arch, Acc>(some, d_, e_, values, e_, 1, slope_turned_ + at(b, c), d_, dw, d_, false);
    if (p.exponential) weights(p, b, c, i0, some, w);
    const Acc* along = along_ + (b * forward_.contexts + c) * d_;
    for (isize i = 0; p.exponential && i < some; ++i)
      for (isize x = 0; x < d_; ++x) dw[i * d_ + x] = w[i * d_ + x] * (dw[i * d_ + x] - along[x]);
    store(to.left, b, h, i0, count, dw);
  }
  void right_back(const channel_plan& p, const channel_gradients& to, isize b, isize h, isize i0, isize count,
                  Acc* room) const {
    const isize some = seen(p, b, i0, count), most = std::max(d_, e_);
    Acc *w = room, *dv = room + rows * most;
    std::fill_n(dv, count * e_, Acc(0));
    for (isize c = h * p.right.share; c < (h + 1) * p.right.share; ++c) {
      weights(p, b, c, i0, some, w);
      tile::gemm<Arch, Acc>(some, e_, d_, w, d_, 1, slope_ + at(b, c), e_, dv, e_, true);
    }
    store(to.right, b, h, i0, count, dv);
  }

  channel_run<Acc> forward_;
  isize d_, e_, piece_;
  Acc *slope_, *turned_, *slope_turned_;  // dM; C and dM turned
  Acc *along_, *pieces_;                  // C_c . dC_c
};

template <class Acc>
void efficient_backward(const efficient_attention& m, exec_ref exec, const backward_problem& p, arena memory) {
  const shape s = p.shape();
  if (m.causal) return channel_prefix_backward<Acc>(memory, s, exec.concurrency()).run(exec, m, p);
  const channel_backward<Acc> run(memory, s.d, s.e, s.B, s.G, s.m, exec.concurrency());
  run.run(exec, plan_of(m, p.forward()), {p.dout, p.to.dk, p.to.dv, p.to.dq});
}

template <class Acc>
channel_backward<Acc> kfree_backward_layout(const kfree_reconstruction& m, arena& memory, const shape& s, int threads) {
  const bool channel = m.form == kfree_reconstruction::form_type::channel;
  return {memory, s.d, channel ? s.d : s.e, s.B, channel ? s.H : s.G, s.m, threads};
}
template <class Acc>
void kfree_backward(const kfree_reconstruction& m, exec_ref exec, const backward_problem& p, arena memory) {
  const auto run = kfree_backward_layout<Acc>(m, memory, p.shape(), exec.concurrency());
  if (m.form == kfree_reconstruction::form_type::channel)
    run.run(exec, plan_of(m, p.forward()), {p.dout, p.to.dq, p.to.dk, p.to.dv});
  else
    run.run(exec, plan_of(m, p.forward()), {p.dout, p.to.dk, p.to.dv, p.to.dq});
}

inline void check_channel_backward(const backward_problem& p) {
  const gradients& to = p.to;
  require(to.dE == nullptr && to.dF == nullptr && to.dbias == nullptr && to.dsinks == nullptr &&
              to.dlog_weight == nullptr && to.dquery_gate == nullptr && !to.of_a_recurrence() && !p.from.given() &&
              !p.dS_end && !p.dz_end,
          "a gradient other than dq, dk and dv was asked for, or a state was given; this mechanism has none");
  check_gradients(p);
}

template <class Acc>
std::size_t efficient_backward_bytes(const efficient_attention& m, const shape& s, int threads) {
  arena measure;
  if (m.causal)
    channel_prefix_backward<Acc>(measure, s, threads);
  else
    channel_backward<Acc>(measure, s.d, s.e, s.B, s.G, s.m, threads);
  return measure.bytes();
}

}  // namespace detail

inline void efficient_attention::check(const backward_problem& p) const {
  check(p.forward());
  detail::check_channel_backward(p);
}
inline void kfree_reconstruction::check(const backward_problem& p) const {
  check(p.forward());
  detail::check_channel_backward(p);
}

inline std::size_t efficient_attention::workspace_size_backward(const shape& s, int threads) const {
  return s.type == dtype::f64 ? detail::efficient_backward_bytes<double>(*this, s, threads)
                              : detail::efficient_backward_bytes<float>(*this, s, threads);
}
inline std::size_t kfree_reconstruction::workspace_size_backward(const shape& s, int threads) const {
  arena measure;
  s.type == dtype::f64 ? (void)detail::kfree_backward_layout<double>(*this, measure, s, threads)
                       : (void)detail::kfree_backward_layout<float>(*this, measure, s, threads);
  return measure.bytes();
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void efficient_attention::backward(exec_ref exec, const backward_problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? detail::efficient_backward<double>(*this, exec, p, scratch)
                         : detail::efficient_backward<float>(*this, exec, p, scratch);
}
FOVEA_DEFINITION void kfree_reconstruction::backward(exec_ref exec, const backward_problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? detail::kfree_backward<double>(*this, exec, p, scratch)
                         : detail::kfree_backward<float>(*this, exec, p, scratch);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
