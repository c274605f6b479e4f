// SPDX-License-Identifier: MIT
#pragma once
/// @file  A block of tokens of one state head made ready for the sweep: features, gates, step weights, values as Acc.
///
/// What belongs to the head's tail (z, the decays so far, the largest log-scale) moves here, block after block; S does not.

#include <fovea/kernel/linear_weights.hpp>
#include <fovea/linear/check.hpp>
#include <fovea/linear/partial.hpp>
#include <fovea/linear/scratch.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Where a state head stands.
template <class Acc>
struct linear_site {
  isize b, head, k_head;
  Acc* S;
  state_tail<Acc> tail;
  Acc survey;
};

/// Keys [t, t + count) (t < 0: none), query i of the block is query `query` + i of the call (query < 0: none).
template <class Acc>
struct linear_block {
  isize t, count, query;
  kernel::sweep_block<Acc> sweep;
  const Acc* v;
  isize v_stride;
};

template <class Arch, class Acc>
class linear_blocks {
 public:
  using scratch_type = linear_scratch<Arch, Acc>;

  linear_blocks(const linear_attention& m, const problem& p, const linear_partial* partial, isize first_position,
                bool keeps)
      : m_(m),
        p_(p),
        rows_(m, p),
        n_(sizes_of(m, p.shape())),
        partial_(partial),
        first_position_(first_position),
        keeps_(keeps) {
    if (partial != nullptr) rows_.normalised = false;
    channel_ = by_channel(m.rule) && p.gates.log_decay.width == n_.r;
    delta_ = is_delta(m.rule);
    own_erase_ = delta_ && (channel_ || m.rule == rule::gdn2);
  }

  const linear_sizes& sizes() const { return n_; }
  const linear_rows& rows() const { return rows_; }
  bool delta() const { return delta_; }
  bool own_erase() const { return own_erase_; }
  /// One decay for each row of S, or one for all (step 0).
  const Acc* single_keep(const scratch_type& s, isize& step) const {
    static constexpr Acc one(1);
    step = channel_ ? 1 : 0;
    return channel_ ? s.channel : s.decays ? s.decay : &one;
  }

  isize query_head(const linear_site<Acc>& at, isize h) const {
    return p_.q.heads >= n_.S ? at.head * n_.R + h : at.k_head;
  }

  void prepare(scratch_type& s, linear_site<Acc>& at, linear_block<Acc>& x) const {
    const bool reads = x.query >= 0;
    auto& b = x.sweep;
    b = {};
    b.tokens = x.count, b.r = n_.r, b.heads = reads ? n_.R : delta_ ? 1 : 0;
    b.k = s.k, b.u = own_erase_ ? s.u : s.k, b.k_stride = b.u_stride = s.stride;
    b.q = s.q, b.q_stride = s.stride, b.q_head_stride = s.q_head;
    lay_rows(at, x);
    gates(s, at, x);
    values(s, at, x);
    const auto w = weights_of(s, at, x);
    kernel::direct_rows<Acc> rows;
    const bool direct = lay_direct_rows(at, x, w.sum, rows);
    const isize piece =
        n_.r <= 64 ? 32 : 16;  // rows of k and q that stay in the first-level cache from their map to their sums
    for (isize i = 0; i < x.count; i += piece) {
      const isize count = std::min(piece, x.count - i);
      if (direct && kernel::row_weights_direct<Arch, Acc>(b, w, rows, i, count, s.k, s.q)) {
        for (isize h = 0; h < b.heads; ++h) rows_.template output_factors<Arch, Acc>(s, h, n_.r, i, count);
        continue;
      }
      if (channel_ && x.t >= 0) channel_gates(s, at, x, i, count);
      keys(s, at, x, i, count);
      if (rows_.map.log_scaled()) log_scales(s, at, x, i, count);
      if (delta_ && own_erase_) erase_rows(s, at, x, i, count);
      for (isize h = 0; h < b.heads; ++h) queries(s, at, h, x, i, count);
      if (one_token(x)) return single(s, at, x);
      delta_ ? kernel::row_weights<Arch, Acc, true>(b, w, i, count, s.k, s.q, s.u)
             : kernel::row_weights<Arch, Acc, false>(b, w, i, count, s.k, s.q, s.u);
    }
    delta_ ? kernel::token_weights<Arch, Acc, true>(b, w) : kernel::token_weights<Arch, Acc, false>(b, w);
    if (w.sum == kernel::row_sum::none && !s.decays && !channel_ && m_.scale == 1.0 && !rows_.map.log_scaled() && reads)
      b.y_gain = nullptr;  // ones
    if (w.sum == kernel::row_sum::report) report(at, x, s.sums);
  }

 private:
  isize before() const { return partial_ == nullptr ? 0 : partial_->first_head; }
  bool one_token(const linear_block<Acc>& x) const { return x.count == 1 && x.query >= 0; }

  /// Rows that the sweep can read where they lie stay there.
  void lay_rows(const linear_site<Acc>& at, linear_block<Acc>& x) const {
    const auto ready = [&](const tensor_ref& from) {
      return rows_.map.identity() && !channel_ && from.type == dtype_of<Acc> && n_.r % 16 == 0 && !one_token(x) &&
             from.row_stride * static_cast<isize>(sizeof(Acc)) <= 2048 && !(rows_.normalised && m_.key_sum_eps > 0.0);
    };
    auto& b = x.sweep;
    if (x.t >= 0 && ready(p_.k))
      b.k = static_cast<const Acc*>(p_.k.row(at.b, at.k_head, x.t)), b.k_stride = p_.k.row_stride;
    if (!own_erase_) b.u = b.k, b.u_stride = b.k_stride;
    if (x.query >= 0 && ready(p_.q)) {
      b.q = static_cast<const Acc*>(p_.q.row(at.b, query_head(at, 0), x.query));
      b.q_stride = p_.q.row_stride, b.q_head_stride = p_.q.head_stride;
    }
  }

  /// Rows from which decays by channel can be folded into k and q straight away.
  bool lay_direct_rows(const linear_site<Acc>& at, const linear_block<Acc>& x, kernel::row_sum sum,
                       kernel::direct_rows<Acc>& to) const {
    const auto& g = p_.gates.log_decay;
    const auto fits = [](dtype type) { return type == dtype_of<Acc>; };
    if (!channel_ || delta_ || sum != kernel::row_sum::none || !rows_.map.identity() || n_.r % 16 != 0 || x.t < 0 ||
        x.query < 0 || x.count == 1 || !fits(g.type) || !fits(p_.k.type) || !fits(p_.q.type))
      return false;
    const auto rows = [&](const tensor_ref& from, isize head, isize row) {
      return kernel::row_set<Acc>{static_cast<const Acc*>(from.row(at.b, head, row)), from.row_stride};
    };
    to = {rows(g, at.head, x.t), rows(p_.k, at.k_head, x.t), rows(p_.q, query_head(at, 0), x.query), p_.q.head_stride};
    return true;
  }

  /// Tokens [i, i + count) of the block, here and below.
  void keys(scratch_type& s, const linear_site<Acc>& at, const linear_block<Acc>& x, isize i, isize count) const {
    for (isize t = i; x.t < 0 && t < i + count; ++t) s.clear_key(t);
    if (x.t < 0 || x.sweep.k != s.k) return;
    auto f = rows_.template block<Arch, Acc>(p_.k, s.x, at.b, at.k_head, x.t + i, count);
    f.head = (before() + at.head) * n_.R, f.kv_head = before() + at.k_head;
    f.position = first_position_ + x.t + i, f.key = true;
    f.out = s.k + i * s.stride, f.out_stride = s.stride, f.log_scale = s.log_k + i, f.survey = at.survey;
    rows_.map.apply(f, s.map);
  }

  void queries(scratch_type& s, const linear_site<Acc>& at, isize h, const linear_block<Acc>& x, isize i,
               isize count) const {
    Acc* q = s.q + h * s.q_head + i * s.stride;
    if (x.query < 0) {
      for (isize c = 0; c < count * s.stride; ++c) q[c] = Acc(0);
      return s.fill_factors(h, i, count, Acc(0), Acc(0), Acc(0));
    }
    const isize head = query_head(at, h);
    if (x.sweep.q == s.q) {
      auto f = rows_.template block<Arch, Acc>(p_.q, s.x, at.b, head, x.query + i, count);
      f.head = before() * n_.R + head, f.kv_head = before() + at.k_head;
      f.position = first_position_ + x.query + i + p_.k.length - p_.q.length;
      f.out = q, f.out_stride = s.stride, f.log_scale = s.log_q + i;
      rows_.map.apply(f, s.map);
    }
    if (partial_ == nullptr) return rows_.template output_factors<Arch, Acc>(s, h, n_.r, i, count);
    s.fill_factors(h, i, count, Acc(1), Acc(0), Acc(0));
    for (isize t = i; partial_->m && t < i + count; ++t)
      partial_->template row<Acc>(partial_->m, at.b, head, x.query + t) =
          rows_.map.log_scaled() ? s.log_q[t] + s.peaks[t] : Acc(0);
  }

  /// a_t by channel.
  void channel_gates(scratch_type& s, const linear_site<Acc>& at, const linear_block<Acc>& x, isize i,
                     isize count) const {
    const auto& g = p_.gates.log_decay;
    for (isize t = i; t < i + count; ++t) {
      Acc* row = s.channel + t * s.stride;
      simd::load_row<Arch, Acc>(g.type, g.row(at.b, at.head, x.t + t), n_.r, row);
      exponentials<Arch>(row, n_.r);
    }
  }

  /// a_t and beta.
  void gates(scratch_type& s, const linear_site<Acc>& at, const linear_block<Acc>& x) const {
    const auto& g = p_.gates;
    const isize count = x.t < 0 ? 0 : x.count;  // tokens without a key: cleared with it
    s.decays = false;
    if (!channel_ && (g.log_decay || !m_.gamma.empty())) {
      s.decays = true;
      if (g.log_decay) {
        if (count > 0) column(g.log_decay, at, x.t, count, s.decay);
        exponentials<Arch>(s.decay, count);
      } else {
        const auto gamma = m_.gamma[m_.gamma.size() == 1 ? 0 : static_cast<std::size_t>(at.head)];
        for (isize i = 0; i < count; ++i) s.decay[i] = static_cast<Acc>(gamma);
      }
      for (isize i = 0; keeps_ && i < count; ++i) at.tail.faded[0] *= s.decay[i];
    }
    if (rows_.map.log_scaled() && x.t >= 0) {
      for (isize i = s.decays ? count : 0; i < x.count; ++i) s.decay[i] = Acc(1);
      s.decays = true;
    }
    for (isize i = 0; delta_ && !g.beta && i < count; ++i) s.beta[i] = Acc(1);
    if (delta_ && g.beta && count > 0) column(g.beta, at, x.t, count, s.beta);
  }
  /// One number a token, from token t on.
  void column(const tensor_ref& from, const linear_site<Acc>& at, isize t, isize count, Acc* to) const {
    const bool joined = from.row_stride == 1;
    for (isize i = 0; i < (joined ? 1 : count); ++i)
      simd::load_row<Arch, Acc>(from.type, from.row(at.b, at.head, t + i), joined ? count : 1, to + i);
  }

  /// The rows that erase, where they are not the keys.
  void erase_rows(scratch_type& s, const linear_site<Acc>& at, const linear_block<Acc>& x, isize i, isize count) const {
    const auto& g = p_.gates.erase;
    for (isize t = i; x.t >= 0 && t < i + count; ++t) {
      Acc* u = s.u + t * s.stride;
      const Acc* k = x.sweep.k + t * x.sweep.k_stride;
      if (g) simd::load_row<Arch, Acc>(g.type, g.row(at.b, at.head, x.t + t), n_.r, u);
      for (isize e = 0; e < n_.r; ++e) u[e] = g ? u[e] * k[e] : k[e];
    }
  }

  /// Key features leave their common factor behind; the running maximum of the factors acts as a decay.
  void log_scales(scratch_type& s, const linear_site<Acc>& at, const linear_block<Acc>& x, isize i, isize count) const {
    if (x.t < 0) {
      for (isize t = i; t < i + count; ++t) s.peaks[t] = *at.tail.peak;
      return;
    }
    alignas(64) Acc fade[48], own[48];
    for (isize t = 0; t < count; ++t) {
      const Acc before = *at.tail.peak, now = s.log_k[i + t] > before ? s.log_k[i + t] : before;
      fade[t] = before == now ? Acc(0) : before - now;
      own[t] = s.log_k[i + t] == now ? Acc(0) : s.log_k[i + t] - now;
      *at.tail.peak = s.peaks[i + t] = now;
    }
    exponentials<Arch>(fade, count), exponentials<Arch>(own, count);
    for (isize t = 0; t < count; ++t) {
      s.decay[i + t] *= fade[t];
      feature::row_scale<Arch, Acc>(s.k + (i + t) * s.stride, n_.r, own[t]);
    }
  }

  /// The value rows: the caller's memory, or scratch [count][panels * width] with zeros behind them.
  void values(scratch_type& s, const linear_site<Acc>& at, linear_block<Acc>& x) const {
    const isize stride = s.e_stride, count = x.t < 0 ? 0 : x.count;
    x.v = s.v, x.v_stride = stride;
    if (count > 0 && p_.v.type == dtype_of<Acc> && !p_.gates.write && n_.e == stride) {
      x.v = static_cast<const Acc*>(p_.v.row(at.b, at.head, x.t)), x.v_stride = p_.v.row_stride;
      return;
    }
    for (isize i = 0; i < count; ++i) {
      Acc* row = s.v + i * stride;
      simd::load_row<Arch, Acc>(p_.v.type, p_.v.row(at.b, at.head, x.t + i), n_.e, row);
      if (!p_.gates.write) continue;
      simd::load_row<Arch, Acc>(p_.gates.write.type, p_.gates.write.row(at.b, at.head, x.t + i), n_.e, s.w);
      for (isize c = 0; c < n_.e; ++c) row[c] *= s.w[c];
    }
    for (isize i = count * stride; i < x.count * stride; ++i) s.v[i] = Acc(0);
  }

  kernel::row_sum wanted_sum(bool reads) const {
    if (partial_ != nullptr) return reads ? kernel::row_sum::report : kernel::row_sum::divide;
    return m_.normalised() ? kernel::row_sum::divide : kernel::row_sum::none;
  }

  kernel::weight_block<Acc> weights_of(const scratch_type& s, const linear_site<Acc>& at,
                                       const linear_block<Acc>& x) const {
    kernel::weight_block<Acc> w;
    w.decay = s.decays ? s.decay : nullptr, w.channel = channel_ ? s.channel : nullptr, w.beta = s.beta;
    w.sum = wanted_sum(x.query >= 0), w.gain = s.gain, w.add = s.add, w.floor = s.floor;
    w.factor = s.factor, w.sums = s.sums, w.head_tokens = scratch_type::tokens;
    w.z = at.tail.z, w.faded = at.tail.faded, w.x_gain = s.x_gain, w.u_gain = s.u_gain, w.A = s.A;
    w.scale = s.scale, w.spare = s.spare, w.keep = s.keep, w.settles = s.settles, w.stride = s.stride;
    return w;
  }
  void report(const linear_site<Acc>& at, const linear_block<Acc>& x, const Acc* sums) const {
    for (isize h = 0; h < n_.R; ++h)
      for (isize i = 0; i < x.count; ++i)
        partial_->template row<Acc>(partial_->l, at.b, at.head * n_.R + h, x.query + i) =
            sums[h * scratch_type::tokens + i];
  }

  /// A block of one token, the decode step: z, the gains, and for delta rules the rows that read the state before the token.
  void single(scratch_type& s, const linear_site<Acc>& at, const linear_block<Acc>& x) const {
    isize step = 0;
    const Acc* keep = single_keep(s, step);
    if (channel_)
      for (isize e = 0; e < n_.r; ++e) at.tail.faded[e] *= keep[e];
    if (wanted_sum(true) != kernel::row_sum::none)
      for (isize e = 0; e < n_.r; ++e) at.tail.z[e] = keep[e * step] * at.tail.z[e] + s.k[e];
    for (isize h = 0; h < n_.R; ++h) {
      const Acc* q = s.q + h * s.q_head;
      s.single_dot[h] = feature::row_dot<Arch, Acc>(q, s.k, n_.rows);
      s.single_gain[h] = s.gain[h * scratch_type::tokens];
      if (wanted_sum(true) == kernel::row_sum::none) continue;
      const Acc den = s.sums[h * scratch_type::tokens] = feature::row_dot<Arch, Acc>(q, at.tail.z, n_.rows);
      if (partial_ == nullptr)
        s.single_gain[h] = linear_rows::normalise(s.single_gain[h], den, s.add[h * scratch_type::tokens],
                                                  s.floor[h * scratch_type::tokens]);
    }
    if (partial_ != nullptr) report(at, x, s.sums);
    if (!delta_) return;
    const Acc* erase = own_erase_ ? s.u : s.k;
    for (isize e = 0; e < n_.r; ++e) s.lines[e] = keep[e * step] * erase[e];
    for (isize h = 0; h < n_.R; ++h)
      for (isize e = 0; e < n_.r; ++e) s.lines[(h + 1) * s.stride + e] = keep[e * step] * s.q[h * s.q_head + e];
  }

  const linear_attention& m_;
  const problem& p_;
  linear_rows rows_;
  linear_sizes n_;
  const linear_partial* partial_;
  isize first_position_;
  bool keeps_, channel_ = false, delta_ = false, own_erase_ = false;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
