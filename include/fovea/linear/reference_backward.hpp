// SPDX-License-Identifier: MIT
#pragma once
/// @file  Gradients of linear attention from their definition, in double: the recurrence token by token, then backwards through it.
///
///   S' = A_t S_{t-1},  y = S'^T u_t,  x = beta (w_t v_t - y) or v_t,  S_t = S' + k_t x^T,  z_t = A_t z_{t-1} + k_t,  o_i = scale q_i S / den
///   dS += q dn^T,  dk = dS x (+ dz),  dx = dS^T k,  dy = -beta dx,  dS' = dS + u dy^T,  du = S' dy,  dlog a = sum a dS' S_{t-1},  dS_{t-1} = A dS'
///
/// Contract   features come with their scale, so e^log_scale must be a moderate number. The derivative of a map is the difference
///            quotient of its `define`, its survey held fixed. Keeps every state: slow and large on purpose.

#include <fovea/linear/reference.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

/// Dense row-major, in the shapes of what they belong to; those of gates are empty where the call has none.
struct linear_gradients {
  std::vector<double> dq, dk, dv, dlog_decay, dbeta, derase, dwrite, dS, dz;
};

namespace detail {

using column = std::vector<double>;
inline std::size_t index(isize i) { return static_cast<std::size_t>(i); }

/// phi with its scale.
inline column whole_features(const feature_map& map, const feature_site& at, const column& x) {
  const isize d = static_cast<isize>(x.size());
  column phi(index(map.features(d)));
  const double scale = std::exp(map.define(at, x.data(), d, phi.data()));
  for (double& y : phi) y *= map.log_scaled() ? scale : 1.0;
  return phi;
}
/// sum over f of dphi_f by x, by difference quotients.
inline column through_map(const feature_map& map, const feature_site& at, column x, const column& dphi) {
  column dx(x.size());
  const double step = 1e-6;
  for (std::size_t c = 0; c < x.size(); ++c) {
    const double x0 = x[c];
    double sum = 0;
    for (const double sign : {1.0, -1.0}) {
      x[c] = x0 + sign * step;
      const column phi = whole_features(map, at, x);
      for (std::size_t f = 0; f < phi.size(); ++f) sum += sign * phi[f] * dphi[f];
    }
    x[c] = x0, dx[c] = sum / (2 * step);
  }
  return dx;
}
inline column row_of(const tensor_ref& t, isize b, isize h, isize i) {
  column x(index(t.width));
  for (isize c = 0; c < t.width; ++c) x[index(c)] = t.get(b, h, i, c);
  return x;
}
inline void add_row(column& to, isize row, const column& x) {
  for (std::size_t c = 0; c < x.size(); ++c) to[index(row) * x.size() + c] += x[c];
}

/// One state head of one batch item: its tokens' features and every state.
struct linear_tape {
  const linear_attention& m;
  const backward_problem& p;
  isize b, g, r, e;
  std::vector<column> k, u, v, a, x, S, z;  // S[t], z[t]: before token t
  column beta;

  double decay(isize t, isize f) const {
    if (!m.gamma.empty()) return m.gamma[m.gamma.size() == 1 ? 0 : index(g)];
    return p.gates.log_decay ? std::exp(gate(p.gates.log_decay, b, g, t, f, 0.0)) : 1.0;
  }
  void absorb(isize t, const column& key) {
    column faded = S.back(), next_z = z.back(), value(index(e)), own(index(r)), erases(index(r));
    for (isize f = 0; f < r; ++f) {
      own[index(f)] = decay(t, f), erases[index(f)] = key[index(f)] * gate(p.gates.erase, b, g, t, f, 1.0);
      next_z[index(f)] = own[index(f)] * next_z[index(f)] + key[index(f)];
      for (isize c = 0; c < e; ++c) faded[index(f * e + c)] *= own[index(f)];
    }
    const double write = gate(p.gates.beta, b, g, t, 0, 1.0);
    for (isize c = 0; c < e; ++c) {
      double seen = 0;
      for (isize f = 0; f < r && is_delta(m.rule); ++f) seen += faded[index(f * e + c)] * erases[index(f)];
      value[index(c)] = p.v.get(b, g, t, c) * gate(p.gates.write, b, g, t, c, 1.0) - seen;
      if (is_delta(m.rule)) value[index(c)] *= write;
    }
    for (isize f = 0; f < r; ++f)
      for (isize c = 0; c < e; ++c) faded[index(f * e + c)] += key[index(f)] * value[index(c)];
    k.push_back(key), u.push_back(erases), a.push_back(own), x.push_back(value), beta.push_back(write);
    S.push_back(faded), z.push_back(next_z);
  }
};

/// Query i of `head` against state S, z: adds to dS and dz, returns dphi.
inline column ask_back(const linear_tape& at, isize head, isize i, const column& q, const column& S, const column& z,
                       column& dS, column& dz) {
  const linear_attention& m = at.m;
  const column g = row_of(at.p.dout, at.b, head, i);
  double den = m.eps, sum = 0, along = 0;
  for (isize f = 0; f < at.r; ++f) den += q[index(f)] * z[index(f)], sum += q[index(f)];
  den += m.key_sum_eps * sum;
  const bool held = m.clamp > 0 && den < m.clamp;
  if (held) den = m.clamp;
  const double gain = !m.normalised() ? m.scale : den == 0 ? 0.0 : m.scale / den;
  column dq(index(at.r), 0.0);
  for (isize f = 0; f < at.r; ++f)
    for (isize c = 0; c < at.e; ++c) {
      const std::size_t fc = index(f * at.e + c);
      dq[index(f)] += gain * g[index(c)] * S[fc];
      dS[fc] += gain * g[index(c)] * q[index(f)];
      along += gain * g[index(c)] * S[fc] * q[index(f)];
    }
  if (!m.normalised() || held || den == 0) return dq;
  for (isize f = 0; f < at.r; ++f) {
    dq[index(f)] -= along / den * (z[index(f)] + m.key_sum_eps);
    dz[index(f)] -= along / den * q[index(f)];
  }
  return dq;
}

/// Token t backwards: dS and dz become those of the state before it; returns dphi of the key.
inline column absorb_back(const linear_tape& at, isize t, column& dS, column& dz, linear_gradients& out) {
  const linear_attention& m = at.m;
  const isize row = (at.b * at.p.v.heads + at.g) * at.p.v.length + t, r = at.r, e = at.e;
  const column &k = at.k[index(t)], &u = at.u[index(t)], &x = at.x[index(t)], &a = at.a[index(t)];
  column dk(dz), du(index(r), 0.0), dx(index(e), 0.0), faded(at.S[index(t)]), dv(index(e)), dlog(index(r), 0.0);
  if (!m.normalised()) dk.assign(index(r), 0.0);
  for (isize f = 0; f < r; ++f)
    for (isize c = 0; c < e; ++c) {
      const std::size_t fc = index(f * e + c);
      faded[fc] *= a[index(f)], dk[index(f)] += dS[fc] * x[index(c)], dx[index(c)] += dS[fc] * k[index(f)];
    }
  double dbeta = 0;
  for (isize c = 0; c < e; ++c) {
    const double write = gate(at.p.gates.write, at.b, at.g, t, c, 1.0),
                 beta = is_delta(m.rule) ? at.beta[index(t)] : 1.0;
    dv[index(c)] = beta * dx[index(c)] * write;
    if (at.p.gates.write) out.dwrite[index(row * e + c)] += beta * dx[index(c)] * at.p.v.get(at.b, at.g, t, c);
    double seen = 0;
    for (isize f = 0; f < r && is_delta(m.rule); ++f) {
      const std::size_t fc = index(f * e + c);
      seen += faded[fc] * u[index(f)], du[index(f)] -= beta * faded[fc] * dx[index(c)];
      dS[fc] -= beta * u[index(f)] * dx[index(c)];
    }
    dbeta += dx[index(c)] * (at.p.v.get(at.b, at.g, t, c) * write - seen);
  }
  add_row(out.dv, row, dv);
  if (at.p.gates.beta) out.dbeta[index(row)] = dbeta;
  for (isize f = 0; f < r; ++f) {
    if (at.p.gates.erase) out.derase[index(row * r + f)] = du[index(f)] * k[index(f)];
    dk[index(f)] += du[index(f)] * gate(at.p.gates.erase, at.b, at.g, t, f, 1.0);
    for (isize c = 0; c < e; ++c) {
      const std::size_t fc = index(f * e + c);
      dlog[index(f)] += dS[fc] * faded[fc], dS[fc] *= a[index(f)];
    }
    if (m.normalised()) dlog[index(f)] += dz[index(f)] * at.z[index(t)][index(f)] * a[index(f)];
    dz[index(f)] *= a[index(f)];
  }
  const isize width = at.p.gates.log_decay ? at.p.gates.log_decay.width : 0;
  for (isize f = 0; f < r && width > 0; ++f)
    out.dlog_decay[index(row * width + (width == 1 ? 0 : f))] += dlog[index(f)];
  return dk;
}

}  // namespace detail

/// `p.out` and `p.to` are not used.
inline linear_gradients backward(const linear_attention& m, const backward_problem& p) {
  using detail::column, detail::index;
  const feature_map map = m.phi();
  const isize B = p.q.batch, G = p.v.heads, K = p.k.heads, H = p.q.heads, R = H > G ? H / G : 1, n = p.q.length,
              t_end = p.k.length, r = map.features(p.q.width), e = p.v.width;
  const auto room = [](const tensor_ref& t) {
    return column(index(t ? t.batch * t.heads * t.length * t.width : 0), 0.0);
  };
  linear_gradients out{room(p.q),
                       room(p.k),
                       room(p.v),
                       room(p.gates.log_decay),
                       room(p.gates.beta),
                       room(p.gates.erase),
                       room(p.gates.write),
                       column(index(B * G * r * e)),
                       column(index(B * G * r))};
  for (isize b = 0; b < B; ++b)
    for (isize g = 0; g < G; ++g) {
      const isize kh = g / (G / K);
      feature_site key{kh * (H / K), kh, 0, true, -std::numeric_limits<double>::infinity()};
      for (isize j = 0; map.surveys() && j < t_end; ++j)
        key.survey = std::fmax(key.survey, map.define_survey(key, detail::row_of(p.k, b, kh, j).data(), p.k.width));
      detail::linear_tape tape{m, p, b, g, r, e, {}, {}, {}, {}, {}, {}, {}, {}};
      const auto state = [&](const tensor_ref& t, isize width) {
        column s(index(r * width), 0.0);
        for (isize f = 0; t && f < r; ++f)
          for (isize c = 0; c < width; ++c) s[index(f * width + c)] = t.get(b, g, f, c);
        return s;
      };
      tape.S.push_back(state(p.from.S, e)), tape.z.push_back(state(p.from.z, 1));
      const auto key_site = [&](isize j) {
        key.position = p.from.tokens + j;
        return key;
      };
      for (isize j = 0; j < t_end; ++j)
        tape.absorb(j, detail::whole_features(map, key_site(j), detail::row_of(p.k, b, kh, j)));
      column dS = state(p.dS_end, e), dz = state(p.dz_end, 1);
      const isize shift = m.is_causal ? t_end - n : std::max(isize{0}, t_end - n);
      const auto ask = [&](isize i, isize seen) {
        for (isize h = 0; h < R; ++h) {
          const isize head = g * R + h, q_head = H >= G ? head : kh;
          const feature_site at{q_head, kh, p.from.tokens + i + shift, false, 0.0};
          const column x = detail::row_of(p.q, b, q_head, i);
          const column dphi = detail::ask_back(tape, head, i, detail::whole_features(map, at, x), tape.S[index(seen)],
                                               tape.z[index(seen)], dS, dz);
          detail::add_row(out.dq, (b * H + q_head) * n + i, detail::through_map(map, at, x, dphi));
        }
      };
      for (isize i = 0; !m.is_causal && i < n; ++i) ask(i, t_end);
      for (isize j = t_end - 1; j >= 0; --j) {
        if (m.is_causal && j - (t_end - n) >= 0) ask(j - (t_end - n), j + 1);
        const column dphi = detail::absorb_back(tape, j, dS, dz, out);
        detail::add_row(out.dk, (b * K + kh) * t_end + j,
                        detail::through_map(map, key_site(j), detail::row_of(p.k, b, kh, j), dphi));
      }
      for (isize f = 0; f < r; ++f) {
        out.dz[index((b * G + g) * r + f)] = dz[index(f)];
        for (isize c = 0; c < e; ++c) out.dS[index(((b * G + g) * r + f) * e + c)] = dS[index(f * e + c)];
      }
    }
  return out;
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
