// SPDX-License-Identifier: MIT
#pragma once
/// @file  The state of DiJiang attention, the references that keep it in range, and the contract of a call.
///
///   per batch item and KV head:   S [panels][r][128 bytes]   z [rows]   c [rows]   g [16]
///   S and z lack the factor e^{c_f} in row f, and e^{g_0} in all rows
///
/// A reference is raised to L + margin whenever a key brings an exponent L above it: keys are then written as e^{L - c} <= 1, what
/// was written before fades by e^{c_old - c_new}, and a query weighs feature f by e^{L_f + c_f - max}. Raising is rare after the
/// first tokens. One reference per feature, not one for all: a query may look at a feature that is e^-200 of the largest.

#include <algorithm>

#include <fovea/dijiang/mechanism.hpp>
#include <fovea/kernel/linear_sweep.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline constexpr double dijiang_margin = 12.0, dijiang_never = -1e30;

struct dijiang_sizes {
  isize B, G, R, r, e, width, panels, rows;
  isize S_elements() const { return panels * r * width; }
  isize head_elements() const { return S_elements() + 2 * rows + 16; }
};
inline dijiang_sizes sizes_of(const dijiang_attention& m, const shape& s) {
  const isize r = m.tables->r, width = s.type == dtype::f64 ? kernel::panel_width<double> : kernel::panel_width<float>;
  return {s.B, s.G, s.group(), r, s.e, width, ceil_div(s.e, width), ceil_div(r, isize{16}) * 16};
}

template <class Acc>
struct dijiang_head {
  Acc *S, *z, *c, *g;
  dijiang_head(Acc* at, const dijiang_sizes& n) : S(at), z(at + n.S_elements()), c(z + n.rows), g(c + n.rows) {}
};

template <class Acc>
void clear_head(Acc* at, const dijiang_sizes& n) {
  const dijiang_head<Acc> head(at, n);
  for (isize i = 0; i < n.head_elements(); ++i) at[i] = Acc(0);
  for (isize f = 0; f < n.rows; ++f) head.c[f] = static_cast<Acc>(dijiang_never);
  head.g[0] = static_cast<Acc>(dijiang_never);
}

/// a becomes the join of a and, after it, b.
template <class Acc>
void merge_heads(const dijiang_attention& m, const dijiang_sizes& n, isize head, isize later_tokens, Acc* a,
                 const Acc* b) {
  const dijiang_head<Acc> to(a, n), from(const_cast<Acc*>(b), n);
  const auto& gamma = m.tables->gamma;
  const double rate = gamma.empty() ? 1.0 : gamma[gamma.size() == 1 ? 0 : static_cast<std::size_t>(head)];
  const double faded = std::pow(rate, static_cast<double>(later_tokens));
  for (isize f = 0; f < n.r; ++f) {
    const Acc top = std::max(to.c[f], from.c[f]);
    const Acc x = static_cast<Acc>(faded * std::exp(static_cast<double>(to.c[f]) - static_cast<double>(top)));
    const Acc y = static_cast<Acc>(std::exp(static_cast<double>(from.c[f]) - static_cast<double>(top)));
    to.c[f] = top;
    to.z[f] = x * to.z[f] + y * from.z[f];
    for (isize panel = 0; panel < n.panels; ++panel)
      for (isize c = 0; c < n.width; ++c) {
        const isize at = (panel * n.r + f) * n.width + c;
        to.S[at] = x * to.S[at] + y * from.S[at];
      }
  }
}

inline void check_dijiang(const dijiang_attention& m, const problem& p, isize past) {
  require(m.tables != nullptr, "dijiang has no tables; use dijiang_attention::make");
  const auto& t = *m.tables;
  check_problem(p);
  require(!p.lse, "lse was asked for; dijiang has no log-sum-exp");
  require(p.q.width == t.d, "q and k are ", p.q.width, " wide; this dijiang was made for head_dim = ", t.d);
  require(t.heads() == 1 || t.heads() == p.k.heads, "t and D are for ", t.heads(), " KV heads and k has ", p.k.heads);
  require(t.gamma.size() <= 1 || static_cast<isize>(t.gamma.size()) == p.k.heads, "gamma holds ", t.gamma.size(),
          " numbers; wanted one, or one for each of ", p.k.heads, " KV heads");
  require(m.is_causal || (t.gamma.empty() && !t.gains()), "is_causal is false; gamma and gains need an order");
  if (!t.gains()) return;
  const isize q_heads = static_cast<isize>(t.log_d1.size()) / t.positions,
              k_heads = static_cast<isize>(t.log_d2.size()) / t.positions;
  require(q_heads * t.positions == static_cast<isize>(t.log_d1.size()) && q_heads == p.q.heads, "log_d1 holds ",
          t.log_d1.size(), " numbers; wanted ", p.q.heads, " query heads x ", t.positions, " positions");
  require(k_heads * t.positions == static_cast<isize>(t.log_d2.size()) && k_heads == p.k.heads, "log_d2 holds ",
          t.log_d2.size(), " numbers; wanted ", p.k.heads, " KV heads x ", t.positions, " positions");
  require(past + p.k.length <= t.positions, "the sequence reaches position ", past + p.k.length - 1,
          "; log_d1 and log_d2 end at position ", t.positions - 1);
}

}  // namespace detail

inline void dijiang_attention::check(const problem& p) const { detail::check_dijiang(*this, p, 0); }

inline void dijiang_attention::check(const problem& p, const state& s) const {
  require(is_causal, "this dijiang keeps no state: is_causal is false");
  detail::check_dijiang(*this, p, s.tokens());
  s.check(tag(), p.shape(), name);
  require(s.bytes() == state_bytes(p.shape()), "the state holds ", s.bytes(), " bytes; this call needs ",
          state_bytes(p.shape()));
}

inline std::uint64_t dijiang_attention::tag() const {
  detail::fingerprint f;
  f.text(name).number(normalise ? 1.0 : 0.0);
  if (tables == nullptr) return f.value;
  const auto& t = *tables;
  f.number(static_cast<double>(t.form)).number(static_cast<double>(t.d)).number(static_cast<double>(t.r));
  const auto floats = [&](const std::vector<float>& x) {
    f.number(static_cast<double>(x.size())).bytes(x.data(), x.size() * sizeof(float));
  };
  floats(t.t), floats(t.signs), floats(t.D), floats(t.log_d1), floats(t.log_d2);
  f.bytes(t.gamma.data(), t.gamma.size() * sizeof(double));
  return f.value;
}

inline std::size_t dijiang_attention::state_bytes(const shape& s) const {
  const auto n = detail::sizes_of(*this, s);
  return static_cast<std::size_t>(n.B * n.G * n.head_elements()) *
         (s.type == dtype::f64 ? sizeof(double) : sizeof(float));
}

inline state dijiang_attention::make_state(const shape& s) const {
  require(is_causal, "this dijiang keeps no state: is_causal is false");
  require(tables != nullptr, "dijiang has no tables; use dijiang_attention::make");
  require(s.B >= 0 && s.G >= 1 && s.H % s.G == 0 && s.d == tables->d && s.e >= 1, "make_state: B, H, G, d, e are ", s.B,
          ", ", s.H, ", ", s.G, ", ", s.d, ", ", s.e, "; wanted H a multiple of G, d = ", tables->d,
          " and positive sizes");
  state out(tag(), s, state_bytes(s));
  const auto n = detail::sizes_of(*this, s);
  for (isize i = 0; i < n.B * n.G; ++i)
    s.type == dtype::f64 ? detail::clear_head(out.as<double>() + i * n.head_elements(), n)
                         : detail::clear_head(out.as<float>() + i * n.head_elements(), n);
  return out;
}

inline void dijiang_attention::merge(state& earlier, const state& later) const {
  require(tables != nullptr && !tables->gains(),
          "merge: log_d1 and log_d2 belong to absolute positions, which the later state counted from 0");
  earlier.check(tag(), later.sizes(), name);
  later.check(tag(), earlier.sizes(), name);
  require(earlier.bytes() == later.bytes(), "merge: the states hold ", earlier.bytes(), " and ", later.bytes(),
          " bytes");
  const auto n = detail::sizes_of(*this, earlier.sizes());
  for (isize i = 0; i < n.B * n.G; ++i) {
    const isize at = i * n.head_elements();
    if (earlier.sizes().type == dtype::f64)
      detail::merge_heads<double>(*this, n, i % n.G, later.tokens(), earlier.as<double>() + at,
                                  later.as<double>() + at);
    else
      detail::merge_heads<float>(*this, n, i % n.G, later.tokens(), earlier.as<float>() + at, later.as<float>() + at);
  }
  earlier.set_tokens(earlier.tokens() + later.tokens());
}

inline double dijiang_attention::macs(const shape& s) const {
  const double r = static_cast<double>(tables->r), e = static_cast<double>(s.e),
               map = dijiang_map{tables.get()}.macs(s.d);
  const double queries = static_cast<double>(s.B * s.H * s.n), keys = static_cast<double>(s.B * s.G * s.m);
  return queries * (map + r * (e + (normalise ? 1.0 : 0.0))) + keys * (map + r * e);
}
inline double dijiang_attention::step_macs(const shape& s) const {
  shape one = s;
  one.n = one.m = 1;
  return macs(one);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
