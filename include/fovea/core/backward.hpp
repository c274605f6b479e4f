// SPDX-License-Identifier: MIT
#pragma once
/// @file  The backward pass: what a mechanism offers, and the public call that checks once and hands over.
///
///   backward(exec, m, q, k, v, out, lse, dout, gradients [, options])
///
/// Contract   q, k, v, out, lse as of a prefill of m (lse of those that have one); dout [B, H, n, e] is the gradient of the loss by out. Each gradient that is
///            asked for is written as a whole (not added to): dq, dk, dv in the shapes of q, k, v and any storage type (f64 goes
///            with f64 only); dk and dv are summed over the query group. The same bits for any number of threads.
/// Errors     contract_error before anything is written. Memory: workspace_size_backward(...) bytes, linear in n and m; without
///            `backward_options::workspace` they are allocated once, here and nowhere deeper.

#include <fovea/core/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace detail {
/// What a prefill wrote and a later call reads, as the argument that it was.
inline tensor_mut as_output(const tensor_ref& t) {
  return {const_cast<void*>(t.data),
          t.type,
          t.batch,
          t.heads,
          t.length,
          t.width,
          t.batch_stride,
          t.head_stride,
          t.row_stride};
}
}  // namespace detail

/// Where the gradients go; null: not wanted.
struct gradients {
  tensor_mut dq = {}, dk = {}, dv = {};
  float* dbias =
      nullptr;  ///< by the table of the score's bias, laid out as that table; summed where the table broadcasts
  float* dsinks = nullptr;             ///< [H]
  float *dE = nullptr, *dF = nullptr;  ///< by a sequence projection, dense in its shape
  /// By the gates of the call, in their shapes.
  tensor_mut dlog_decay = {}, dbeta = {}, derase = {}, dwrite = {};
  tensor_mut dS = {}, dz = {};  ///< by the initial state, [B, G, r, e] and [B, G, r, 1]
  /// By the learned numbers of a feature map, [1, H, 1, w] for queries and [1, G, 1, w] for keys, w = feature_map::weights(d): always
  /// one row a head, summed over the batch. Who shares weights between heads or sides adds the rows up.
  tensor_mut dquery_map = {}, dkey_map = {};
  float *dlog_weight = nullptr,
        *dquery_gate = nullptr;  ///< [H] and [H, d], summed over the batch: of windowed_attention
  bool of_a_recurrence() const { return dlog_decay || dbeta || derase || dwrite || dS || dz || dquery_map || dkey_map; }
};

/// Where a recurrent state stood before the call, as plain numbers (store_state gives them): S [B, G, r, e], z [B, G, r, 1].
struct initial_state {
  tensor_ref S = {}, z = {};
  isize tokens = 0;  ///< that it had seen: the position of the first key
  bool given() const { return S || z || tokens != 0; }
};

struct backward_problem {
  tensor_ref q, k, v, out, lse, dout;
  gradients to;
  fovea::gates gates = {};
  initial_state from = {};
  tensor_ref dS_end = {}, dz_end = {};  ///< gradients by the final state, if the loss reads it
  fovea::shape shape() const { return {q.batch, q.heads, v.heads, q.length, k.length, q.width, v.width, q.type}; }
  /// The prefill that this belongs to; nothing is written through its outputs.
  problem forward() const { return {q, k, v, detail::as_output(out), detail::as_output(lse), gates, {}}; }
};

///   check(p)                                 throws if the problem, or the mechanism's own values, are not acceptable
///   workspace_size_backward(shape, threads)  bytes of scratch of one call
///   backward(exec, p, scratch)               computes; does not throw, allocate or check
template <class M>
concept differentiable_mechanism = mechanism<M> &&
    requires(const M& m, exec_ref exec, const backward_problem& p, const shape& s, arena scratch) {
  m.check(p);
  { m.workspace_size_backward(s, 1) } -> std::same_as<std::size_t>;
  m.backward(exec, p, scratch);
};

struct backward_options {
  std::span<std::byte> workspace = {};  ///< scratch of at least workspace_size_backward(shape, concurrency) bytes
  fovea::gates gates = {};              ///< of the prefill
  initial_state from = {};              ///< that the prefill began with
  tensor_ref dS_end = {}, dz_end = {};  ///< gradients by the state that it left, if the loss reads it
};

template <differentiable_mechanism M>
void backward(exec_ref exec, const M& m, tensor_ref q, tensor_ref k, tensor_ref v, tensor_ref out, tensor_ref lse,
              tensor_ref dout, const gradients& to, const backward_options& options = {}) {
  const backward_problem p{q, k, v, out, lse, dout, to, options.gates, options.from, options.dS_end, options.dz_end};
  m.check(p);
  const std::size_t need = m.workspace_size_backward(p.shape(), exec.concurrency());
  if (options.workspace.data() != nullptr) {
    require(options.workspace.size() >= need, "workspace holds ", options.workspace.size(),
            " bytes; this backward call needs ", need);
    return m.backward(exec, p, arena(options.workspace));
  }
  const buffer own(need + alignment);
  m.backward(exec, p, arena(own.span()));
}

namespace detail {

/// dk and dv are in the shapes of k and v, and so on.
inline void check_gradient(const backward_problem& p, const char* name, const tensor_mut& g, const char* of,
                           const tensor_ref& x) {
  if (!g) return;
  check_tensor(name, g);
  require(g.batch == x.batch && g.heads == x.heads && g.length == x.length && g.width == x.width, name, " is ",
          describe(g), "; ", of, " is ", describe(x), ", and its gradient has the same sizes");
  require((g.type == dtype::f64) == (x.type == dtype::f64), name, " is ", name_of(g.type), " and ", of, " is ",
          name_of(x.type), "; f64 goes with f64 only");
  check_apart(name, g, "q", p.q), check_apart(name, g, "k", p.k), check_apart(name, g, "v", p.v);
  check_apart(name, g, "out", p.out), check_apart(name, g, "lse", p.lse), check_apart(name, g, "dout", p.dout);
}

/// The contract of dout and of what has the shape of q, k, v, for all mechanisms.
inline void check_gradients(const backward_problem& p) {
  check_tensor("dout", p.dout);
  require(p.dout.batch == p.out.batch && p.dout.heads == p.out.heads && p.dout.length == p.out.length &&
              p.dout.width == p.out.width,
          "dout is ", describe(p.dout), "; wanted the sizes of out, ", describe(p.out));
  require((p.dout.type == dtype::f64) == (p.q.type == dtype::f64), "dout is ", name_of(p.dout.type), " and q is ",
          name_of(p.q.type), "; f64 goes with f64 only");
  const gradients& to = p.to;
  check_gradient(p, "dq", to.dq, "q", p.q), check_gradient(p, "dk", to.dk, "k", p.k);
  check_gradient(p, "dv", to.dv, "v", p.v);
  check_apart("dk", to.dk, "dq", to.dq), check_apart("dv", to.dv, "dq", to.dq), check_apart("dv", to.dv, "dk", to.dk);
}

/// The rest of it for mechanisms that make their probabilities anew from lse and keep no recurrent state.
inline void check_backward_rows(const backward_problem& p) {
  const bool rows = p.q.batch > 0 && p.q.heads > 0 && p.q.length > 0;
  require(p.lse || !rows, "lse is null; backward makes the probabilities anew from the lse that prefill wrote");
  require(!p.to.of_a_recurrence() && !p.from.given() && !p.dS_end && !p.dz_end,
          "gradients of gates, a state or a feature map were asked for, or a state was given; this mechanism has none");
  check_gradients(p);
}
inline void check_backward(const backward_problem& p) {
  check_problem(p.forward());
  require(p.to.dE == nullptr && p.to.dF == nullptr, "dE or dF was asked for; this mechanism projects no sequence");
  check_backward_rows(p);
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
