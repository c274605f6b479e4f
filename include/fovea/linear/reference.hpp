// SPDX-License-Identifier: MIT
#pragma once
/// @file  Linear attention from its definition: one token after the other in plain double loops. The twin that tests compare with.
///
///   S <- A_t S,   x = the rule's value,   S <- S + phi(k) x^T,   z <- A_t z + phi(k),   o = scale phi(q) S / (phi(q).z)
///
/// Contract   the problem has passed linear_attention::check. `S` and `z`, where given, are the initial state if they are not empty
///            ([B, G, r, e] and [B, G, r]) and hold the final state afterwards.
/// Cost       as slow as it is plain.

#include <cmath>
#include <limits>
#include <vector>

#include <fovea/linear.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

struct linear_state {
  std::vector<double> S, z;
};

namespace detail {

/// One KV head: its state, and the factor e^peak that state and keys lack where a map is log-scaled.
struct linear_head {
  isize r, e;
  double *S, *z;
  double peak;
};

inline double gate(const tensor_ref& g, isize b, isize h, isize t, isize c, double otherwise) {
  return g ? g.get(b, h, t, g.width == 1 ? 0 : c) : otherwise;
}

/// Takes key t in.
inline void absorb(const linear_attention& m, const problem& p, isize b, isize h, isize t, std::vector<double> k,
                   double log_scale, linear_head& s) {
  if (log_scale > s.peak) {
    const double fade = std::exp(s.peak - log_scale);
    for (isize i = 0; i < s.r * s.e; ++i) s.S[i] *= fade;
    for (isize f = 0; f < s.r; ++f) s.z[f] *= fade;
    s.peak = log_scale;
  }
  const double own = m.phi().log_scaled() && log_scale != s.peak ? std::exp(log_scale - s.peak) : 1.0;
  for (isize f = 0; f < s.r; ++f) {
    k[static_cast<std::size_t>(f)] *= own;
    double a = p.gates.log_decay ? std::exp(gate(p.gates.log_decay, b, h, t, f, 0.0)) : 1.0;
    if (!m.gamma.empty()) a = m.gamma[m.gamma.size() == 1 ? 0 : static_cast<std::size_t>(h)];
    for (isize c = 0; c < s.e; ++c) s.S[f * s.e + c] *= a;
    s.z[f] = a * s.z[f] + k[static_cast<std::size_t>(f)];
  }
  std::vector<double> x(static_cast<std::size_t>(s.e));
  for (isize c = 0; c < s.e; ++c) {
    double v = p.v.get(b, h, t, c), seen = 0.0;
    for (isize f = 0; f < s.r && is_delta(m.rule); ++f)
      seen += s.S[f * s.e + c] * k[static_cast<std::size_t>(f)] * gate(p.gates.erase, b, h, t, f, 1.0);
    v *= gate(p.gates.write, b, h, t, c, 1.0);
    x[static_cast<std::size_t>(c)] = is_delta(m.rule) ? gate(p.gates.beta, b, h, t, 0, 1.0) * (v - seen) : v;
  }
  for (isize f = 0; f < s.r; ++f)
    for (isize c = 0; c < s.e; ++c) s.S[f * s.e + c] += k[static_cast<std::size_t>(f)] * x[static_cast<std::size_t>(c)];
}

/// Writes the output row of query i, whose features lack a factor e^log_scale.
inline void answer(const linear_attention& m, const problem& p, isize b, isize head, isize i,
                   const std::vector<double>& q, double log_scale, const linear_head& s) {
  double den = 0.0, sum = 0.0;
  for (isize f = 0; f < s.r; ++f) den += q[static_cast<std::size_t>(f)] * s.z[f], sum += q[static_cast<std::size_t>(f)];
  const double lacks = m.phi().log_scaled() ? log_scale + s.peak : 0.0;
  if (m.eps > 0.0) den += m.eps * std::exp(-lacks);
  if (m.key_sum_eps > 0.0) den += m.key_sum_eps * sum * (m.phi().log_scaled() ? std::exp(-s.peak) : 1.0);
  if (m.clamp > 0.0) den = std::fmax(den, m.clamp * std::exp(-lacks));
  for (isize c = 0; c < s.e; ++c) {
    double o = 0.0;
    for (isize f = 0; f < s.r; ++f) o += q[static_cast<std::size_t>(f)] * s.S[f * s.e + c];
    if (m.normalised())
      o = den == 0.0 ? 0.0 : o / den;
    else
      o *= std::exp(lacks);
    p.out.set(b, head, i, c, m.scale * o);
  }
}

}  // namespace detail

inline void prefill(const linear_attention& m, const problem& p, linear_state* state = nullptr,
                    isize first_position = 0) {
  const feature_map map = m.phi();
  const isize G = p.v.heads, H = p.q.heads, R = H > G ? H / G : 1, r = map.features(p.q.width), e = p.v.width,
              d = p.q.width;
  linear_state own;
  linear_state& s = state != nullptr ? *state : own;
  const double start = map.log_scaled() && s.S.empty() ? -std::numeric_limits<double>::infinity() : 0.0;
  s.S.resize(static_cast<std::size_t>(p.q.batch * G * r * e)), s.z.resize(static_cast<std::size_t>(p.q.batch * G * r));
  std::vector<double> x(static_cast<std::size_t>(d)), phi(static_cast<std::size_t>(r));
  const auto row = [&](const tensor_ref& from, isize b, isize h, isize i) {
    for (isize c = 0; c < d; ++c) x[static_cast<std::size_t>(c)] = from.get(b, h, i, c);
  };
  for (isize b = 0; b < p.q.batch; ++b)
    for (isize g = 0; g < G; ++g) {
      const isize kh = g / (G / p.k.heads);
      const auto at = static_cast<std::size_t>(b * G + g), width = static_cast<std::size_t>(r);
      detail::linear_head head{r, e, s.S.data() + at * width * static_cast<std::size_t>(e), s.z.data() + at * width,
                               start};
      feature_site key{kh * (H / p.k.heads), kh, 0, true, -std::numeric_limits<double>::infinity()};
      for (isize j = 0; map.surveys() && j < p.k.length; ++j) {
        row(p.k, b, kh, j);
        key.position = first_position + j;
        key.survey = std::fmax(key.survey, map.define_survey(key, x.data(), d));
      }
      const isize shift = m.is_causal ? p.k.length - p.q.length : std::max(isize{0}, p.k.length - p.q.length);
      const auto ask = [&](isize i) {
        for (isize n = 0; n < R; ++n) {
          const isize out_head = g * R + n, q_head = H >= G ? out_head : kh;
          row(p.q, b, q_head, i);
          const feature_site query{q_head, kh, first_position + i + shift, false, 0.0};
          const double log_scale = map.define(query, x.data(), d, phi.data());
          detail::answer(m, p, b, out_head, i, phi, log_scale, head);
        }
      };
      const isize first = p.k.length - p.q.length;  // the key that query 0 stands at
      if (m.is_causal)
        for (isize i = 0; i < p.q.length && i < -first; ++i)
          for (isize n = 0; n < R; ++n)
            for (isize c = 0; c < e; ++c) p.out.set(b, g * R + n, i, c, 0.0);
      for (isize j = 0; j < p.k.length; ++j) {
        row(p.k, b, kh, j);
        key.position = first_position + j;
        const double log_scale = map.define(key, x.data(), d, phi.data());
        detail::absorb(m, p, b, g, j, phi, log_scale, head);
        if (m.is_causal && j >= first) ask(j - first);
      }
      for (isize i = 0; !m.is_causal && i < p.q.length; ++i) ask(i);
      for (isize i = 0; map.log_scaled() && state != nullptr && i < r * e; ++i) head.S[i] *= std::exp(head.peak);
      for (isize i = 0; map.log_scaled() && state != nullptr && i < r; ++i) head.z[i] *= std::exp(head.peak);
    }
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
