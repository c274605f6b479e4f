// SPDX-License-Identifier: MIT
#pragma once
/// @file  Softmax over positions, one for each key channel: the state of Efficient Attention, absorbed in blocks or swept causally.
///
///   top_c = max_j k_jc,  z_c = sum_j e^(k_jc - top_c),  S_c = sum_j e^(k_jc - top_c) v_j [e]        c < d
///   o = sum_c p_c S_c / z_c,   p = softmax over the features of q
///
/// Contract   (-inf, 0, 0) is the identity and merge is associative. A channel whose keys are all -inf contributes zero. In the sweep
///            row t is computed from tokens up to t only, whatever stands behind it.
/// Cost       absorb: d e multiply-adds and d exponentials a token; sweep: 2 d e. Scratch independent of the length.
/// Numerics   exponents <= 0; a block is summed by itself before it joins the running sum.
/// Reference  efficient/reference.hpp.       Source  Shen et al., Efficient Attention (WACV 2021, arXiv 1812.01243).

#include <algorithm>
#include <limits>

#include <fovea/core/view.hpp>
#include <fovea/core/workspace.hpp>
#include <fovea/simd/convert.hpp>
#include <fovea/simd/exp.hpp>
#include <fovea/simd/reduce.hpp>
#include <fovea/tile/gemm_ahead.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// The state of one KV head in memory of size(d, e) elements.
template <class Acc>
struct channel_state {
  Acc *top, *sum, *context;  // [d], [d], [d x e]
  isize d, e;

  static isize size(isize d, isize e) { return d * (e + 2); }
  static channel_state at(Acc* p, isize d, isize e) { return {p, p + d, p + 2 * d, d, e}; }
  void clear() const {
    for (isize c = 0; c < d; ++c) top[c] = -std::numeric_limits<Acc>::infinity(), sum[c] = Acc(0);
    for (isize x = 0; x < d * e; ++x) context[x] = Acc(0);
  }
};

/// Rows of one head as they are stored.
struct stored_rows {
  const void* data = nullptr;
  dtype type = dtype::f32;
  isize stride = 0;
  const void* row(isize i) const {
    return static_cast<const unsigned char*>(data) + i * stride * static_cast<isize>(size_of(type));
  }
  /// For tile::gemm_ahead: `count` rows of `width` from row i on.
  tile::rows_ahead ahead(isize i, isize count, isize width) const {
    const isize size = static_cast<isize>(size_of(type));
    return {static_cast<const unsigned char*>(data) + i * stride * size, width * size, stride * size, count};
  }
};

namespace detail {
template <class T>
inline constexpr T log2_of_e = static_cast<T>(1.4426950408889634074);
template <class T>
inline constexpr T lowest = -std::numeric_limits<T>::max();

/// to += from * factor, or to = to * factor + from: the two orders of a rescaled sum.
template <class Arch, class Acc>
FOVEA_INLINE void scale_and_add(Acc* to, Acc to_factor, const Acc* from, Acc from_factor, isize count) {
  using P = simd::pack<Acc, Arch>;
  for (isize c = 0; c < count; c += P::size)
    simd::store_n(to + c,
                  simd::fma(simd::load_n<P>(to + c, count - c), P(to_factor),
                            simd::load_n<P>(from + c, count - c) * P(from_factor)),
                  count - c);
}

/// Turns the keys of a block into weights, raises `top` and `sum`; factor [d] is what older sums have to be multiplied by. Weights
/// come as strips of `NC` vectors of channels, strip after strip, [count][NC W] each: what the product reads lies side by side.
template <class Arch, class Acc, int NC>
FOVEA_NOINLINE void weigh_strip(isize count, const Acc* keys, isize keys_stride, isize left, Acc* to, Acc* top,
                                Acc* sum, Acc* factor) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize W = P::size;
  const bool whole = left >= NC * W;
  const auto count_of = [&](isize v) FOVEA_INLINE_LAMBDA { return left > v * W ? left - v * W : 0; };
  const auto load = [&](const Acc* x, isize v) FOVEA_INLINE_LAMBDA {
    return whole ? P::load(x + v * W) : simd::load_n<P>(x + v * W, count_of(v));
  };
  P old[NC], high[NC], shift[NC], total[NC];
  tile::unroll<NC>([&](auto v) FOVEA_INLINE_LAMBDA { high[v] = old[v] = load(top, v), total[v] = P(Acc(0)); });
  for (isize t = 0; t < count; ++t)
    tile::unroll<NC>([&](auto v) FOVEA_INLINE_LAMBDA {
      high[v] = simd::max(load(keys + t * keys_stride, v), high[v]);  // high second: NaN keys stay out
    });
  const P to_log2(log2_of_e<Acc>);
  tile::unroll<NC>([&](auto v) FOVEA_INLINE_LAMBDA { shift[v] = simd::max(high[v], P(lowest<Acc>)); });
  for (isize t = 0; t < count; ++t)
    tile::unroll<NC>([&](auto v) FOVEA_INLINE_LAMBDA {
      const P w = simd::exp2((load(keys + t * keys_stride, v) - shift[v]) * to_log2);
      w.store(to + (t * NC + v) * W);
      total[v] = total[v] + w;
    });
  tile::unroll<NC>([&](auto v) FOVEA_INLINE_LAMBDA {
    const P rescale = simd::exp2((old[v] - shift[v]) * to_log2);
    simd::store_n(top + v * W, high[v], count_of(v));
    simd::store_n(factor + v * W, rescale, count_of(v));
    simd::store_n(sum + v * W, simd::fma(load(sum, v), rescale, total[v]), count_of(v));
  });
}

/// The same token by token: weights [count x d] in place of the keys, rescale factors and 1 / sum after each token.
template <class Arch, class Acc>
FOVEA_NOINLINE void weigh_tokens(isize count, isize d, Acc* keys, Acc* factor, Acc* inverse, Acc* top,
                                 Acc* sum) noexcept {
  using P = simd::pack<Acc, Arch>;
  const P to_log2(log2_of_e<Acc>), zero(Acc(0)), one(Acc(1));
  for (isize c = 0; c < d; c += P::size) {
    const isize left = d - c;
    P high = simd::load_n<P>(top + c, left), total = simd::load_n<P>(sum + c, left);
    for (isize t = 0; t < count; ++t) {
      const P x = simd::load_n<P>(keys + t * d + c, left), old = high;
      high = simd::max(x, high);
      const P shift = simd::max(high, P(lowest<Acc>));
      const P rescale = simd::exp2((old - shift) * to_log2), w = simd::exp2((x - shift) * to_log2);
      total = simd::fma(total, rescale, w);
      simd::store_n(keys + t * d + c, w, left);
      simd::store_n(factor + t * d + c, rescale, left);
      simd::store_n(inverse + t * d + c, simd::select_greater(total, zero, one / total, total * zero),
                    left);  // 0 -> 0, NaN -> NaN
    }
    simd::store_n(top + c, high, left);
    simd::store_n(sum + c, total, left);
  }
}

/// TOK tokens over NV vectors of columns: S stays in a register through all of them.
template <class Arch, class Acc, int TOK, int NV, bool Edge>
FOVEA_NOINLINE void sweep_tile(isize d, const Acc* w, const Acc* factor, const Acc* least, const Acc* p, const Acc* v,
                               isize v_stride, Acc* context, isize ld, Acc* o, isize o_stride, bool keep,
                               isize columns) noexcept {
  using P = simd::pack<Acc, Arch>;
  const auto load = [&](const Acc* x) FOVEA_INLINE_LAMBDA { return Edge ? simd::load_n<P>(x, columns) : P::load(x); };
  const auto store = [&](Acc* x, P y) FOVEA_INLINE_LAMBDA { Edge ? simd::store_n(x, y, columns) : y.store(x); };
  P value[TOK][NV], acc[TOK][NV];
  tile::unroll<TOK>([&](auto t) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>(
        [&](auto x) FOVEA_INLINE_LAMBDA { value[t][x] = load(v + t * v_stride + x * P::size), acc[t][x] = P(Acc(0)); });
  });
  for (isize c = 0; c < d; ++c, context += ld) {
    P s[NV];
    tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { s[x] = load(context + x * P::size); });
    const bool rises = least == nullptr ? false : !(least[c] == Acc(1));
    tile::unroll<TOK>([&](auto t) FOVEA_INLINE_LAMBDA {
      if (rises) {
        const P f(factor[t * d + c]);
        tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { s[x] = s[x] * f; });
      }
      const P a(w[t * d + c]), b(p[t * d + c]);
      tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
        s[x] = simd::fma(a, value[t][x], s[x]);
        acc[t][x] = simd::fma(b, s[x], acc[t][x]);
      });
    });
    if (keep) tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { store(context + x * P::size, s[x]); });
  }
  tile::unroll<TOK>([&](auto t) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { store(o + t * o_stride + x * P::size, acc[t][x]); });
  });
}

}  // namespace detail

namespace detail {

/// One row of NV whole vectors: it stays in registers between the maximum and the sum.
template <class Arch, class Acc, int NV>
FOVEA_INLINE void feature_row(const Acc* x, Acc scale, Acc* p) {
  using P = simd::pack<Acc, Arch>;
  P y[NV];
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { y[v] = P::load(x + v * P::size) * P(scale); });
  P high = y[0], sum(Acc(0));
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { high = simd::max(y[v], high); });
  const P shift(std::max(simd::reduce_max(high), lowest<Acc>));
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { y[v] = simd::exp2(y[v] - shift), sum = sum + y[v]; });
  const Acc total = simd::reduce_add(sum);
  const P inverse(total > Acc(0) ? Acc(1) / total : total * Acc(0));
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { (y[v] * inverse).store(p + v * P::size); });
}

}  // namespace detail

/// p [count x d] = softmax of scale * q over the features, or scale * q.
template <class Arch, class Acc>
FOVEA_NOINLINE void feature_rows(const stored_rows& q, isize count, isize d, double scale, bool normalise,
                                 Acc* p) noexcept {
  using P = simd::pack<Acc, Arch>;
  const Acc by = static_cast<Acc>(scale) * (normalise ? detail::log2_of_e<Acc> : Acc(1));
  const P factor(by);
  for (isize t = 0; t < count; ++t) {
    Acc* x = p + t * d;
    simd::prefetch(q.row(t + 16), d * static_cast<isize>(size_of(q.type)));
    const Acc* from = simd::row_as<Arch, Acc>(q.type, q.row(t), d, x);
    if (normalise && d == 4 * P::size) {
      detail::feature_row<Arch, Acc, 4>(from, by, x);
      continue;
    }
    if (normalise && d == 8 * P::size) {
      detail::feature_row<Arch, Acc, 8>(from, by, x);
      continue;
    }
    P high(detail::lowest<Acc>);
    for (isize c = 0; c < d; c += P::size) {
      const P y = simd::load_n<P>(from + c, d - c) * factor;
      simd::store_n(x + c, y, d - c);
      high = simd::max(d - c >= P::size ? y : simd::select((1U << (d - c)) - 1U, y, high), high);
    }
    if (!normalise) continue;
    const P shift(simd::reduce_max(high));
    P sum(Acc(0));
    for (isize c = 0; c < d; c += P::size) {
      const P y = simd::exp2(simd::load_n<P>(x + c, d - c) - shift);
      simd::store_n(x + c, y, d - c);
      sum = sum + (d - c >= P::size ? y : simd::select((1U << (d - c)) - 1U, y, P(Acc(0))));
    }
    const Acc total = simd::reduce_add(sum);
    const P inverse(total > Acc(0) ? Acc(1) / total : total * Acc(0));
    for (isize c = 0; c < d; c += P::size) simd::store_n(x + c, simd::load_n<P>(x + c, d - c) * inverse, d - c);
  }
}

/// Softmax of scale * x over the columns of each row, in place.
template <class Arch, class Acc>
void softmax_rows(Acc* x, isize rows, isize columns, double scale) noexcept {
  feature_rows<Arch, Acc>({x, dtype_of<Acc>, columns}, rows, columns, scale, true, x);
}

/// `into` joined with `from`, the later stretch. `exponential` as in absorb.
template <class Arch, class Acc>
FOVEA_NOINLINE void merge_channels(const channel_state<Acc>& into, const channel_state<Acc>& from,
                                   bool exponential) noexcept {
  for (isize c = 0; c < into.d; ++c) {
    Acc a = Acc(1), b = Acc(1);
    if (exponential) {
      const Acc high = into.top[c] > from.top[c] ? into.top[c] : from.top[c];
      const Acc shift = high > detail::lowest<Acc> ? high : detail::lowest<Acc>;
      a = std::exp(into.top[c] - shift), b = std::exp(from.top[c] - shift);
      into.top[c] = high;
      into.sum[c] = into.sum[c] * a + from.sum[c] * b;
    }
    detail::scale_and_add<Arch, Acc>(into.context + c * into.e, a, from.context + c * into.e, b, into.e);
  }
}

/// S_c / z_c (or S_c * factor) in place: what queries are multiplied with.
template <class Arch, class Acc>
FOVEA_NOINLINE void finish_channels(const channel_state<Acc>& s, const Acc* sum, double factor, Acc* out) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize c = 0; c < s.d; ++c) {
    const Acc z = sum == nullptr ? Acc(1) : sum[c];
    const P f(static_cast<Acc>(factor) * (z > Acc(0) ? Acc(1) / z : z * Acc(0)));
    for (isize x = 0; x < s.e; x += P::size)
      simd::store_n(out + c * s.e + x, simd::load_n<P>(s.context + c * s.e + x, s.e - x) * f, s.e - x);
  }
}

/// Tokens in blocks, all of them seen by every query.
template <class Arch, class Acc>
class channel_blocks {
 public:
  static constexpr isize block = 128;

  channel_blocks(arena& memory, isize d, isize e)
      : keys_(memory.take<Acc>(block * d)),
        weights_(memory.take<Acc>(block * strip)),
        values_(memory.take<Acc>(block * e)),
        partial_(memory.take<Acc>(strip * e)),
        factor_(memory.take<Acc>(strip)) {}

  /// `exponential`: weights e^k with a running maximum; otherwise the keys are the weights (top and sum stay as they are).
  void absorb(const channel_state<Acc>& s, const stored_rows& k, const stored_rows& v, isize count,
              bool exponential) noexcept {
    for (isize t0 = 0; t0 < count; t0 += block) {
      const isize some = count - t0 < block ? count - t0 : block;
      const auto [keys, keys_stride] = rows(k, t0, some, s.d, keys_);
      const auto [values, values_stride] = rows(v, t0, some, s.e, values_);
      const isize left = count - t0 - some, next = left < block ? left : block;
      tile::rows_ahead ahead[] = {k.ahead(t0 + some, next, s.d), v.ahead(t0 + some, next, s.e)};
      for (isize c = 0; c < s.d; c += strip) {
        const isize wide = s.d - c < strip ? s.d - c : strip;
        if (exponential)
          detail::weigh_strip<Arch, Acc, NC>(some, keys + c, keys_stride, wide, weights_, s.top + c, s.sum + c,
                                             factor_);
        tile::gemm_ahead<Arch, Acc>(wide, s.e, some, exponential ? weights_ : keys + c, 1,
                                    exponential ? strip : keys_stride, values, values_stride, partial_, s.e, ahead);
        for (isize x = 0; x < wide; ++x)
          detail::scale_and_add<Arch, Acc>(s.context + (c + x) * s.e, exponential ? factor_[x] : Acc(1),
                                           partial_ + x * s.e, Acc(1), s.e);
      }
    }
  }

 private:
  static constexpr int NC = 2;
  static constexpr isize strip = NC * simd::pack<Acc, Arch>::size;

  struct place {
    const Acc* at;
    isize stride;
  };
  /// Where they lie, or converted into `scratch`.
  static place rows(const stored_rows& from, isize first, isize count, isize width, Acc* scratch) noexcept {
    if (from.type == dtype_of<Acc>) return {static_cast<const Acc*>(from.row(first)), from.stride};
    for (isize t = 0; t < count; ++t)
      simd::load_row<Arch, Acc>(from.type, from.row(first + t), width, scratch + t * width);
    return {scratch, width};
  }

  Acc *keys_, *weights_, *values_, *partial_, *factor_;
};

/// Tokens one after the other: row t of each query head of the group sees the state and tokens 0 .. t.
template <class Arch, class Acc>
class channel_sweep {
  static constexpr isize block = 16;
  static constexpr int tokens = 4, NV = Arch::registers >= 32 ? 2 : 1;

 public:
  struct problem_part {
    stored_rows k, v;     ///< rows of the first token, columns from the first of the state's
    const tensor_ref* q;  ///< queries of item b, heads [h, h + group), from row `first_row`
    const tensor_mut* out;
    isize b, h, group, first_row, first_column;
    double scale;
    bool exponential;
    isize seen;  ///< tokens in the state; counts for the scaling normalisation
  };

  channel_sweep(arena& memory, isize d, isize e, isize group)
      : keys_(memory.take<Acc>(block * d)),
        factor_(memory.take<Acc>(block * d)),
        inverse_(memory.take<Acc>(block * d)),
        least_(memory.take<Acc>(d)),
        queries_(memory.take<Acc>(group * block * d)),
        values_(memory.take<Acc>(block * e)),
        out_(memory.take<Acc>(tokens * e)) {}

  /// Columns [0, s.e) of `s`; tokens [0, count); the row of token t is first_row + t. Tokens without a row (t < -first_row) only join.
  void run(const channel_state<Acc>& s, isize state_ld, const problem_part& p, isize count) noexcept {
    for (isize t0 = 0; t0 < count; t0 += block) {
      const isize some = count - t0 < block ? count - t0 : block;
      load(s, p, t0, some);
      for (isize t = 0; t < some; t += tokens) {
        const isize group_of = some - t < tokens ? some - t : tokens;
        find_rises(s.d, t, group_of, p.exponential);
        for (isize h = 0; h < p.group; ++h) sweep(s, state_ld, p, t0, t, group_of, h);
      }
    }
  }

 private:
  void load(const channel_state<Acc>& s, const problem_part& p, isize t0, isize some) noexcept {
    for (isize t = 0; t < some; ++t) {
      simd::load_row<Arch, Acc>(p.k.type, p.k.row(t0 + t), s.d, keys_ + t * s.d);
      simd::load_row<Arch, Acc>(p.v.type, p.v.row(t0 + t), s.e, values_ + t * s.e);
    }
    if (p.exponential) detail::weigh_tokens<Arch, Acc>(some, s.d, keys_, factor_, inverse_, s.top, s.sum);
    for (isize h = 0; h < p.group; ++h)
      for (isize t = 0; t < some; ++t) {
        Acc* x = queries_ + (h * block + t) * s.d;
        const isize row = p.first_row + t0 + t;
        if (row < 0) {
          for (isize c = 0; c < s.d; ++c) x[c] = Acc(0);
          continue;
        }
        feature_rows<Arch, Acc>({p.q->row(p.b, p.h + h, row), p.q->type, 0}, 1, s.d, p.scale, p.exponential, x);
        const Acc even = Acc(1) / static_cast<Acc>(p.seen + t0 + t + 1);
        for (isize c = 0; c < s.d; ++c) x[c] *= p.exponential ? inverse_[t * s.d + c] : even;
      }
  }
  void find_rises(isize d, isize t, isize count, bool exponential) noexcept {
    for (isize c = 0; exponential && c < d; ++c) {
      Acc low = factor_[t * d + c];
      for (isize x = t + 1; x < t + count; ++x)
        low = low < factor_[x * d + c] ? low : factor_[x * d + c];  // NaN survives
      least_[c] = low;
    }
  }
  void sweep(const channel_state<Acc>& s, isize ld, const problem_part& p, isize t0, isize t, isize count,
             isize h) noexcept {
    constexpr isize W = simd::pack<Acc, Arch>::size;
    const bool keep = h + 1 == p.group;
    const Acc* least = p.exponential ? least_ : nullptr;
    isize x = 0;
    while (x < s.e) {
      const isize left = s.e - x, vectors = left >= NV * W ? NV : left >= W ? 1 : 0;
      tile::with_constant<tokens>(count, [&](auto n) {
        const Acc *w = keys_ + t * s.d, *f = factor_ + t * s.d, *q = queries_ + (h * block + t) * s.d,
                  *v = values_ + t * s.e + x;
        if (vectors == NV)
          detail::sweep_tile<Arch, Acc, n, NV, false>(s.d, w, f, least, q, v, s.e, s.context + x, ld, out_ + x, s.e,
                                                      keep, left);
        else if (vectors == 1)
          detail::sweep_tile<Arch, Acc, n, 1, false>(s.d, w, f, least, q, v, s.e, s.context + x, ld, out_ + x, s.e,
                                                     keep, left);
        else
          detail::sweep_tile<Arch, Acc, n, 1, true>(s.d, w, f, least, q, v, s.e, s.context + x, ld, out_ + x, s.e, keep,
                                                    left);
      });
      x += vectors > 0 ? vectors * W : left;
    }
    for (isize y = 0; y < count; ++y) {
      const isize row = p.first_row + t0 + t + y;
      if (row < 0) continue;
      auto* to = static_cast<unsigned char*>(p.out->row(p.b, p.h + h, row)) +
                 p.first_column * static_cast<isize>(size_of(p.out->type));
      simd::store_row<Arch, Acc>(p.out->type, out_ + y * s.e, s.e, to);
    }
  }

  Acc *keys_, *factor_, *inverse_, *least_, *queries_, *values_, *out_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
