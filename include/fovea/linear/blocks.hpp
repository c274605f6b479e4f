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
  isize t, count, padded, query;
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

  void prepare(scratch_type& s, linear_site<Acc>& at, linear_block<Acc>& x) const {
    const isize T = step_of<Arch>(delta_);
    x.padded = ceil_div(x.count, T) * T;
    const bool reads = x.query >= 0;
    x.sweep = {
        x.padded / T, n_.r,     s.k,    own_erase_ ? s.u : s.k, s.stride, s.stride, s.step, reads ? n_.R : 1, s.q,
        s.stride,     s.q_head, s.read, scratch_type::steps};
    keys(s, at, x);
    gates(s, at, x);
    if (rows_.map.log_scaled() && x.t >= 0) log_scales(s, at, x.count);
    for (isize h = 0; h < x.sweep.heads; ++h) queries(s, at, h, x);
    if (!own_erase_) x.sweep.u = x.sweep.k, x.sweep.u_stride = x.sweep.k_stride;
    for (isize i = x.count; i < x.padded; ++i) {
      if (x.sweep.k == s.k) s.clear_key(i);
      if (x.sweep.q == s.q) s.clear_query(i);
    }
    values(s, at, x);
    look_ahead(at, x);
    if (x.count == 1 && reads)
      single(s, at, x);
    else
      weigh(s, at, x);
  }

 private:
  bool one_token(const linear_block<Acc>& x) const { return x.count == 1 && x.query >= 0; }

  /// May the sweep read these rows where they lie?
  bool lies_ready(const tensor_ref& from, const linear_block<Acc>& x) const {
    return rows_.map.identity() && !channel_ && from.type == dtype_of<Acc> && n_.r % 16 == 0 && x.count == x.padded &&
           !one_token(x) && from.row_stride * static_cast<isize>(sizeof(Acc)) <= 2048 &&
           !(rows_.normalised && m_.key_sum_eps > 0.0);
  }

  void keys(scratch_type& s, const linear_site<Acc>& at, linear_block<Acc>& x) const {
    if (x.t < 0) {
      for (isize i = 0; i < x.count; ++i) s.clear_key(i);
      return;
    }
    if (lies_ready(p_.k, x)) {
      x.sweep.k = static_cast<const Acc*>(p_.k.row(at.b, at.k_head, x.t)), x.sweep.k_stride = p_.k.row_stride;
      return;
    }
    for (isize i = 0; i < x.count; i += feature_rows) {
      auto f =
          rows_.template block<Arch, Acc>(p_.k, s.x, at.b, at.k_head, x.t + i, std::min(feature_rows, x.count - i));
      f.head = at.head * n_.R, f.kv_head = at.k_head, f.position = first_position_ + x.t + i, f.key = true;
      f.out = s.k + i * s.stride, f.out_stride = s.stride, f.log_scale = s.log_k + i, f.survey = at.survey;
      rows_.map.apply(f, s.map);
    }
  }

  void queries(scratch_type& s, const linear_site<Acc>& at, isize h, linear_block<Acc>& x) const {
    Acc* q = s.q + h * s.q_head;
    if (x.query < 0) {
      for (isize i = 0; i < x.count * s.stride; ++i) q[i] = Acc(0);
      s.fill_factors(h, x.count, Acc(0), Acc(0), Acc(0));
      return;
    }
    const isize head = p_.q.heads >= n_.S ? at.head * n_.R + h : at.k_head;
    if (lies_ready(p_.q, x)) {
      if (h == 0) x.sweep.q = static_cast<const Acc*>(p_.q.row(at.b, head, x.query));
      x.sweep.q_stride = p_.q.row_stride, x.sweep.q_head_stride = p_.q.head_stride;
    } else {
      for (isize i = 0; i < x.count; i += feature_rows) {
        auto f =
            rows_.template block<Arch, Acc>(p_.q, s.x, at.b, head, x.query + i, std::min(feature_rows, x.count - i));
        f.head = head, f.kv_head = at.k_head, f.position = first_position_ + x.query + i + p_.k.length - p_.q.length;
        f.out = q + i * s.stride, f.out_stride = s.stride, f.log_scale = s.log_q + i;
        rows_.map.apply(f, s.map);
      }
    }
    if (x.t < 0 && rows_.map.log_scaled())
      for (isize i = 0; i < x.count; ++i) s.peaks[i] = *at.tail.peak;
    if (partial_ == nullptr) return rows_.template output_factors<Arch, Acc>(s, h, n_.r, x.count);
    s.fill_factors(h, x.count, Acc(1), Acc(0), Acc(0));
    for (isize i = 0; partial_->m && i < x.count; ++i)
      partial_->template row<Acc>(partial_->m, at.b, head, x.query + i) =
          rows_.map.log_scaled() ? s.log_q[i] + s.peaks[i] : Acc(0);
  }

  /// a_t, beta and the rows that erase.
  void gates(scratch_type& s, const linear_site<Acc>& at, const linear_block<Acc>& x) const {
    const auto& g = p_.gates;
    const isize count = x.t < 0 ? 0 : x.count;  // tokens without a key have been cleared
    s.decays = false;
    if (channel_) {
      for (isize i = 0; i < count; ++i) {
        Acc* row = s.channel + i * s.stride;
        simd::load_row<Arch, Acc>(g.log_decay.type, g.log_decay.row(at.b, at.head, x.t + i), n_.r, row);
        exponentials<Arch>(row, n_.r);
      }
    } else if (g.log_decay || !m_.gamma.empty()) {
      s.decays = true;
      if (g.log_decay) {
        for (isize i = 0; i < count; ++i)
          simd::load_row<Arch, Acc>(g.log_decay.type, g.log_decay.row(at.b, at.head, x.t + i), 1, s.decay + i);
        exponentials<Arch>(s.decay, count);
      } else {
        const auto gamma = m_.gamma[m_.gamma.size() == 1 ? 0 : static_cast<std::size_t>(at.head)];
        for (isize i = 0; i < count; ++i) s.decay[i] = static_cast<Acc>(gamma);
      }
      for (isize i = 0; keeps_ && i < count; ++i) at.tail.faded[0] *= s.decay[i];
    }
    if (s.decays || rows_.map.log_scaled())
      for (isize i = s.decays ? count : 0; i < x.padded; ++i) s.decay[i] = Acc(1);
    if (!delta_) return;
    const Acc* keys = x.sweep.k;
    for (isize i = 0; i < count; ++i) {
      s.beta[i] = Acc(1);
      if (g.beta) simd::load_row<Arch, Acc>(g.beta.type, g.beta.row(at.b, at.head, x.t + i), 1, s.beta + i);
      if (!own_erase_) continue;
      Acc* u = s.u + i * s.stride;
      const Acc* k = keys + i * x.sweep.k_stride;
      if (g.erase) simd::load_row<Arch, Acc>(g.erase.type, g.erase.row(at.b, at.head, x.t + i), n_.r, u);
      for (isize e = 0; e < n_.r; ++e) u[e] = g.erase ? u[e] * k[e] : k[e];
    }
    for (isize i = count; i < x.padded; ++i) s.beta[i] = Acc(0);
  }

  /// Key features leave their common factor behind; the running maximum of the factors acts as a decay.
  void log_scales(scratch_type& s, const linear_site<Acc>& at, isize count) const {
    alignas(64) Acc fade[scratch_type::tokens + 16], own[scratch_type::tokens + 16];
    for (isize i = 0; i < count; ++i) {
      const Acc before = *at.tail.peak, now = s.log_k[i] > before ? s.log_k[i] : before;
      fade[i] = before == now ? Acc(0) : before - now;
      own[i] = s.log_k[i] == now ? Acc(0) : s.log_k[i] - now;
      *at.tail.peak = s.peaks[i] = now;
    }
    exponentials<Arch>(fade, count), exponentials<Arch>(own, count);
    for (isize i = 0; i < count; ++i) {
      s.decay[i] *= fade[i];
      Acc* k = s.k + i * s.stride;
      for (isize e = 0; e < n_.r; ++e) k[e] *= own[i];
    }
    s.decays = true;
  }

  /// The value rows: the caller's memory, or scratch [padded][panels * width] with zeros behind them.
  void values(scratch_type& s, const linear_site<Acc>& at, linear_block<Acc>& x) const {
    const isize stride = s.e_stride, count = x.t < 0 ? 0 : x.count;
    x.v = s.v, x.v_stride = stride;
    if (count > 0 && p_.v.type == dtype_of<Acc> && !p_.gates.write && (x.count == x.padded || one_token(x)) &&
        n_.e == stride) {
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
    for (isize i = count * stride; i < x.padded * stride; ++i) s.v[i] = Acc(0);
  }

  /// The next block's rows, where it has as many.
  void look_ahead(const linear_site<Acc>& at, linear_block<Acc>& x) const {
    const isize next = x.t + x.count, row = x.query + x.count;
    if (x.t < 0 || x.query < 0 || next + x.count > p_.k.length) return;
    const auto ask = [&](int i, const auto& t, isize head, isize first) {
      const isize bytes = static_cast<isize>(size_of(t.type));
      x.sweep.ahead[i] = {t.row(at.b, head, first), t.row_stride * bytes, t.width * bytes};
    };
    ask(0, p_.k, at.k_head, next), ask(1, p_.v, at.head, next);
    ask(2, p_.q, p_.q.heads >= n_.S ? at.head * n_.R : at.k_head, row), ask(3, p_.out, at.head * n_.R, row);
  }

  kernel::row_sum wanted_sum(bool reads) const {
    if (partial_ != nullptr) return reads ? kernel::row_sum::report : kernel::row_sum::divide;
    return m_.normalised() ? kernel::row_sum::divide : kernel::row_sum::none;
  }

  void weigh(scratch_type& s, const linear_site<Acc>& at, const linear_block<Acc>& x) const {
    const auto& b = x.sweep;
    const kernel::weight_block<Acc> w{x.count,
                                      s.decays ? s.decay : nullptr,
                                      channel_ ? s.channel : nullptr,
                                      s.beta,
                                      wanted_sum(x.query >= 0),
                                      s.gain,
                                      s.add,
                                      s.floor,
                                      s.factor,
                                      s.sums,
                                      scratch_type::tokens,
                                      at.tail.z,
                                      at.tail.faded,
                                      s.scale,
                                      s.keep,
                                      s.products,
                                      s.stride};
    if (channel_)
      delta_ ? kernel::channel_weights<Arch, Acc, true>(b, w, s.k, s.q, s.u, s.step, s.read)
             : kernel::channel_weights<Arch, Acc, false>(b, w, s.k, s.q, s.u, s.step, s.read);
    else if (s.decays)
      delta_ ? kernel::scalar_weights<Arch, Acc, true, true>(b, w, s.step, s.read)
             : kernel::scalar_weights<Arch, Acc, false, true>(b, w, s.step, s.read);
    else
      delta_ ? kernel::scalar_weights<Arch, Acc, true, false>(b, w, s.step, s.read)
             : kernel::scalar_weights<Arch, Acc, false, false>(b, w, s.step, s.read);
    if (w.sum == kernel::row_sum::report) report(at, x, s.sums);
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
