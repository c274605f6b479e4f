// SPDX-License-Identifier: MIT
#pragma once
/// @file  The contract of linear attention: sizes (grouped queries or grouped values), gates, and its own numbers.

#include <fovea/linear/state.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline void check_gate(const char* name, const tensor_ref& gate, const char* why, bool wanted, const problem& p,
                       isize width, isize other_width) {
  if (p.k.length == 0 && !gate) return;  // no token, no gates
  require(static_cast<bool>(gate) == wanted, name, wanted ? " is missing; " : " was given; ", why);
  if (!wanted) return;
  check_tensor(name, gate);
  require(gate.batch == p.v.batch && gate.heads == p.v.heads && gate.length == p.v.length &&
              (gate.width == width || gate.width == other_width),
          name, " is ", describe(gate), "; wanted [", p.v.batch, ", ", p.v.heads, ", ", p.v.length, ", ", width, "]");
  require((gate.type == dtype::f64) == (p.q.type == dtype::f64), name, " is ", name_of(gate.type), " and q is ",
          name_of(p.q.type), "; f64 goes with f64 only");
  check_apart("out", p.out, name, gate);
}

inline void check_gates(const linear_attention& m, const problem& p, isize r) {
  const rule u = m.rule;
  const bool decays = u == rule::gla || u == rule::gated_delta || u == rule::kda || u == rule::gdn2 ||
                      (u == rule::decay && m.gamma.empty());
  const isize width = by_channel(u) ? r : 1;
  const std::string needs = sentence("rule ", name_of(u),
                                     decays            ? u == rule::decay ? " needs it, or gamma" : " needs it"
                                     : m.gamma.empty() ? " has no decay"
                                                       : " was given gamma");
  check_gate("log_decay (g)", p.gates.log_decay, needs.c_str(), decays, p, width, u == rule::gdn2 ? 1 : width);
  const bool has_beta = is_delta(u) && u != rule::gdn2, wide = u == rule::gdn2;
  check_gate("beta", p.gates.beta, sentence("rule ", name_of(u), has_beta ? " needs it" : " has none").c_str(),
             has_beta, p, 1, 1);
  check_gate("erase (b)", p.gates.erase, sentence("rule ", name_of(u), wide ? " needs it" : " has none").c_str(), wide,
             p, r, r);
  check_gate("write (w)", p.gates.write, sentence("rule ", name_of(u), wide ? " needs it" : " has none").c_str(), wide,
             p, p.v.width, p.v.width);
}

inline void check_own_values(const linear_attention& m) {
  require_finite("scale", m.scale);
  require_finite("eps", m.eps), require_finite("clamp", m.clamp), require_finite("key_sum_eps", m.key_sum_eps);
  require(m.eps >= 0.0 && m.clamp >= 0.0 && m.key_sum_eps >= 0.0, "eps, clamp, key_sum_eps are ", m.eps, ", ", m.clamp,
          ", ", m.key_sum_eps, "; they must not be negative");
  require(m.gamma.empty() || m.rule == rule::decay, "gamma was given; rule ", name_of(m.rule),
          " takes no constant decay");
  for (const double g : m.gamma) require(g >= 0.0 && g <= 1.0, "gamma holds ", g, "; a decay lies in [0, 1]");
  require(m.is_causal || m.rule == rule::none, "is_causal is false; rule ", name_of(m.rule),
          " is a recurrence over time and needs true");
  require(!m.normalised() || !is_delta(m.rule), "normalise is true; rule ", name_of(m.rule), " has no denominator");
  require(!m.phi().log_scaled() || m.rule == rule::none || m.rule == rule::decay,
          "the feature map is log-scaled, which rule ", name_of(m.rule), " does not support");
}

/// As check_problem, with the head counts of grouped values allowed too.
inline void check_linear(const linear_attention& m, const problem& p) {
  check_own_values(m);
  problem shared = p;
  shared.gates = {};
  const bool grouped_values = p.k.heads == p.q.heads && p.v.heads > p.q.heads;
  if (grouped_values && p.q.heads > 0) {  // judge all else at the head count of q
    require(p.v.heads % p.q.heads == 0, "v has ", p.v.heads, " heads and q has ", p.q.heads,
            "; with grouped values the former is a multiple of the latter");
    require(p.out.heads == p.v.heads, "out is ", describe(p.out), "; with grouped values it has the ", p.v.heads,
            " heads of v");
    require(p.v.batch == p.q.batch && p.out.batch == p.q.batch, "the batch sizes of q, v, out are ", p.q.batch, ", ",
            p.v.batch, ", ", p.out.batch, "; they must be equal");
    check_tensor("v", p.v), check_tensor("out", p.out);
    check_apart("out", p.out, "q", p.q), check_apart("out", p.out, "k", p.k), check_apart("out", p.out, "v", p.v);
    shared.v.heads = shared.out.heads = p.q.heads;
  }
  check_problem(shared);
  require(!p.lse, "lse was asked for; linear attention has no log-sum-exp");
  shape s = p.shape();
  s.G = p.k.heads;
  m.phi().check(s);
  const isize r = m.phi().features(p.q.width);
  require(r >= 1, "the feature map makes ", r, " features of rows of width ", p.q.width, "; wanted at least one");
  require(m.gamma.size() <= 1 || static_cast<isize>(m.gamma.size()) == p.v.heads, "gamma holds ", m.gamma.size(),
          " numbers; wanted one, or one for each of ", p.v.heads, " KV heads");
  check_gates(m, p, r);
}

}  // namespace detail

inline void linear_attention::check(const problem& p) const { detail::check_linear(*this, p); }

inline void linear_attention::check(const problem& p, const state& s) const {
  require(streaming(), "this linear attention keeps no state: ",
          is_causal ? "its feature map needs all keys at once" : "is_causal is false");
  detail::check_linear(*this, p);
  s.check(tag(), p.shape(), name);
  require(s.bytes() == state_bytes(p.shape()), "the state holds ", s.bytes(), " bytes; this call needs ",
          state_bytes(p.shape()));
}

}  // namespace FOVEA_ABI
}  // namespace fovea
