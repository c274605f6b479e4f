// SPDX-License-Identifier: MIT
#pragma once
/// @file  linformer_attention, backward: softmax attention over the slots, and over the own block in the causal form, then through the projection.
///
///   both key sets share one denominator, that of lse: each gives its part of dq, and dk, dv of its own keys
///   the gradients of slots go on to rows and numbers of the projection: linformer/backward_projection.hpp
///
/// Contract   every form that prefill takes without a state: each projection, lengths, block-causal. Max: the first row with the maximum
///            gets the slot's gradient. dE and dF are float, dense in the shapes of E and F, rows that no key reached zero; with a convolution
///            they are the gradients of wk and wv. Without F (wv) dE has the share of the values too. Rows behind a length are not read
///            and get zeros. Bits do not depend on the number of threads.
/// Cost       the backward pass of softmax over what the rows saw, and, linear, 2 slots (d + e) multiply-adds a row and KV head. Scratch:
///            slots and their gradients; causal: H n 2 d + G m (d + e) numbers more.
/// Reference  linformer/reference_backward.hpp.

#include <fovea/linformer/backward_projection.hpp>
#include <fovea/linformer/prefill.hpp>
#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
class linformer_backward_run {
 public:
  linformer_backward_run(arena& memory, const linformer_attention& m, const shape& s, int threads)
      : m_(m), s_(s), forward_(memory, m, s, threads), rows_(forward_.own.rows), back_(memory, m, s, rows_, threads) {
    const isize heads = s.B * s.G, own = m.causal ? heads * s.m : 0, queries = m.causal ? s.B * s.H * s.n * s.d : 0;
    dk_ = memory.take<Acc>(heads * rows_ * s.d), dv_ = memory.take<Acc>(heads * rows_ * s.e);
    own_dk_ = memory.take<Acc>(own * s.d), own_dv_ = memory.take<Acc>(own * s.e);
    dq_ = memory.take<Acc>(queries), own_dq_ = memory.take<Acc>(queries);
    fed_ = memory.take<std::int32_t>(m.lengths.empty() ? 0 : s.B);
    softmax_bytes_ = softmax(no_mask{}).workspace_size_backward(over(seen()), threads);
    if (m.causal) softmax_bytes_ = std::max(softmax_bytes_, softmax(no_mask{}).workspace_size_backward(s, threads));
    softmax_memory_ = memory.take<std::byte>(static_cast<isize>(softmax_bytes_));
  }

  void run(exec_ref exec, const backward_problem& p) const {
    m_.causal ? by_blocks(exec, p) : over_slots(exec, p);
    const Acc *own_k = m_.causal ? own_dk_ : nullptr, *own_v = m_.causal ? own_dv_ : nullptr;
    back_.run(exec, {{&p.k, p.to.dk, dk_, own_k}, {&p.v, p.to.dv, dv_, own_v}}, p.to.dE, p.to.dF);
  }

 private:
  softmax_attention softmax(const mask& visible) const { return {.mask = visible, .scale = m_.scale_for(s_)}; }
  arena softmax_memory() const { return arena(std::span<std::byte>(softmax_memory_, softmax_bytes_)); }
  shape over(isize keys) const {
    shape s = s_;
    s.m = keys;
    return s;
  }
  /// Slots of a head that some row sees.
  isize seen() const { return m_.causal ? rows_ : m_.map(false, 0).used(s_.m); }
  tensor_mut slots(Acc* data, isize width) const {
    return {data, dtype_of<Acc>, s_.B, s_.G, seen(), width, s_.G * rows_ * width, rows_ * width, width};
  }
  /// p with the slots in place of the keys, and where their gradients go.
  backward_problem of_slots(const backward_problem& p) const {
    backward_problem inner = p;
    inner.k = slots(forward_.own.k, s_.d), inner.v = slots(forward_.own.v, s_.e);
    inner.to = {.dq = p.to.dq, .dk = slots(dk_, s_.d), .dv = slots(dv_, s_.e)};
    return inner;
  }

  void over_slots(exec_ref exec, const backward_problem& p) const {
    const bool padded = !m_.lengths.empty();
    if (padded) {  // slots that an item does not feed are not written
      std::fill_n(forward_.own.k, s_.B * s_.G * rows_ * s_.d, Acc(0));
      std::fill_n(forward_.own.v, s_.B * s_.G * rows_ * s_.e, Acc(0));
      for (isize b = 0; b < s_.B; ++b) fed_[b] = static_cast<std::int32_t>(m_.map(false, 0).used(m_.keys_of(b, s_.m)));
    }
    forward_.project(exec, p.k, p.v, 0, true, forward_.own);
    softmax(padded ? mask(key_lengths{fed_}) : mask(no_mask{})).backward(exec, of_slots(p), softmax_memory());
  }

  void by_blocks(exec_ref exec, const backward_problem& p) const {
    const isize offset = s_.m - s_.n, blocks = s_.m > 0 ? (s_.m - 1) / m_.block : 0;
    forward_.project_blocks(exec, p.forward(), block_tail<Acc>{}, 0, 0, blocks, forward_.own);
    backward_problem inner = of_slots(p), own = p;
    own.to = {.dk = bhnd(own_dk_, s_.B, s_.G, s_.m, s_.d), .dv = bhnd(own_dv_, s_.B, s_.G, s_.m, s_.e)};
    if (p.to.dq) {
      inner.to.dq = bhnd(dq_, s_.B, s_.H, s_.n, s_.d);
      own.to.dq = bhnd(own_dq_, s_.B, s_.H, s_.n, s_.d);
    }
    softmax(past_block_slots{m_.map(false, 0).used(m_.block), m_.block, offset})
        .backward(exec, inner, softmax_memory());
    softmax(own_block_keys{m_.block, offset, 0}).backward(exec, own, softmax_memory());
    constexpr isize some = 64;
    const isize chunks = ceil_div(s_.n, some);
    exec.for_tasks(p.to.dq ? s_.B * s_.H * chunks : 0, [&](isize task, isize) {
      const isize head = task / chunks, first = task % chunks * some, last = std::min(first + some, s_.n);
      for (isize i = first; i < last; ++i) {
        Acc *row = dq_ + (head * s_.n + i) * s_.d, *more = own_dq_ + (head * s_.n + i) * s_.d;
        for (isize c = 0; c < s_.d; ++c) row[c] += more[c];
        simd::store_row<simd::native, Acc>(p.to.dq.type, row, s_.d, p.to.dq.row(head / s_.H, head % s_.H, i));
      }
    });
  }

  const linformer_attention& m_;
  shape s_;
  linformer_run<Acc> forward_;
  isize rows_;  // slots a head has room for
  projection_backward<Acc> back_;
  Acc *dk_, *dv_, *own_dk_, *own_dv_, *dq_,
      *own_dq_;        // of slots; causal: of the own block's keys; dq by slots, by own keys
  std::int32_t* fed_;  // slots of each item, where items have lengths
  std::byte* softmax_memory_;
  std::size_t softmax_bytes_;
};

}  // namespace detail

inline void linformer_attention::check(const backward_problem& p) const {
  using kind = sequence_projection;
  check(p.forward());
  detail::check_backward_rows(p);
  require(p.to.dbias == nullptr && p.to.dsinks == nullptr && p.to.dlog_weight == nullptr && p.to.dquery_gate == nullptr,
          "a gradient of a bias, sinks, a log weight or a query gate was asked for; linformer has none of them");
  require((p.to.dE == nullptr && p.to.dF == nullptr) || projection == kind::linear || projection == kind::conv,
          "dE or dF was asked for; mean and max pooling have no numbers to learn");
  require(p.to.dF == nullptr || (projection == kind::linear ? F.data != nullptr : !wv.empty()),
          "dF was asked for; this linformer_attention projects values by ", projection == kind::linear ? "E" : "wk");
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
