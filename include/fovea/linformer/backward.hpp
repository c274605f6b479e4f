// SPDX-License-Identifier: MIT
#pragma once
/// @file  linformer_attention, backward: softmax attention over the slots, then through the projection.
///
///   dk_i = sum_s E_is dk'_s,   dE_is = sum over items and heads of k_i . dk'_s,   the same for v and F (E where there is no F)
///
/// Contract   linear projection, bidirectional, no lengths: what else there is is refused in a sentence. dE and dF are float, dense in the
///            shapes of E and F, rows from m on zero. Bits do not depend on the number of threads.
/// Cost       the backward pass of softmax over `slots` keys, and 2 G m slots (d + e) multiply-adds an item.

#include <fovea/core/backward.hpp>
#include <fovea/kernel/linear_backward_pairs.hpp>
#include <fovea/linformer/mechanism.hpp>
#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
class linformer_backward_run {
  using native = simd::native;
  static constexpr isize block = 64;

 public:
  linformer_backward_run(arena& memory, const linformer_attention& m, const shape& s, int threads) : m_(m), s_(s) {
    heads_ = s.B * s.G, slots_ = m.slots_for(), most_ = std::max(s.d, s.e);
    k_ = memory.take<Acc>(heads_ * slots_ * s.d), v_ = memory.take<Acc>(heads_ * slots_ * s.e);
    dk_ = memory.take<Acc>(heads_ * slots_ * s.d), dv_ = memory.take<Acc>(heads_ * slots_ * s.e);
    dk_turned_ = memory.take<Acc>(heads_ * slots_ * s.d), dv_turned_ = memory.take<Acc>(heads_ * slots_ * s.e);
    piece_ = block * most_ * 2 + 2 * block * slots_;
    pieces_ = memory.take<Acc>(piece_ * threads);
    softmax_bytes_ = softmax().workspace_size_backward(inner(), threads);
    softmax_memory_ = memory.take<std::byte>(static_cast<isize>(softmax_bytes_));
  }

  void run(exec_ref exec, const backward_problem& p) const {
    exec.for_tasks(2 * heads_, [&](isize task, isize slot) {
      project(task % 2 != 0 ? p.v : p.k, task / 2, task % 2 != 0, pieces_ + slot * piece_);
    });
    backward_problem slots = p;
    slots.to = {.dq = p.to.dq, .dk = over(dk_, s_.d), .dv = over(dv_, s_.e)};
    slots.k = over(k_, s_.d), slots.v = over(v_, s_.e);
    softmax().backward(exec, slots, arena(std::span<std::byte>(softmax_memory_, softmax_bytes_)));
    exec.for_tasks(heads_, [&](isize h, isize) {
      using pairs = kernel::chunk_pairs<native, Acc>;
      pairs::turn(dk_ + h * slots_ * s_.d, slots_, s_.d, s_.d, dk_turned_ + h * slots_ * s_.d, slots_);
      pairs::turn(dv_ + h * slots_ * s_.e, slots_, s_.e, s_.e, dv_turned_ + h * slots_ * s_.e, slots_);
    });
    clear(p.to.dE, m_.E), clear(p.to.dF, m_.F);
    exec.for_tasks(ceil_div(s_.m, block), [&](isize task, isize slot) {
      Acc* room = pieces_ + slot * piece_;
      for (isize h = 0; h < heads_; ++h) rows_back(p, h, task * block, room);
    });
  }

 private:
  softmax_attention softmax() const { return {.mask = no_mask{}, .scale = m_.scale_for(s_)}; }
  shape inner() const {
    shape s = s_;
    s.m = slots_;
    return s;
  }
  tensor_mut over(Acc* data, isize width) const { return bhnd(data, s_.B, s_.G, slots_, width); }
  const view<const float>& map(bool values) const { return values && m_.F.data != nullptr ? m_.F : m_.E; }
  isize head_of(const view<const float>& E, isize g) const { return E.heads == 1 ? 0 : g; }
  /// Rows of a projection as Acc, [count][slots].
  void load(bool values, isize g, isize first, isize count, Acc* to) const {
    const auto& E = map(values);
    for (isize i = 0; i < count; ++i)
      for (isize s = 0; s < slots_; ++s) to[i * slots_ + s] = static_cast<Acc>(E(0, head_of(E, g), first + i, s));
  }
  void load(const tensor_ref& x, isize head, isize first, isize count, Acc* to) const {
    for (isize i = 0; i < count; ++i)
      simd::load_row<native, Acc>(x.type, x.row(head / s_.G, head % s_.G, first + i), x.width, to + i * x.width);
  }
  void project(const tensor_ref& x, isize head, bool values, Acc* room) const {
    Acc *rows = room, *weights = room + block * most_, *to = (values ? v_ : k_) + head * slots_ * x.width;
    for (isize i = 0; i < slots_ * x.width; ++i) to[i] = Acc(0);
    for (isize i = 0; i < s_.m; i += block) {
      const isize count = std::min(block, s_.m - i);
      load(x, head, i, count, rows), load(values, head % s_.G, i, count, weights);
      tile::gemm<native, Acc>(slots_, x.width, count, weights, 1, slots_, rows, x.width, to, x.width, true);
    }
  }
  static void clear(float* to, const view<const float>& E) {
    for (isize i = 0; to != nullptr && i < E.heads * E.length * E.width; ++i) to[i] = 0.0F;
  }
  void rows_back(const backward_problem& p, isize head, isize first, Acc* room) const {
    const isize count = std::min(block, s_.m - first), g = head % s_.G;
    for (const bool values : {false, true}) {
      const tensor_ref& x = values ? p.v : p.k;
      const tensor_mut& dx = values ? p.to.dv : p.to.dk;
      const Acc *slots = (values ? dv_ : dk_) + head * slots_ * x.width,
                *turned = (values ? dv_turned_ : dk_turned_) + head * slots_ * x.width;
      Acc *rows = room, *out = room + block * most_, *weights = out + block * most_, *by = weights + block * slots_;
      if (dx) {
        load(values, g, first, count, weights);
        tile::gemm<native, Acc>(count, x.width, slots_, weights, slots_, 1, slots, x.width, out, x.width, false);
        for (isize i = 0; i < count; ++i)
          simd::store_row<native, Acc>(dx.type, out + i * x.width, x.width, dx.row(head / s_.G, g, first + i));
      }
      float* to = values && m_.F.data != nullptr ? p.to.dF : p.to.dE;
      if (to == nullptr) continue;
      load(x, head, first, count, rows);
      tile::gemm<native, Acc>(count, slots_, x.width, rows, x.width, 1, turned, slots_, by, slots_, false);
      const auto& E = map(values);
      to += (head_of(E, g) * E.length + first) * slots_;
      for (isize i = 0; i < count * slots_; ++i) to[i] += static_cast<float>(by[i]);
    }
  }

  const linformer_attention& m_;
  shape s_;
  isize heads_, slots_, most_, piece_;
  Acc *k_, *v_, *dk_, *dv_, *dk_turned_, *dv_turned_, *pieces_;
  std::byte* softmax_memory_;
  std::size_t softmax_bytes_;
};

}  // namespace detail

inline void linformer_attention::check(const backward_problem& p) const {
  check(p.forward());
  require(projection == sequence_projection::linear && !causal && lengths.empty(),
          "backward of linformer takes the linear projection, bidirectional, without lengths");
  detail::check_backward_rows(p);
  require(p.to.dF == nullptr || F.data != nullptr, "dF was asked for; this linformer_attention projects values by E");
}

inline std::size_t linformer_attention::workspace_size_backward(const shape& s, int threads) const {
  arena measure;
  s.type == dtype::f64 ? (void)detail::linformer_backward_run<double>(measure, *this, s, threads)
                       : (void)detail::linformer_backward_run<float>(measure, *this, s, threads);
  return measure.bytes();
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void linformer_attention::backward(exec_ref exec, const backward_problem& p, arena scratch) const {
  const shape s = p.shape();
  if (p.q.type == dtype::f64)
    detail::linformer_backward_run<double>(scratch, *this, s, exec.concurrency()).run(exec, p);
  else
    detail::linformer_backward_run<float>(scratch, *this, s, exec.concurrency()).run(exec, p);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
