// SPDX-License-Identifier: MIT
#pragma once
/// @file  Causal linear attention: blocks of 64 tokens per state head, features made in scratch, then the sweep of kernel/linear_sweep.hpp.
///
/// Tasks are (batch item, state head, range of column panels); each holds its whole sequence, so results do not depend on threads.
/// Features and step weights are recomputed by each range of panels: a head is cut only where there are fewer heads than threads.

#include <fovea/kernel/linear_step.hpp>
#include <fovea/kernel/linear_weights.hpp>
#include <fovea/linear/bidirectional.hpp>
#include <fovea/linear/check.hpp>
#include <fovea/linear/scratch.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Arch, class Acc>
class linear_sweeper {
 public:
  linear_sweeper(const linear_attention& m, const problem& p, state* s, arena scratch, int threads)
      : m_(m), p_(p), rows_(m, p), n_(sizes_of(m, p.shape())), slots_(threads) {
    state_ = s == nullptr ? nullptr : s->as<Acc>();
    first_position_ = s == nullptr ? 0 : s->tokens();
    parts_ = panel_ranges(n_, threads);
    if (state_ != nullptr && parts_ > 1) tails_ = scratch.take<Acc>(n_.B * n_.S * n_.tail_elements());
    memory_ = scratch;
    channel_ = by_channel(m.rule) && p.gates.log_decay.width == n_.r;
    delta_ = is_delta(m.rule);
    own_erase_ = delta_ && (channel_ || m.rule == rule::gdn2);
  }

  void run(exec_ref exec) {
    if (tails_ != nullptr)
      for (isize i = 0; i < n_.B * n_.S; ++i)
        for (isize j = 0; j < n_.tail_elements(); ++j)
          tails_[i * n_.tail_elements() + j] = head_state(i)[n_.S_elements() + j];
    exec.for_tasks(n_.B * n_.S * parts_, [&](isize task, isize slot) { sequence(task / parts_, task % parts_, slot); });
  }

  static void lay_out(arena& a, const linear_attention& m, const shape& s, int threads) {
    const auto n = sizes_of(m, s);
    if (panel_ranges(n, threads) > 1) a.take<Acc>(n.B * n.S * n.tail_elements());
    for (int t = 0; t < threads; ++t) linear_scratch<Arch, Acc>(a, m, n, s.d);
  }

 private:
  static constexpr int T = kernel::sweep_shape<Arch>::T;
  using P = simd::pack<Acc, Arch>;

  struct site {  // one task
    linear_scratch<Arch, Acc>* s;
    isize b, head, k_head, first_panel, last_panel;
    Acc* S;
    state_tail<Acc> tail;
    Acc survey;
  };

  static isize panel_ranges(const linear_sizes& n, int threads) {
    const isize heads = n.B * n.S;
    return heads <= 0 || heads >= threads ? 1 : std::min(n.panels, ceil_div(threads, heads));
  }
  Acc* head_state(isize i) const { return state_ + i * n_.head_elements(); }

  void sequence(isize index, isize part, isize slot) const {
    arena a = memory_;
    for (isize i = 0; i < slot; ++i) linear_scratch<Arch, Acc>(a, m_, n_, p_.q.width);
    linear_scratch<Arch, Acc> s(a, m_, n_, p_.q.width);
    Acc* S = state_ != nullptr ? head_state(index) : s.state;
    Acc* tail = state_ != nullptr && parts_ == 1 ? S + n_.S_elements() : s.state + n_.S_elements();
    if (state_ == nullptr) clear_head(s.state, n_, rows_.map.log_scaled());
    if (tails_ != nullptr)
      for (isize j = 0; j < n_.tail_elements(); ++j) tail[j] = tails_[index * n_.tail_elements() + j];
    const isize b = index / n_.S, head = index % n_.S;
    site at{&s,
            b,
            head,
            head / (n_.S / p_.k.heads),
            n_.panels * part / parts_,
            n_.panels * (part + 1) / parts_,
            S,
            state_tail<Acc>(tail, n_),
            Acc(0)};
    if (rows_.map.surveys()) at.survey = rows_.template survey<Arch, Acc>(s.x, s.map, b, at.k_head);
    s.clear_padding(n_, std::min(p_.k.length, feature_rows));

    const isize first = p_.k.length - p_.q.length;  // queries begin at this key
    if (part == 0)
      for (isize i = 0; i < std::min(p_.q.length, -first); ++i) zero_row(at, i);
    for (isize t = 0; t < p_.k.length;) {
      const isize end = t < first ? first : p_.k.length;
      const isize count = std::min(feature_rows, end - t);
      block(at, t, count, t - first);
      t += count;
    }
    if (tails_ != nullptr && part == 0)
      for (isize j = 0; j < n_.tail_elements(); ++j) S[n_.S_elements() + j] = tail[j];
  }

  void zero_row(const site& at, isize i) const {
    Acc* zeros = at.s->out;
    for (isize c = 0; c < n_.e; ++c) zeros[c] = Acc(0);
    for (isize h = 0; h < n_.R; ++h)
      simd::store_row<Arch, Acc>(p_.out.type, zeros, n_.e, p_.out.row(at.b, at.head * n_.R + h, i));
  }

  /// Keys [t, t + count); query i of the block is query `query + i` of the call, none of them where query < 0.
  void block(site& at, isize t, isize count, isize query) const {
    auto& s = *at.s;
    const isize padded = ceil_div(count, isize{T}) * T;
    feature_block<Acc> keys = rows_.template block<Arch, Acc>(p_.k, s.x, at.b, at.k_head, t, count);
    keys.head = at.head * n_.R, keys.kv_head = at.k_head, keys.position = first_position_ + t, keys.key = true;
    keys.out = s.k, keys.out_stride = s.stride, keys.log_scale = s.log_k, keys.survey = at.survey;
    rows_.map.apply(keys, s.map);
    gates(at, t, count, padded);
    if (rows_.map.log_scaled()) log_scales(at, count);
    const bool reads = query >= 0;
    const isize heads = reads ? n_.R : 1;
    for (isize h = 0; h < heads; ++h) queries(at, h, query, count);
    if (count == 1 && reads) return single(at, t, query);
    for (isize i = count; i < padded; ++i) {
      s.clear_token(i);
      s.beta[i] = Acc(0);
    }
    sweep(at, t, count, padded, query);
  }

  void queries(site& at, isize h, isize query, isize count) const {
    auto& s = *at.s;
    Acc* q = s.q + h * s.q_head;
    if (query < 0) {
      for (isize i = 0; i < count * s.stride; ++i) q[i] = Acc(0);
      s.fill_factors(h, count, Acc(0), Acc(0), Acc(0));
      return;
    }
    const isize head = p_.q.heads >= n_.S ? at.head * n_.R + h : at.k_head;
    feature_block<Acc> x = rows_.template block<Arch, Acc>(p_.q, s.x, at.b, head, query, count);
    x.head = head, x.kv_head = at.k_head, x.position = first_position_ + query + p_.k.length - p_.q.length;
    x.out = q, x.out_stride = s.stride, x.log_scale = s.log_q;
    rows_.map.apply(x, s.map);
    rows_.template output_factors<Arch, Acc>(s, h, n_.r, count);
  }

  /// a_t, beta, the rows that erase and the rows of v where they are not read in place.
  void gates(site& at, isize t, isize count, isize padded) const {
    auto& s = *at.s;
    const auto& g = p_.gates;
    s.decays = false;
    if (channel_) {
      for (isize i = 0; i < count; ++i) {
        Acc* row = s.channel + i * s.stride;
        simd::load_row<Arch, Acc>(g.log_decay.type, g.log_decay.row(at.b, at.head, t + i), n_.r, row);
        exponentials<Arch>(row, n_.r);
        if (state_ != nullptr)
          for (isize e = 0; e < n_.r; ++e) at.tail.faded[e] *= row[e];
      }
    } else if (g.log_decay || !m_.gamma.empty()) {
      s.decays = true;
      if (g.log_decay) {
        for (isize i = 0; i < count; ++i)
          simd::load_row<Arch, Acc>(g.log_decay.type, g.log_decay.row(at.b, at.head, t + i), 1, s.decay + i);
        exponentials<Arch>(s.decay, count);
      } else {
        const auto gamma = m_.gamma[m_.gamma.size() == 1 ? 0 : static_cast<std::size_t>(at.head)];
        for (isize i = 0; i < count; ++i) s.decay[i] = static_cast<Acc>(gamma);
      }
      for (isize i = 0; i < count; ++i) at.tail.faded[0] *= s.decay[i];
    }
    if (s.decays || rows_.map.log_scaled())
      for (isize i = s.decays ? count : 0; i < padded; ++i) s.decay[i] = Acc(1);
    if (!delta_) return;
    for (isize i = 0; i < count; ++i) {
      s.beta[i] = Acc(1);
      if (g.beta) simd::load_row<Arch, Acc>(g.beta.type, g.beta.row(at.b, at.head, t + i), 1, s.beta + i);
      if (!own_erase_) continue;
      Acc *u = s.u + i * s.stride, *k = s.k + i * s.stride;
      if (g.erase) simd::load_row<Arch, Acc>(g.erase.type, g.erase.row(at.b, at.head, t + i), n_.r, u);
      for (isize e = 0; e < n_.r; ++e) u[e] = g.erase ? u[e] * k[e] : k[e];
    }
  }

  /// Key features leave their common factor behind; the running maximum of the factors acts as a decay.
  void log_scales(site& at, isize count) const {
    auto& s = *at.s;
    alignas(64) Acc fade[feature_rows + 16], own[feature_rows + 16];
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

  /// The value rows of the block: the caller's memory, or scratch [padded][panels * width] with zeros behind them.
  const Acc* values(site& at, isize t, isize count, isize padded, isize& stride) const {
    auto& s = *at.s;
    if (p_.v.type == dtype_of<Acc> && !p_.gates.write && count == padded && n_.e == n_.panels * n_.width) {
      stride = p_.v.row_stride;
      return static_cast<const Acc*>(p_.v.row(at.b, at.head, t));
    }
    stride = s.e_stride;
    for (isize i = 0; i < count; ++i) {
      Acc* v = s.v + i * stride;
      simd::load_row<Arch, Acc>(p_.v.type, p_.v.row(at.b, at.head, t + i), n_.e, v);
      if (!p_.gates.write) continue;
      simd::load_row<Arch, Acc>(p_.gates.write.type, p_.gates.write.row(at.b, at.head, t + i), n_.e, s.w);
      for (isize c = 0; c < n_.e; ++c) v[c] *= s.w[c];
    }
    for (isize i = count * stride; i < padded * stride; ++i) s.v[i] = Acc(0);
    return s.v;
  }

  void sweep(site& at, isize t, isize count, isize padded, isize query) const {
    auto& s = *at.s;
    const bool reads = query >= 0;
    kernel::sweep_block<Acc, T> b{padded / T,       n_.r, s.stride, s.k,    own_erase_ ? s.u : s.k, s.step,
                                  reads ? n_.R : 1, s.q,  s.q_head, s.read, feature_rows / T};
    kernel::weight_block<Acc> w{s.decays ? s.decay : nullptr,
                                s.channel,
                                s.beta,
                                m_.normalised(),
                                s.gain,
                                s.add,
                                s.floor,
                                at.tail.z,
                                s.scale,
                                s.keep};
    if (channel_)
      delta_ ? kernel::channel_weights<Arch, Acc, true>(b, w, s.k, s.q, s.u, s.step, s.read)
             : kernel::channel_weights<Arch, Acc, false>(b, w, s.k, s.q, s.u, s.step, s.read);
    else if (s.decays)
      delta_ ? kernel::scalar_weights<Arch, Acc, true, true>(b, w, s.step, s.read)
             : kernel::scalar_weights<Arch, Acc, false, true>(b, w, s.step, s.read);
    else
      delta_ ? kernel::scalar_weights<Arch, Acc, true, false>(b, w, s.step, s.read)
             : kernel::scalar_weights<Arch, Acc, false, false>(b, w, s.step, s.read);
    isize v_stride = 0, out_stride = s.e_stride, out_head = feature_rows * s.e_stride;
    const Acc* v = values(at, t, count, padded, v_stride);
    Acc* out = s.out;
    const bool in_place = reads && p_.out.type == dtype_of<Acc> && count == padded && n_.e == n_.panels * n_.width;
    if (in_place) {
      out = static_cast<Acc*>(p_.out.row(at.b, at.head * n_.R, query));
      out_stride = p_.out.row_stride, out_head = p_.out.head_stride;
    }
    for (isize panel = at.first_panel; panel < at.last_panel; ++panel)
      for (isize c = 0; c < n_.width; c += kernel::sweep_shape<Arch>::NR * P::size) {
        const isize column = panel * n_.width + c;
        Acc* S = at.S + panel * n_.r * n_.width + c;
        if (delta_)
          kernel::sweep_panel<Arch, Acc, true>(b, S, v + column, v_stride, out + column, out_stride, out_head);
        else
          kernel::sweep_panel<Arch, Acc, false>(b, S, v + column, v_stride, out + column, out_stride, out_head);
      }
    if (!reads || in_place) return;
    for (isize h = 0; h < n_.R; ++h)
      for (isize i = 0; i < count; ++i) store_columns(at, h, query + i, s.out + h * out_head + i * s.e_stride);
  }

  void store_columns(const site& at, isize h, isize i, const Acc* row) const {
    const isize c = at.first_panel * n_.width, count = std::min(n_.e, at.last_panel * n_.width) - c;
    auto* to = static_cast<unsigned char*>(p_.out.row(at.b, at.head * n_.R + h, i)) +
               c * static_cast<isize>(size_of(p_.out.type));
    simd::store_row<Arch, Acc>(p_.out.type, row + c, count, to);
  }

  /// A block of one token: the decode step.
  void single(site& at, isize t, isize query) const {
    auto& s = *at.s;
    const Acc one(1);
    const Acc* keep = channel_ ? s.channel : s.decays ? s.decay : &one;
    const isize keep_step = channel_ ? 1 : 0;
    for (isize e = 0; m_.normalised() && e < n_.r; ++e) at.tail.z[e] = keep[e * keep_step] * at.tail.z[e] + s.k[e];
    isize v_stride = 0;
    const Acc* v = values(at, t, 1, T, v_stride);
    for (isize h = 0; h < n_.R; ++h) s.single_gain[h] = rows_.template single_gain<Arch, Acc>(s, h, n_.r, at.tail.z);
    if (delta_) {  // the rows that read the state before the token: erase, then the queries
      for (isize e = 0; e < n_.r; ++e) s.lines[e] = keep[e * keep_step] * (own_erase_ ? s.u : s.k)[e];
      for (isize h = 0; h < n_.R; ++h)
        for (isize e = 0; e < n_.r; ++e) s.lines[(h + 1) * s.stride + e] = keep[e * keep_step] * s.q[h * s.q_head + e];
    }
    for (isize panel = at.first_panel; panel < at.last_panel; ++panel) {
      Acc* S = at.S + panel * n_.r * n_.width;
      const Acc* x = v + panel * n_.width;
      if (!delta_) {
        kernel::step_panel<Arch, Acc>(n_.r, S, keep, keep_step, s.k, x, n_.R, s.q, s.q_head, s.out + panel * n_.width,
                                      s.e_stride);
        continue;
      }
      kernel::step_panel<Arch, Acc>(n_.r, S, keep, keep_step, nullptr, nullptr, n_.R + 1, s.lines, s.stride, s.y,
                                    n_.width);
      for (isize c = 0; c < n_.width; ++c) s.x_row[c] = s.beta[0] * (x[c] - s.y[c]);
      kernel::step_panel<Arch, Acc>(n_.r, S, keep, keep_step, s.k, s.x_row, 0, nullptr, 0, nullptr, 0);
      for (isize h = 0; h < n_.R; ++h)
        for (isize c = 0; c < n_.width; ++c)
          s.out[h * s.e_stride + panel * n_.width + c] = s.y[(h + 1) * n_.width + c] + s.single_dot[h] * s.x_row[c];
    }
    for (isize h = 0; h < n_.R; ++h) {
      Acc* row = s.out + h * s.e_stride;
      for (isize c = at.first_panel * n_.width; c < at.last_panel * n_.width; ++c) row[c] *= s.single_gain[h];
      store_columns(at, h, query, row);
    }
  }

  const linear_attention& m_;
  const problem& p_;
  linear_rows rows_;
  linear_sizes n_;
  isize slots_, parts_ = 1, first_position_ = 0;
  Acc *state_ = nullptr, *tails_ = nullptr;
  arena memory_;
  bool channel_ = false, delta_ = false, own_erase_ = false;
};

}  // namespace detail

#if FOVEA_DEFINES_LOOPS
template <class Arch, class Acc>
void linear_attention::run(exec_ref exec, const problem& p, state* s, arena scratch) const {
  if (is_causal)
    detail::linear_sweeper<Arch, Acc>(*this, p, s, scratch, exec.concurrency()).run(exec);
  else
    detail::linear_bidirectional<Arch, Acc>(*this, p, scratch, exec.concurrency()).run(exec);
}
FOVEA_INSTANTIATE(template void linear_attention::run<simd::native, float>(exec_ref, const problem&, state*, arena)
                      const;
                  template void linear_attention::run<simd::native, double>(exec_ref, const problem&, state*, arena)
                      const;)
#endif

inline std::size_t linear_attention::workspace_size(const shape& s, int threads) const {
  arena a;
  const auto lay_out = [&](auto zero) {
    using Acc = decltype(zero);
    if (is_causal)
      detail::linear_sweeper<simd::native, Acc>::lay_out(a, *this, s, threads);
    else
      detail::linear_bidirectional<simd::native, Acc>::lay_out(a, *this, s, threads);
  };
  s.type == dtype::f64 ? lay_out(0.0) : lay_out(0.0F);
  return a.bytes();
}

inline void linear_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? run<simd::native, double>(exec, p, nullptr, scratch)
                         : run<simd::native, float>(exec, p, nullptr, scratch);
}

inline void linear_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  p.q.type == dtype::f64 ? run<simd::native, double>(exec, p, &s, scratch)
                         : run<simd::native, float>(exec, p, &s, scratch);
  s.set_tokens(s.tokens() + p.k.length);
}

inline double linear_attention::macs(const shape& s) const {
  const double r = static_cast<double>(phi().features(s.d)), e = static_cast<double>(s.e), B = static_cast<double>(s.B);
  const double queries = static_cast<double>(s.n * std::max(s.H, s.G)), keys = static_cast<double>(s.m * s.G);
  const double maps = phi().macs(s.d) * static_cast<double>(s.n * s.H + s.m * s.G);
  return B * (queries * r * (e + (normalised() ? 1.0 : 0.0)) + keys * r * (is_delta(rule) ? 2.0 : 1.0) * e + maps);
}

inline double linear_attention::step_macs(const shape& s) const {
  shape one = s;
  one.n = one.m = 1;
  return macs(one);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
