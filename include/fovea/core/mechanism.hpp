// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a mechanism offers (concepts), and the public calls that check once and hand over.
///
///   prefill(exec, m, q, k, v, out [, options])          one call over all keys
///   prefill(exec, m, q, k, v, out, state [, options])   k, v are the next tokens after those in the state; causal
///   step(exec, m, q, k, v, out, state [, options])      the same for one token
///
/// Contract   q [B, H, n, d], k [B, G, m, d], v [B, G, m, e], out [B, H, n, e]; H a multiple of G; f64 goes with f64 only. With a
///            state n = m, and token i of the call sees the state and tokens 0 .. i. Every output element is written.
/// Errors     contract_error before anything is written. Memory: a call needs workspace_size(...) bytes of scratch; without
///            `call_options::workspace` they are allocated once, here and nowhere deeper.

#include <concepts>
#include <span>

#include <fovea/core/exec.hpp>
#include <fovea/core/state.hpp>
#include <fovea/core/workspace.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace detail {
/// `static constexpr const char* name`, or a member function where the name is known at run time only (any_attention).
template <class M>
concept named = requires {
  { M::name } -> std::convertible_to<const char*>;
}
|| requires(const M& m) {
  { m.name() } -> std::convertible_to<const char*>;
};
}  // namespace detail

/// A mechanism is an immutable value: hyper-parameters and views of learned weights.
///   check(p)                        throws if the problem, or the mechanism's own values, are not acceptable
///   workspace_size(shape, threads)  bytes of scratch of one call; with a state, shape.m counts the tokens held and the new ones
///   prefill(exec, p, scratch)       computes; does not throw, allocate or check
template <class M>
concept mechanism = std::copyable<M> && detail::named<M> &&
    requires(const M& m, exec_ref exec, const problem& p, const shape& s, arena scratch) {
  m.check(p);
  { m.workspace_size(s, 1) } -> std::same_as<std::size_t>;
  m.prefill(exec, p, scratch);
};

///   make_state(shape)               s.m: the most tokens it has to hold, where it holds tokens
///   tag()                           fingerprint of name and hyper-parameters
///   check(p, state)                 as check(p), for a call with a state
///   prefill(exec, p, state, scratch)
template <class M>
concept streaming_mechanism = mechanism<M> &&
    requires(const M& m, exec_ref exec, const problem& p, const shape& s, state& st, arena scratch) {
  { m.make_state(s) } -> std::same_as<state>;
  { m.tag() } -> std::same_as<std::uint64_t>;
  m.check(p, st);
  m.prefill(exec, p, st, scratch);
};

/// States of disjoint stretches of one sequence can be joined: merge(earlier, later) leaves the joint state in `earlier`.
template <class M>
concept mergeable_mechanism = streaming_mechanism<M> && requires(const M& m, state& a, const state& b) {
  m.merge(a, b);
};

struct call_options {
  tensor_mut lse = {};                  ///< [B, H, n, 1] log-sum-exp of the scores, where the mechanism has one
  fovea::gates gates = {};              ///< per-token gates of recurrent rules
  std::span<std::byte> workspace = {};  ///< scratch of at least workspace_size(shape, concurrency) bytes
  /// [B, n] where RoPE turns query i and the key of the same token, for mechanisms that turn; empty: bottom-right positions.
  std::span<const std::int32_t> positions = {};
  /// [B, H, n, 1] f32: the share of each row's denominator that the mechanism left out (softmax_attention::skip).
  tensor_mut skipped = {};
};

namespace detail {
inline arena scratch_of(std::size_t need, std::span<std::byte> given, buffer& own) {
  if (given.data() == nullptr) {
    own = buffer(need + alignment);
    return arena(own.span());
  }
  require(given.size() >= need, "workspace holds ", given.size(), " bytes; this call needs ", need);
  return arena(given);
}
/// What a call with a state needs: `state_workspace_size`, where a mechanism says that it is less, or workspace_size.
template <class M>
std::size_t state_workspace(const M& m, const shape& s, int threads) {
  if constexpr (requires { m.state_workspace_size(s, threads); })
    return m.state_workspace_size(s, threads);
  else
    return m.workspace_size(s, threads);
}
template <class M>
bool takes_positions(const M& m) {
  if constexpr (requires { m.takes_positions(); })
    return m.takes_positions();
  else
    return (void)m, false;
}
template <class M>
bool takes_skipped(const M& m) {
  if constexpr (requires { m.takes_skipped(); })
    return m.takes_skipped();
  else
    return (void)m, false;
}
template <class M>
problem problem_of(const M& m, const tensor_ref& q, const tensor_ref& k, const tensor_ref& v, const tensor_mut& out,
                   const call_options& o) {
  require(o.positions.empty() || takes_positions(m),
          "positions were given; this mechanism turns nothing (set softmax_attention::turn)");
  require(o.positions.empty() || static_cast<isize>(o.positions.size()) == q.batch * q.length, "positions holds ",
          o.positions.size(), " numbers; wanted one for each of ", q.batch, " x ", q.length, " tokens");
  require(!o.skipped || takes_skipped(m),
          "skipped was given; this mechanism skips nothing (set softmax_attention::skip)");
  return {q, k, v, out, o.lse, o.gates, o.positions.empty() ? nullptr : o.positions.data(), o.skipped};
}
inline bool nothing_to_do(const problem& p) {
  return p.q.batch == 0 || p.q.heads == 0 || p.out.heads == 0 || p.q.length == 0;
}
}  // namespace detail

template <mechanism M>
void prefill(exec_ref exec, const M& m, tensor_ref q, tensor_ref k, tensor_ref v, tensor_mut out,
             const call_options& options = {}) {
  const problem p = detail::problem_of(m, q, k, v, out, options);
  m.check(p);
  if (detail::nothing_to_do(p)) return;
  buffer own;
  const std::size_t need = m.workspace_size(p.shape(), exec.concurrency());
  m.prefill(exec, p, detail::scratch_of(need, options.workspace, own));
}

template <streaming_mechanism M>
void prefill(exec_ref exec, const M& m, tensor_ref q, tensor_ref k, tensor_ref v, tensor_mut out, state& s,
             const call_options& options = {}) {
  const problem p = detail::problem_of(m, q, k, v, out, options);
  require(q.length == k.length, "q has ", q.length, " tokens and k has ", k.length,
          "; a call with a state takes the same new tokens in both");
  m.check(p, s);
  if (detail::nothing_to_do(p)) return;
  shape sizes = p.shape();
  sizes.m += s.tokens();
  buffer own;
  const std::size_t need = detail::state_workspace(m, sizes, exec.concurrency());
  m.prefill(exec, p, s, detail::scratch_of(need, options.workspace, own));
}

template <streaming_mechanism M>
void step(exec_ref exec, const M& m, tensor_ref q, tensor_ref k, tensor_ref v, tensor_mut out, state& s,
          const call_options& options = {}) {
  require(q.length == 1 && k.length == 1, "step takes one token; q has ", q.length, " and k has ", k.length,
          " (use prefill for more)");
  fovea::prefill(exec, m, q, k, v, out, s, options);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
