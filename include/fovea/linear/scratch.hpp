// SPDX-License-Identifier: MIT
#pragma once
/// @file  Scratch of one thread of linear attention, and what fills it: rows of features, output factors.
///
/// Every array holds one block of kernel::sweep_tokens tokens, so that memory does not depend on n.

#include <fovea/feature/rows.hpp>
#include <fovea/kernel/linear_weights.hpp>
#include <fovea/linear/state.hpp>
#include <fovea/simd/convert.hpp>
#include <fovea/simd/exp.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// x <- e^x for `n` numbers; the array may be written up to the next multiple of 16.
template <class Arch, class Acc>
FOVEA_NOINLINE void exponentials(Acc* x, isize n) {
  using P = simd::pack<Acc, Arch>;
  for (isize i = 0; i < n; i += P::size) simd::store_n(x + i, simd::exp(simd::load_n<P>(x + i, n - i)), n - i);
}

/// Rows of features are a multiple of 16 long, and never a multiple of 1 KB apart: eight of them are read side by side.
template <class Acc>
isize feature_stride(isize r) {
  const isize rows = ceil_div(r, isize{16}) * 16;
  return rows * static_cast<isize>(sizeof(Acc)) % 1024 == 0 ? rows + 16 : rows;
}

template <class Arch, class Acc>
struct linear_scratch {
  static constexpr isize rows = kernel::sweep_tokens, tokens = 128;  // 128: whole vectors by token
  static_assert(tokens >= rows);

  Acc *x, *map;                   // converted input rows; the map's own
  Acc *k, *u, *q, *channel;       // [rows][stride]: features, erase rows, [heads] query features, decays by channel
  Acc *v, *w, *out;               // [rows][e_stride]; one row; [heads][rows][e_stride]
  Acc *log_k, *log_q, *peaks;     // [tokens]
  Acc *decay, *beta;              // [tokens]
  Acc *gain, *add, *floor;        // [heads][tokens]
  Acc *factor, *sums;             // [heads][tokens]
  Acc *x_gain, *u_gain, *A;       // [tokens]
  Acc *scale, *spare, *keep;      // [stride] twice; [rows][stride] where decays are by channel, else [tokens]
  Acc *lines, *y, *x_row;         // one token: [heads + 1][stride], [heads + 1][e_stride], [e_stride]
  Acc *single_gain, *single_dot;  // [heads]
  Acc* state;                     // a head's state where the caller keeps none
  unsigned char* settles;         // [tokens]
  isize stride, q_head, e_stride;
  bool decays = false, has_erase = false, has_channel = false;

  linear_scratch(arena& a, const linear_attention& m, const linear_sizes& n, isize d) {
    stride = feature_stride<Acc>(n.r), q_head = rows * stride, e_stride = n.panels * n.width;
    const bool by_channels = has_channel = by_channel(m.rule), erases = has_erase = by_channels && is_delta(m.rule);
    x = a.take<Acc>(feature_rows * d), map = a.take<Acc>(m.phi().scratch(d));
    k = a.take<Acc>(q_head), u = a.take<Acc>(erases ? q_head : 0), q = a.take<Acc>(n.R * q_head);
    channel = a.take<Acc>(by_channels ? q_head : 0);
    v = a.take<Acc>(rows * e_stride), w = a.take<Acc>(e_stride), out = a.take<Acc>(n.R * rows * e_stride);
    log_k = a.take<Acc>(tokens), log_q = a.take<Acc>(tokens), peaks = a.take<Acc>(tokens);
    decay = a.take<Acc>(tokens), beta = a.take<Acc>(tokens);
    gain = a.take<Acc>(n.R * tokens), add = a.take<Acc>(n.R * tokens), floor = a.take<Acc>(n.R * tokens);
    factor = a.take<Acc>(n.R * tokens), sums = a.take<Acc>(n.R * tokens);
    x_gain = a.take<Acc>(tokens), u_gain = a.take<Acc>(tokens), A = a.take<Acc>(tokens);
    scale = a.take<Acc>(stride), spare = a.take<Acc>(stride), keep = a.take<Acc>(by_channels ? q_head : tokens);
    lines = a.take<Acc>((n.R + 1) * stride), y = a.take<Acc>((n.R + 1) * e_stride), x_row = a.take<Acc>(e_stride);
    single_gain = a.take<Acc>(n.R), single_dot = a.take<Acc>(n.R);
    state = a.take<Acc>(n.head_elements());
    settles = a.take<unsigned char>(tokens);
  }

  /// Zeros behind r in the rows in use (ones for decays), zeros behind e: kernels read whole vectors.
  void clear_padding(const linear_sizes& n, isize count) {
    for (isize i = 0; i < count; ++i)
      for (isize e = n.r; e < n.rows; ++e) {
        k[i * stride + e] = Acc(0);
        for (isize h = 0; h < n.R; ++h) q[h * q_head + i * stride + e] = Acc(0);
        if (has_erase) u[i * stride + e] = Acc(0);
        if (has_channel) channel[i * stride + e] = Acc(1);
      }
    for (isize i = 0; i < count && n.e < e_stride; ++i)
      for (isize c = n.e; c < e_stride; ++c) v[i * e_stride + c] = Acc(0);
    r_ = n.r;
  }
  /// No key and no decay, for a query before all keys of a call.
  void clear_key(isize i) {
    for (isize e = 0; e < r_; ++e) {
      k[i * stride + e] = Acc(0);
      if (has_erase) u[i * stride + e] = Acc(0);
      if (has_channel) channel[i * stride + e] = Acc(1);
    }
    decay[i] = Acc(1), beta[i] = Acc(0);
  }
  void fill_factors(isize h, isize first, isize count, Acc g, Acc a, Acc f) {
    for (isize i = h * tokens + first; i < h * tokens + first + count; ++i) gain[i] = g, add[i] = a, floor[i] = f;
  }

 private:
  isize r_ = 0;
};

/// Rows of a problem as Acc, and the factors that turn phi(q) S into an output row.
struct linear_rows {
  const linear_attention& m;
  const problem& p;
  feature_map map;
  bool normalised;

  linear_rows(const linear_attention& mechanism, const problem& call)
      : m(mechanism), p(call), map(mechanism.phi()), normalised(mechanism.normalised()) {}

  /// Rows [first, first + count) of one head: in place, or converted into `scratch`.
  template <class Arch, class Acc>
  feature_block<Acc> block(const tensor_ref& from, Acc* scratch, isize b, isize head, isize first, isize count) const {
    feature_block<Acc> out;
    out.rows = count, out.width = from.width;
    if (from.type == dtype_of<Acc>) {
      out.x = static_cast<const Acc*>(from.row(b, head, first)), out.x_stride = from.row_stride;
      return out;
    }
    for (isize i = 0; i < count; ++i)
      simd::load_row<Arch, Acc>(from.type, from.row(b, head, first + i), from.width, scratch + i * from.width);
    out.x = scratch, out.x_stride = from.width;
    return out;
  }

  template <class Arch, class Acc>
  Acc survey(Acc* x, Acc* scratch, isize b, isize k_head) const {
    Acc top = -std::numeric_limits<Acc>::infinity();
    for (isize t = 0; t < p.k.length; t += feature_rows) {
      auto keys = block<Arch, Acc>(p.k, x, b, k_head, t, std::min(feature_rows, p.k.length - t));
      keys.kv_head = k_head, keys.head = k_head * (p.q.heads / p.k.heads), keys.position = t, keys.key = true;
      const Acc one = map.survey(keys, scratch);
      top = one > top || one != one ? one : top;
    }
    return top;
  }

  /// gain, add and floor of each row: what the numerator is multiplied by, what joins the denominator. Where features lack factors
  /// e^{log_q} and e^{peak}, eps and clamp are divided by them, so that they mean what they say.
  template <class Arch, class Acc, class Scratch>
  void output_factors(Scratch& s, isize h, isize r, isize first, isize count) const {
    const Acc scale = static_cast<Acc>(m.scale), eps = static_cast<Acc>(m.eps),
              least = -std::numeric_limits<Acc>::infinity();
    const Acc clamp = m.clamp > 0.0 ? static_cast<Acc>(m.clamp) : least, key_eps = static_cast<Acc>(m.key_sum_eps);
    s.fill_factors(h, first, count, scale, eps, clamp);
    const isize at = h * Scratch::tokens;
    for (isize i = first; map.log_scaled() && i < first + count; ++i) {
      const Acc lacks = s.log_q[i] + s.peaks[i];
      if (!normalised) {
        s.gain[at + i] = scale * std::exp(lacks);
        continue;
      }
      const Acc rise = std::exp(-lacks);
      s.add[at + i] = m.eps > 0.0 ? eps * rise : Acc(0);
      s.floor[at + i] = m.clamp > 0.0 ? clamp * rise : least;
    }
    for (isize i = first; normalised && m.key_sum_eps > 0.0 && i < first + count; ++i) {
      Acc sum(0);
      for (isize e = 0; e < r; ++e) sum += s.q[h * s.q_head + i * s.stride + e];
      s.add[at + i] += key_eps * sum * (map.log_scaled() ? std::exp(-s.peaks[i]) : Acc(1));
    }
  }

  template <class Acc>
  static Acc normalise(Acc gain, Acc den, Acc add, Acc floor) {
    den += add;
    if (den < floor) den = floor;
    return den == Acc(0) ? Acc(0) : gain / den;
  }
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
