// SPDX-License-Identifier: MIT
#pragma once
/// @file  efficient_attention, backward of the causal prefix form: one sweep forward for the queries, one back for keys and values.
///
///   o_t = u_t S_t,   u_tc = p_tc / z_tc,   S_t = sum_(j <= t) E_j^T v_j,   z_t = sum_(j <= t) E_j,   E_jc = e^(k_jc)
///   du_tc = do_t . S_tc,   dp = du / z,   R_j = sum_(t >= j) u_t^T do_t,   r_jc = sum_(t >= j) u_tc du_tc / z_tc
///   dv_j = E_j R_j,   dk_jc = E_jc (R_jc . v_j - r_jc)
///
/// All of S, z, E are kept relative to the channel's largest key so far, R and r to the largest key of the token that the sweep has come
/// to: every exponent is <= 0 both ways. Scaling normalisation: E_jc = k_jc, z = the number of keys seen, no r.
///
/// Cost       G m 5 d e + H n 2 d e multiply-adds an item; scratch (2 + 2 H / G) m d numbers a thread; tasks are KV heads.

#include <fovea/core/backward.hpp>
#include <fovea/efficient/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
class channel_prefix_backward {
  using Arch = simd::native;
  using P = simd::pack<Acc, Arch>;

 public:
  channel_prefix_backward(arena& memory, const shape& s, int threads) : s_(s) {
    arena one;
    lay_out(one);
    piece_ = round_up(one.bytes(), alignment);
    pieces_ = memory.take<std::byte>(static_cast<isize>(piece_) * threads);
  }

  void run(exec_ref exec, const efficient_attention& m, const backward_problem& p) const {
    exec.for_tasks(s_.B * s_.G, [&](isize task, isize slot) {
      arena own(std::span<std::byte>(pieces_ + static_cast<std::size_t>(slot) * piece_, piece_));
      const room r = lay_out(own);
      const bool exponential = m.normalisation == efficient_normalisation::softmax;
      forward(m, p, task / s_.G, task % s_.G, exponential, r);
      back(p, task / s_.G, task % s_.G, exponential, r);
    });
  }

 private:
  struct room {
    Acc *weight, *factor;  // [m x d] E relative to the top of its token; what older sums are multiplied by there
    Acc *u, *r;            // [group][m x d]; [m x d] summed over the group
    Acc *top, *sum, *S, *S_turned, *k, *v, *o, *p, *out;
  };
  room lay_out(arena& a) const {
    const isize group = s_.H / std::max<isize>(s_.G, 1), all = s_.m * s_.d, square = s_.d * s_.e;
    const auto take = [&](isize count) { return a.take<Acc>(count); };
    room r;
    r.weight = take(all), r.factor = take(all), r.u = take(group * all), r.r = take(all);
    r.top = take(s_.d), r.sum = take(s_.d), r.S = take(square), r.S_turned = take(square);
    r.k = take(s_.d), r.v = take(s_.e), r.o = take(s_.e), r.p = take(s_.d), r.out = take(std::max(s_.d, s_.e));
    return r;
  }
  static void zero(Acc* x, isize count) { std::fill_n(x, count, Acc(0)); }
  /// to[i][c] = to[i][c] * by[c] + a[i] * b[c]
  static void rank_one(Acc* to, isize rows, isize columns, const Acc* by, const Acc* a, const Acc* b) {
    for (isize i = 0; i < rows; ++i)
      for (isize c = 0; c < columns; c += P::size) {
        const isize left = columns - c;
        Acc* x = to + i * columns + c;
        P y = simd::load_n<P>(x, left);
        if (by != nullptr) y = y * simd::load_n<P>(by + c, left);
        simd::store_n(x, simd::fma(P(a[i]), simd::load_n<P>(b + c, left), y), left);
      }
  }
  static void row_times(const Acc* a, isize rows, const Acc* matrix, isize columns, Acc* out) {
    tile::gemm<Arch, Acc>(1, columns, rows, a, rows, 1, matrix, columns, out, columns, false);
  }

  /// z and S as they grow; dq; u and the terms of r.
  void forward(const efficient_attention& m, const backward_problem& p, isize b, isize g, bool exponential,
               const room& r) const {
    const isize group = s_.group(), offset = s_.m - s_.n, all = s_.m * s_.d;
    zero(r.S_turned, s_.d * s_.e), zero(r.sum, s_.d), zero(r.r, all), zero(r.u, group * all);
    std::fill_n(r.top, s_.d, -std::numeric_limits<Acc>::infinity());
    for (isize i = 0; p.to.dq && i < s_.n - s_.m; ++i)  // rows before the first key
      for (isize h = 0; h < group; ++h)
        for (isize c = 0; c < s_.d; ++c) p.to.dq.set(b, g * group + h, i, c, 0.0);
    for (isize t = 0; t < s_.m; ++t) {
      Acc *weight = r.weight + t * s_.d, *factor = r.factor + t * s_.d;
      simd::load_row<Arch, Acc>(p.k.type, p.k.row(b, g, t), s_.d, weight);
      simd::load_row<Arch, Acc>(p.v.type, p.v.row(b, g, t), s_.e, r.v);
      for (isize c = 0; c < s_.d; ++c) {
        if (!exponential) {
          factor[c] = Acc(1), r.sum[c] = static_cast<Acc>(t + 1);
          continue;
        }
        const Acc old = r.top[c], high = weight[c] > old ? weight[c] : old,
                  shift = std::max(high, kernel::detail::lowest<Acc>);
        factor[c] = std::exp(old - shift), weight[c] = std::exp(weight[c] - shift), r.top[c] = high;
        r.sum[c] = r.sum[c] * factor[c] + weight[c];
      }
      rank_one(r.S_turned, s_.e, s_.d, exponential ? factor : nullptr, r.v, weight);
      if (t >= offset)
        for (isize h = 0; h < group; ++h) row_back(m, p, b, g * group + h, t, exponential, r, r.u + h * all + t * s_.d);
    }
  }
  void row_back(const efficient_attention& m, const backward_problem& p, isize b, isize h, isize t, bool exponential,
                const room& r, Acc* u) const {
    const isize i = t - (s_.m - s_.n);
    simd::load_row<Arch, Acc>(p.dout.type, p.dout.row(b, h, i), s_.e, r.o);
    row_times(r.o, s_.e, r.S_turned, s_.d, r.out);  // du
    kernel::feature_rows<Arch, Acc>({p.q.row(b, h, i), p.q.type, 0}, 1, s_.d, m.scale_for(), exponential, r.p);
    Acc along = 0;
    for (isize c = 0; c < s_.d; ++c) {
      const Acc inverse = r.sum[c] > Acc(0) ? Acc(1) / r.sum[c] : r.sum[c] * Acc(0);
      u[c] = r.p[c] * inverse;
      const Acc dp = r.out[c] * inverse;
      if (exponential) r.r[t * s_.d + c] += u[c] * dp, along += r.p[c] * dp;
      r.out[c] = dp;
    }
    if (!p.to.dq) return;
    const Acc scale = static_cast<Acc>(m.scale_for());
    for (isize c = 0; c < s_.d; ++c) r.out[c] = scale * (exponential ? r.p[c] * (r.out[c] - along) : r.out[c]);
    simd::store_row<Arch, Acc>(p.to.dq.type, r.out, s_.d, p.to.dq.row(b, h, i));
  }

  /// R (both ways round) and r from the last token to the first; dk and dv.
  void back(const backward_problem& p, isize b, isize g, bool exponential, const room& r) const {
    const isize group = s_.group(), offset = s_.m - s_.n, all = s_.m * s_.d;
    Acc* rest = r.sum;
    zero(r.S, s_.d * s_.e), zero(r.S_turned, s_.d * s_.e), zero(rest, s_.d);
    for (isize t = s_.m - 1; t >= 0; --t) {
      const Acc* weight = r.weight + t * s_.d;
      for (isize h = 0; t >= offset && h < group; ++h) {
        const Acc* u = r.u + h * all + t * s_.d;
        simd::load_row<Arch, Acc>(p.dout.type, p.dout.row(b, g * group + h, t - offset), s_.e, r.o);
        rank_one(r.S, s_.d, s_.e, nullptr, u, r.o), rank_one(r.S_turned, s_.e, s_.d, nullptr, r.o, u);
      }
      for (isize c = 0; c < s_.d; ++c) rest[c] += r.r[t * s_.d + c];
      if (p.to.dv) {
        row_times(weight, s_.d, r.S, s_.e, r.out);
        simd::store_row<Arch, Acc>(p.to.dv.type, r.out, s_.e, p.to.dv.row(b, g, t));
      }
      if (p.to.dk) {
        simd::load_row<Arch, Acc>(p.v.type, p.v.row(b, g, t), s_.e, r.v);
        row_times(r.v, s_.e, r.S_turned, s_.d, r.out);
        for (isize c = 0; exponential && c < s_.d; ++c) r.out[c] = weight[c] * (r.out[c] - rest[c]);
        simd::store_row<Arch, Acc>(p.to.dk.type, r.out, s_.d, p.to.dk.row(b, g, t));
      }
      if (exponential) rescale(r.factor + t * s_.d, r, rest);
    }
  }
  /// From the top of a token to that of the one before.
  void rescale(const Acc* factor, const room& r, Acc* rest) const {
    for (isize c = 0; c < s_.d; ++c) {
      if (factor[c] == Acc(1)) continue;
      rest[c] *= factor[c];
      for (isize x = 0; x < s_.e; ++x) r.S[c * s_.e + x] *= factor[c], r.S_turned[x * s_.d + c] *= factor[c];
    }
  }

  shape s_;
  std::byte* pieces_;
  std::size_t piece_;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
