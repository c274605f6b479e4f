// SPDX-License-Identifier: MIT
#pragma once
/// @file  The contract of a backward pass of linear attention, and its public members. Included by linear/backward.hpp.

#include <fovea/linear/backward.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// A gradient of something the call has, in its sizes.
inline void check_own_gradient(const backward_problem& p, const char* name, const tensor_mut& g, bool exists,
                               const char* of, isize batch, isize heads, isize length, isize width) {
  if (!g) return;
  require(exists, name, " was asked for; this call has no ", of);
  check_tensor(name, g);
  require(g.batch == batch && g.heads == heads && g.length == length && g.width == width, name, " is ", describe(g),
          "; wanted [", batch, ", ", heads, ", ", length, ", ", width, "]");
  require((g.type == dtype::f64) == (p.q.type == dtype::f64), name, " is ", name_of(g.type), " and q is ",
          name_of(p.q.type), "; f64 goes with f64 only");
}
inline void check_gate_gradient(const backward_problem& p, const char* name, const tensor_mut& g, const char* of,
                                const tensor_ref& gate) {
  check_own_gradient(p, name, g, static_cast<bool>(gate), of, gate.batch, gate.heads, gate.length, gate.width);
}
/// S [B, G, r, e] and z [B, G, r, 1], or a gradient by them.
inline void check_state_tensor(const backward_problem& p, const char* name, const tensor_ref& t, isize r, isize e) {
  if (!t) return;
  check_tensor(name, t);
  require(t.batch == p.v.batch && t.heads == p.v.heads && t.length == r && t.width == e, name, " is ", describe(t),
          "; wanted [", p.v.batch, ", ", p.v.heads, ", ", r, ", ", e, "]");
  require((t.type == dtype::f64) == (p.q.type == dtype::f64), name, " is ", name_of(t.type), " and q is ",
          name_of(p.q.type), "; f64 goes with f64 only");
}

inline void check_linear_backward(const linear_attention& m, const backward_problem& p) {
  check_linear(m, p.forward());
  const feature_map map = m.phi();
  require(map.differentiable(), "the feature map of this linear attention has no member `derive`; backward needs one");
  check_gradients(p);
  require(p.to.dbias == nullptr && p.to.dsinks == nullptr && p.to.dE == nullptr && p.to.dF == nullptr,
          "dbias, dsinks, dE or dF was asked for; linear attention has none of them");
  const isize G = p.v.heads, r = map.features(p.q.width), w = map.weights(p.q.width),
              group = G > 0 && p.q.heads > G ? p.q.heads / G : 1;
  require(group <= linear_backward_run<float>::most_group, "q has ", p.q.heads, " heads and v has ", G,
          "; backward takes up to ", linear_backward_run<float>::most_group, " query heads of one state");
  check_gate_gradient(p, "dlog_decay", p.to.dlog_decay, "log_decay", p.gates.log_decay);
  check_gate_gradient(p, "dbeta", p.to.dbeta, "beta", p.gates.beta);
  check_gate_gradient(p, "derase", p.to.derase, "erase", p.gates.erase);
  check_gate_gradient(p, "dwrite", p.to.dwrite, "write", p.gates.write);
  check_own_gradient(p, "dquery_map", p.to.dquery_map, w > 0, "learned numbers in its feature map", 1, p.q.heads, 1, w);
  check_own_gradient(p, "dkey_map", p.to.dkey_map, w > 0, "learned numbers in its feature map", 1, p.k.heads, 1, w);
  const bool states = p.from.given() || p.dS_end || p.dz_end || p.to.dS || p.to.dz;
  require(!states || m.streaming(), "a state, or a gradient by one, was given; this linear attention keeps no state");
  require(!p.from.given() || p.q.length == p.k.length, "q has ", p.q.length, " tokens and k has ", p.k.length,
          "; a call with a state takes the same new tokens in both");
  require(p.from.tokens >= 0, "from.tokens is ", p.from.tokens, "; it must not be negative");
  check_state_tensor(p, "from.S", p.from.S, r, p.v.width), check_state_tensor(p, "from.z", p.from.z, r, 1);
  check_state_tensor(p, "dS_end", p.dS_end, r, p.v.width), check_state_tensor(p, "dz_end", p.dz_end, r, 1);
  check_state_tensor(p, "dS", p.to.dS, r, p.v.width), check_state_tensor(p, "dz", p.to.dz, r, 1);
  require(!(p.to.dS || p.to.dz) || !map.log_scaled() || p.from.S || p.from.z,
          "dS or dz was asked for without an initial state; with a log-scaled map give one (from.S, from.z)");
}

}  // namespace detail

inline void linear_attention::check(const backward_problem& p) const { detail::check_linear_backward(*this, p); }

inline std::size_t linear_attention::workspace_size_backward(const shape& s, int threads) const {
  return s.type == dtype::f64 ? detail::linear_backward_run<double>::workspace_size(*this, s, threads)
                              : detail::linear_backward_run<float>::workspace_size(*this, s, threads);
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void linear_attention::backward(exec_ref exec, const backward_problem& p, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::linear_backward_run<double>(*this, exec, p, scratch).run(exec);
  else
    detail::linear_backward_run<float>(*this, exec, p, scratch).run(exec);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
