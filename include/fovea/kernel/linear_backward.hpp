// SPDX-License-Identifier: MIT
#pragma once
/// @file  One chunk of a linear recurrence, forwards for its state and backwards for all gradients, as products of small matrices.
///
///   rows of a chunk: q, k, u (what erases: k, or k times a gate), v, beta;  a_t its decays;  w(i, j) = a_{j+1} ... a_i, never > 1
///   P_ij = sum_c q_ic k_jc w_c(i, j), j <= i        M_ij = sum_c u_ic k_jc w_c(i, j), j < i       (one w for all c, or one each)
///   X: (1 + beta M) X = beta (v - w(i, start) u S0)      o = w q S0 + P X      S = w S0 + sum_j (w k_j) x_j^T      without erasure X = v
///   dX = P^T do + (w k) dS        (1 + beta M)^T dR = dX        dM = -beta dR X^T        dP = do X^T        ... and so on by the product rule
///   dg_t = <dS, S>_end + sum_{i >= t} (q_i.dq_i + u_i.du_i - k_i.dk_i):   what has a factor a_t, counted once, without any division
///
/// Contract   at most `most` tokens. Decays enter as products of factors in [0, 1]: an a of 0 forgets exactly, nothing overflows.
/// Numerics   one chain of fused multiply-adds an element in an order that shape alone decides.
/// Source     docs/mechanisms/linear.md (chunkwise forms); the derivation follows the product rule line by line.

#include <fovea/core/workspace.hpp>
#include <fovea/kernel/linear_backward_pairs.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Sizes that all chunks of a head share, and what the rule asks for.
struct backward_form {
  isize r, e, ld, le;  ///< features, value width, and the distances of their rows
  isize R;             ///< query heads of the state
  bool decays, channel, erases, normalised;
};

/// Rows of one chunk; gradients are written, except dq, dk, du (added to).
template <class Acc>
struct backward_chunk {
  isize rows = 0;
  const Acc *k = nullptr, *u = nullptr, *v = nullptr, *a = nullptr, *beta = nullptr;  // a: [rows], or [rows][ld]
  const Acc *q = nullptr, *dout = nullptr;  // [R][...], q_head and dout_head apart; null: no queries here
  isize q_head = 0, dout_head = 0, row_head = 0, v_row = 0,
        dout_row = 0;  ///< distances of heads, and of rows of v and dout
  const Acc *delta = nullptr, *gain = nullptr, *add = nullptr, *floor = nullptr, *key_eps = nullptr;  // [R][row_head]
  Acc *dq = nullptr, *dk = nullptr, *du = nullptr, *dv = nullptr, *dbeta = nullptr, *dlog = nullptr;  // dlog as a
};

template <class Arch, class Acc>
class linear_backward {
 public:
  static constexpr isize most = 64;                                           // tokens of a chunk
  static constexpr isize chunk(bool channel) { return channel ? 16 : most; }  // pairs of a channel form are no product
  using P = simd::pack<Acc, Arch>;
  using pairs = chunk_pairs<Arch, Acc>;
  static constexpr isize ld_pairs = most;

  linear_backward(arena& a, const backward_form& form) : f(form), rows_(chunk(form.channel)) {
    const isize state = f.r * f.e;
    side = a.take<Acc>(rows_ * f.ld), left = a.take<Acc>(rows_ * f.ld), top = a.take<Acc>(rows_ * f.ld);
    right = a.take<Acc>(rows_ * f.ld), part = a.take<Acc>(rows_ * f.ld), turned = a.take<Acc>(f.r * rows_);
    w = a.take<Acc>(rows_ * ld_pairs), p = a.take<Acc>(rows_ * ld_pairs), dp = a.take<Acc>(rows_ * ld_pairs);
    x_turned = a.take<Acc>(f.e * rows_), state_turned = a.take<Acc>(state), dstate_turned = a.take<Acc>(state);
    dn = a.take<Acc>(rows_ * f.le), dd = a.take<Acc>(f.R * rows_), dx = a.take<Acc>(rows_ * f.le);
    carry = a.take<Acc>(f.ld), work = a.take<Acc>(2 * f.ld);
    if (!f.erases) return;
    m = a.take<Acc>(rows_ * ld_pairs), solver = a.take<Acc>(rows_ * ld_pairs), x = a.take<Acc>(rows_ * f.le),
    miss = a.take<Acc>(rows_ * f.le);
  }

  /// S [r][e] and z [r] move over the chunk.
  void advance(const backward_chunk<Acc>& b, Acc* S, Acc* z) {
    prepare(b);
    const Acc* values = f.erases ? solve_values(b, S) : b.v;
    fade(b.rows, S, z);
    tile::gemm<Arch, Acc>(f.r, f.e, b.rows, right, 1, f.ld, values, f.erases ? f.le : b.v_row, S, f.e, true);
    for (isize j = 0; f.normalised && j < b.rows; ++j)
      for (isize c = 0; c < f.r; ++c) z[c] += right[j * f.ld + c];
  }

  /// From the states before and behind the chunk; dS and dz move from behind the chunk to before it.
  void backward(const backward_chunk<Acc>& b, const Acc* S, const Acc* z, const Acc* S_end, const Acc* z_end, Acc* dS,
                Acc* dz) {
    prepare(b);
    const isize n = b.rows;
    const Acc* values = f.erases ? solve_values(b, S) : b.v;
    const isize v_row = f.erases ? f.le : b.v_row;
    if (b.dlog != nullptr) carry_over(S_end, z_end, dS, dz);
    turn(values, n, f.e, v_row, x_turned, rows_), turn(S, f.r, f.e, f.e, state_turned, f.r);
    turn(dS, f.r, f.e, f.e, dstate_turned, f.r);
    tile::gemm<Arch, Acc>(n, f.e, f.r, right, f.ld, 1, dS, f.e, dx, f.le, false);  // dX from later tokens
    // dk from later tokens: w k is linear in dS x
    tile::gemm<Arch, Acc>(n, f.r, f.e, values, v_row, 1, dstate_turned, f.r, part, f.ld, false);
    for (isize j = 0; j < n; ++j)
      add_product(b.dk + j * f.ld, part + j * f.ld, f.normalised ? dz : nullptr, fall(j), j);
    fade(n, dS, dz);
    for (isize h = 0; b.q != nullptr && h < f.R; ++h) head(b, h, z, dS, dz);
    if (f.erases)
      erase(b, dS);
    else
      copy(dx, b.dv, n);
    if (b.dlog != nullptr) decay_gradient(b);
    if (f.normalised && b.q != nullptr && b.key_eps != nullptr) add_key_eps(b);
  }

 private:
  /// w(i, start) in `side` (or all ones), w(end, j) k_j in `right`, the table w, k turned.
  void prepare(const backward_chunk<Acc>& b) {
    b_ = &b;
    const isize n = b.rows;
    turn(b.k, n, f.r, f.ld, turned, rows_);
    if (!f.channel) pairs::table(n, f.decays ? b.a : nullptr, w, ld_pairs);
    for (isize i = 0; f.decays && i < n; ++i) {  // products from the start
      const isize width = f.channel ? f.r : 1;
      const Acc *now = f.channel ? b.a + i * f.ld : b.a + i, *before = side + (i - 1) * f.ld;
      for (isize c = 0; c < width; ++c) side[i * f.ld + c] = i == 0 ? now[c] : before[c] * now[c];
    }
    for (isize c = 0; f.channel && c < f.r; ++c) work[c] = Acc(1);
    for (isize j = n - 1; j >= 0; --j) {
      const Acc* k = b.k + j * f.ld;
      Acc* to = right + j * f.ld;
      if (f.channel) {
        Acc* keep = top + j * f.ld;  // w_c(end, j)
        for (isize c = 0; c < f.r; ++c) keep[c] = work[c], to[c] = k[c] * work[c], work[c] *= b.a[j * f.ld + c];
      } else {
        const Acc s = f.decays ? w[(n - 1) * ld_pairs + j] : Acc(1);
        for (isize c = 0; c < f.r; ++c) to[c] = k[c] * s;
      }
    }
  }
  /// to[i] = w(i, start) from[i]
  void fade_rows(const Acc* from, isize n, Acc* to) const {
    for (isize i = 0; i < n; ++i) {
      const Acc *x0 = from + i * f.ld, *s = side + i * f.ld;
      Acc* y = to + i * f.ld;
      if (f.channel)
        for (isize c = 0; c < f.r; ++c) y[c] = x0[c] * s[c];
      else
        for (isize c = 0; c < f.r; ++c) y[c] = f.decays ? x0[c] * s[0] : x0[c];
    }
  }
  void fade(isize n, Acc* S, Acc* z) const {
    if (!f.decays || n == 0) return;
    const Acc* s = side + (n - 1) * f.ld;
    for (isize c = 0; c < f.r; ++c) {
      const Acc one = s[f.channel ? c : 0];
      for (isize y = 0; y < f.e; ++y) S[c * f.e + y] *= one;
      if (f.normalised) z[c] *= one;
    }
  }
  const Acc* fall(isize j) const { return f.channel ? top + j * f.ld : nullptr; }
  /// to += (from + extra) * w(end, j)
  void add_product(Acc* to, const Acc* from, const Acc* extra, const Acc* by, isize j) const {
    const Acc s = !f.channel && f.decays ? w[(b_->rows - 1) * ld_pairs + j] : Acc(1);
    for (isize c = 0; c < f.r; ++c) {
      const Acc sum = extra != nullptr ? from[c] + extra[c] : from[c];
      to[c] += sum * (by != nullptr ? by[c] : s);
    }
  }

  /// M in `m`, v - w u S0 in `miss`, and X.
  const Acc* solve_values(const backward_chunk<Acc>& b, const Acc* S) {
    const isize n = b.rows;
    f.channel ? pairs::channel(n, f.r, b.u, b.k, b.a, f.ld, 1, m, ld_pairs, work)
              : pairs::scalar(n, f.r, b.u, f.ld, turned, rows_, w, ld_pairs, 1, m, ld_pairs);
    fade_rows(b.u, n, left);
    tile::gemm<Arch, Acc>(n, f.e, f.r, left, f.ld, 1, S, f.e, miss, f.le, false);
    for (isize i = 0; i < n; ++i)
      for (isize c = 0; c < f.e; ++c) {
        miss[i * f.le + c] = b.v[i * b.v_row + c] - miss[i * f.le + c];
        x[i * f.le + c] = b.beta[i] * miss[i * f.le + c];
      }
    for (isize i = 0; i < n; ++i)
      for (isize j = 0; j < i; ++j) solver[i * ld_pairs + j] = -b.beta[i] * m[i * ld_pairs + j];
    pairs::solve_lower(n, f.e, solver, ld_pairs, x, f.le);
    return x;
  }

  /// One query head: the factors of its denominators, dq, and its share of dX, dk, dS.
  void head(const backward_chunk<Acc>& b, isize h, const Acc* z, Acc* dS, Acc* dz) {
    const isize n = b.rows;
    const Acc *q = b.q + h * b.q_head, *dout = b.dout + h * b.dout_head;
    Acc *dq = b.dq + h * b.q_head, *by_den = dd + h * rows_;
    f.channel ? pairs::channel(n, f.r, q, b.k, b.a, f.ld, 0, p, ld_pairs, work)
              : pairs::scalar(n, f.r, q, f.ld, turned, rows_, w, ld_pairs, 0, p, ld_pairs);
    fade_rows(q, n, left);
    for (isize i = 0; i < n; ++i) {
      const Acc g = f.normalised ? normalise(b, h, i, z) : b.gain[h * b.row_head + i];
      for (isize c = 0; c < f.e; ++c) dn[i * f.le + c] = g * dout[i * b.dout_row + c];
    }
    pairs::lower_product(n, f.e, dn, f.le, x_turned, rows_, dp, ld_pairs);
    for (isize i = 0; f.normalised && i < n; ++i)
      for (isize j = 0; j <= i; ++j) dp[i * ld_pairs + j] += by_den[i];
    pairs::transposed_times(n, f.e, p, ld_pairs, dn, f.le, dx, f.le);
    // dq = w (dn S0^T + dd z0) + dP k
    tile::gemm<Arch, Acc>(n, f.r, f.e, dn, f.le, 1, state_turned, f.r, part, f.ld, false);
    for (isize i = 0; i < n; ++i) {
      const Acc *s = side + i * f.ld, *from = part + i * f.ld;
      Acc* to = dq + i * f.ld;
      for (isize c = 0; c < f.r; ++c) {
        const Acc sum = f.normalised ? from[c] + by_den[i] * z[c] : from[c];
        to[c] += f.decays ? sum * s[f.channel ? c : 0] : sum;
      }
    }
    f.channel ? pairs::channel_back(n, f.r, q, b.k, b.a, f.ld, 0, dp, ld_pairs, dq, b.dk, work)
              : pairs::scalar_back(n, f.r, q, b.k, f.ld, w, ld_pairs, dp, ld_pairs, dq, b.dk);
    tile::gemm<Arch, Acc>(f.r, f.e, n, left, 1, f.ld, dn, f.le, dS, f.e, true);
    for (isize i = 0; f.normalised && i < n; ++i)
      for (isize c = 0; c < f.r; ++c) dz[c] += by_den[i] * left[i * f.ld + c];
  }
  /// key_eps times the sum of q joins the denominator, apart from any decay: added when the decays have been seen to.
  void add_key_eps(const backward_chunk<Acc>& b) const {
    for (isize h = 0; h < f.R; ++h)
      for (isize i = 0; i < b.rows; ++i) {
        const Acc more = dd[h * rows_ + i] * b.key_eps[h * b.row_head + i];
        for (isize c = 0; c < f.r; ++c) b.dq[h * b.q_head + i * f.ld + c] += more;
      }
  }
  /// What multiplies dout; dd[i], the gradient by the denominator.
  Acc normalise(const backward_chunk<Acc>& b, isize h, isize i, const Acc* z) {
    const isize at = h * b.row_head + i;
    Acc den = pairs::dot(left + i * f.ld, z, f.r) + pairs::sum(p + i * ld_pairs, i + 1) + b.add[at];
    const bool held = den < b.floor[at];
    if (held) den = b.floor[at];
    dd[h * rows_ + i] = held || den == Acc(0) ? Acc(0) : -b.delta[at] / den;
    return den == Acc(0) ? Acc(0) : b.gain[at] / den;
  }

  /// Delta rules: from dX to dv, dbeta, du and what goes to dk and dS. `dx` becomes dR.
  void erase(const backward_chunk<Acc>& b, Acc* dS) {
    const isize n = b.rows;
    pairs::solve_upper(n, f.e, solver, ld_pairs, dx, f.le);
    pairs::lower_product(n, f.e, dx, f.le, x_turned, rows_, dp, ld_pairs);
    for (isize i = 0; i < n; ++i) {
      if (b.dbeta != nullptr)
        b.dbeta[i] =
            pairs::dot(dx + i * f.le, miss + i * f.le, f.e) - pairs::dot(dp + i * ld_pairs, m + i * ld_pairs, i);
      for (isize j = 0; j <= i; ++j) dp[i * ld_pairs + j] = j < i ? -b.beta[i] * dp[i * ld_pairs + j] : Acc(0);
      for (isize c = 0; c < f.e; ++c) dx[i * f.le + c] *= b.beta[i];
    }
    copy(dx, b.dv, n);
    tile::gemm<Arch, Acc>(n, f.r, f.e, dx, f.le, 1, state_turned, f.r, part, f.ld, false);
    fade_rows(part, n, part);
    for (isize i = 0; i < n; ++i)
      for (isize c = 0; c < f.r; ++c) b.du[i * f.ld + c] -= part[i * f.ld + c];
    f.channel ? pairs::channel_back(n, f.r, b.u, b.k, b.a, f.ld, 1, dp, ld_pairs, b.du, b.dk, work)
              : pairs::scalar_back(n, f.r, b.u, b.k, f.ld, w, ld_pairs, dp, ld_pairs, b.du, b.dk);
    fade_rows(b.u, n, left);
    for (isize i = 0; i < n; ++i)
      for (isize c = 0; c < f.r; ++c) left[i * f.ld + c] = -left[i * f.ld + c];
    tile::gemm<Arch, Acc>(f.r, f.e, n, left, 1, f.ld, dx, f.le, dS, f.e, true);
  }

  void carry_over(const Acc* S_end, const Acc* z_end, const Acc* dS, const Acc* dz) {
    Acc all(0);
    for (isize c = 0; c < f.r; ++c) {
      carry[c] = pairs::dot(S_end + c * f.e, dS + c * f.e, f.e) + (f.normalised ? z_end[c] * dz[c] : Acc(0));
      all += carry[c];
    }
    if (!f.channel) carry[0] = all;
  }
  /// Sums from the end of the chunk.
  void decay_gradient(const backward_chunk<Acc>& b) {
    for (isize i = b.rows - 1; i >= 0; --i) {
      Acc* sum = f.channel ? carry : work;
      for (isize c = 0; !f.channel && c < f.r; ++c) sum[c] = Acc(0);
      const isize at = i * f.ld;
      for (isize c = 0; c < f.r; ++c) sum[c] -= b.k[at + c] * b.dk[at + c];
      for (isize c = 0; f.erases && c < f.r; ++c) sum[c] += b.u[at + c] * b.du[at + c];
      for (isize h = 0; b.q != nullptr && h < f.R; ++h) {
        const Acc *q = b.q + h * b.q_head + at, *dq = b.dq + h * b.q_head + at;
        for (isize c = 0; c < f.r; ++c) sum[c] += q[c] * dq[c];
      }
      if (f.channel) {
        for (isize c = 0; c < f.r; ++c) b.dlog[at + c] = b.a[at + c] == Acc(0) ? Acc(0) : carry[c];
        continue;
      }
      carry[0] += pairs::sum(sum, f.r);
      b.dlog[i] = b.a[i] == Acc(0) ? Acc(0) : carry[0];  // nothing passes
    }
  }

  void copy(const Acc* from, Acc* to, isize n) const {
    for (isize i = 0; to != nullptr && i < n; ++i)
      for (isize c = 0; c < f.e; ++c) to[i * f.le + c] = from[i * f.le + c];
  }
  static void turn(const Acc* from, isize rows, isize columns, isize ld, Acc* to, isize to_ld) {
    pairs::turn(from, rows, columns, ld, to, to_ld);
  }

  backward_form f;
  isize rows_;
  const backward_chunk<Acc>* b_ = nullptr;
  Acc *side, *left, *top, *right, *part, *turned, *w, *p, *dp, *x_turned, *state_turned, *dstate_turned, *dn, *dd, *dx,
      *carry, *work, *m = nullptr, *solver = nullptr, *x = nullptr, *miss = nullptr;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
