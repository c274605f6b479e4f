// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention, backward: three key sets under one lse, the gradients of pooled tokens spread over their keys and values.
///
///   p_ij = e^(s_ij - lse_i) for computed keys and pooled tokens alike,   dS = p (dO . v - dO . o)
///   k_J = sum_{j in J} k_j / n_J,  v_J likewise:   dk_j += dk_J / n_J,   dv_j += dv_J / n_J
///
/// The selection is not differentiated: it is made again, and is the one of the prefill. Computed keys, pooled tokens and kept keys are each the
/// backward pass of softmax_attention under the joint lse and out.
///
/// Contract   out and lse as prefill (without a state) wrote them. With compensation none and zeroth. The same bits for any number of threads.
/// Cost       10 d flops for each computed pair, and one prefill for the plan.   Memory  linear in n and m, and the plan: a byte for each
///            query block, key block and head.

#include <fovea/hybrid/prefill.hpp>
#include <fovea/softmax/backward.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// What a recorded plan says of keys: those in blocks whose fate is `wanted`, or the keys of a list in blocks that are not computed.
struct recorded_keys {
  const std::uint8_t* fates = nullptr;  ///< [B, H, rows, blocks]
  isize rows = 0, blocks = 0, block_q = 1, block_k = 1, offset = 0;
  bool causal = false;
  std::uint8_t wanted = kernel::computed;
  const std::int32_t* list = nullptr;  ///< [B, G, m] places of keys; null: key j stands at j

  const std::uint8_t* row(const mask_site& at, isize i) const {
    return fates + ((at.b * at.H + at.h) * rows + i / block_q) * blocks;
  }
  isize place(const mask_site& at, isize j) const {
    return list == nullptr ? j : list[(at.b * at.G + at.h / (at.H / at.G)) * at.m + j];
  }
  bool visible(const mask_site& at, isize i, isize j) const {
    const isize t = place(at, j);
    const std::uint8_t fate = row(at, i)[t / block_k];
    return (list == nullptr ? fate == wanted : fate != kernel::computed) && (!causal || t <= i + offset);
  }
  range keys(const mask_site& at, isize, isize i1) const {
    return {0, causal && list == nullptr ? std::max<isize>(i1 + offset, 0) : at.m};
  }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    bool any = false, all = true;
    for (isize i = i0; i < i1 && (all || !any); i = std::min(i1, (i / block_q + 1) * block_q)) {
      const isize last = std::min(i1, (i / block_q + 1) * block_q) - 1;
      for (isize j = j0; j < j1; j = list == nullptr ? std::min(j1, (j / block_k + 1) * block_k) : j + 1) {
        const isize end = list == nullptr ? std::min(j1, (j / block_k + 1) * block_k) - 1 : j;
        any = any || visible(at, last, j), all = all && visible(at, i, end);
      }
    }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }
};

/// log n_J of the pooled tokens of each KV head.
template <class Acc>
struct member_bias {
  const Acc* table = nullptr;  ///< [B, G, m]
  static constexpr bool unit_slope = true;
  template <class T>
  T operator()(const mask_site& at, isize, isize j, T s) const {
    return s + static_cast<T>(table[(at.b * at.G + at.h / (at.H / at.G)) * at.m + j]);
  }
  template <class T>
  T slope(const mask_site&, isize, isize, T) const {
    return T(1);
  }
};

template <class Acc>
class hybrid_backward_run {
  using Arch = simd::native;

 public:
  hybrid_backward_run(arena& memory, const hybrid_attention& m, const shape& s, int threads)
      : m_(m), s_(s), rule_(hybrid_run<Acc>(m, s, 0).rule), all_(needs_of(m), m.block_k, s, s.m) {
    const auto take = [&](isize heads, isize rows, isize width) {
      auto* data = memory.take<Acc>(s.B * heads * rows * width);
      return tensor_mut(data, dtype_of<Acc>, s.B, heads, rows, width, heads * rows * width, rows * width, width);
    };
    if (m.select != block_selector::pattern) {
      fates_ = memory.take<std::uint8_t>(s.B * s.H * ceil_div(s.n, m.block_q) * rule_.blocks());
      out_ = take(s.H, s.n, s.e), lse_ = take(s.H, s.n, 1);
      all_.base = memory.take<std::byte>(static_cast<isize>(all_.bytes(s.B * s.G)));
      fold_ = memory.take<Acc>(std::max(s.d, s.e) * threads);
    }
    pools_ = m.compensate == compensation::none ? 0 : rule_.blocks() * m.parts;
    kept_ = all_.needs.kept == 0 ? 0 : s.m / all_.needs.stretch * all_.needs.kept;
    row_ = memory.take<Acc>(std::max(s.d, s.e) * threads);
    dq_ = take(s.H, s.n, s.d), dk_ = take(s.G, s.m, s.d), dv_ = take(s.G, s.m, s.e);
    for (extra* x : {&pooled_, &small_}) {
      const isize rows = x == &pooled_ ? pools_ : kept_;
      x->k = take(s.G, rows, s.d), x->v = take(s.G, rows, s.e), x->dk = take(s.G, rows, s.d),
      x->dv = take(s.G, rows, s.e);
      x->dq = take(s.H, rows > 0 ? s.n : 0, s.d);
    }
    bias_ = memory.take<Acc>(s.B * s.G * pools_), list_ = memory.take<std::int32_t>(s.B * s.G * kept_);
    own_ = std::max(m.workspace_size(s, threads), exact_of({}).workspace_size_backward(s, threads));
    for (const isize rows : {pools_, kept_}) {
      shape few = s;
      few.m = rows;
      own_ = std::max(own_, scored({}).workspace_size_backward(few, threads));
    }
    own_memory_ = memory.take<std::byte>(static_cast<isize>(own_));
  }

  void run(exec_ref exec, const backward_problem& p) {
    backward_problem part{p.q, p.k, p.v, p.out, p.lse, p.dout, {}};
    part.to.dq = dq_, part.to.dk = dk_, part.to.dv = dv_;
    if (m_.select == block_selector::pattern) {
      exact_of(hsa_pattern{m_.pattern, m_.stride, m_.align}).backward(exec, part, scratch());
    } else {
      plan(exec, p);
      exact_of(recorded(kernel::computed, m_.block_k)).backward(exec, part, scratch());
      if (pools_ > 0) pooled(exec, part);
      if (kept_ > 0) small(exec, part);
    }
    exec.for_tasks(s_.B * s_.G, [&](isize task, isize slot) {
      spread(p, task / s_.G, task % s_.G, row_ + slot * std::max(s_.d, s_.e));
    });
  }

 private:
  struct extra {  // keys and values beside those of the call, and their gradients
    tensor_mut k, v, dk, dv, dq;
  };

  static kernel::summary_needs needs_of(const hybrid_attention& m) { return hybrid_needs(m); }
  softmax_attention exact_of(const fovea::mask& visible) const {
    softmax_attention x;
    x.scale = m_.scale, x.mask = visible;
    return x;
  }
  softmax_attention scored(const fovea::mask& visible) const {
    softmax_attention x = exact_of(visible);
    x.score = member_bias<Acc>{bias_};
    return x;
  }
  recorded_keys recorded(std::uint8_t wanted, isize block_k) const {
    return {fates_,
            ceil_div(s_.n, m_.block_q),
            rule_.blocks(),
            m_.block_q,
            block_k,
            rule_.offset,
            rule_.causal && wanted == kernel::computed,
            wanted};
  }
  arena scratch() const { return arena({own_memory_, own_}); }

  /// The fates of the prefill, and the summaries that it made them from.
  void plan(exec_ref exec, const backward_problem& p) {
    problem again = p.forward();
    again.out = out_, again.lse = lse_;
    hybrid_run<Acc>::prefill(m_, exec, again, scratch(), fates_);
    all_.append(exec, p.k, p.v, 0, fold_);
  }

  void pooled(exec_ref exec, backward_problem part) {
    for (isize head = 0; head < s_.B * s_.G; ++head) {
      const kernel::block_summary<Acc> of = all_.head(head);
      const isize b = head / s_.G, g = head % s_.G;
      for (isize x = 0; x < pools_; ++x) {
        const bool empty = of.members[x] == 0;
        std::copy_n(of.pool_k() + x * s_.d, empty ? 0 : s_.d, static_cast<Acc*>(pooled_.k.row(b, g, x)));
        std::copy_n(of.pool_v() + x * s_.e, empty ? 0 : s_.e, static_cast<Acc*>(pooled_.v.row(b, g, x)));
        if (empty) std::fill_n(static_cast<Acc*>(pooled_.k.row(b, g, x)), s_.d, Acc(0));
        if (empty) std::fill_n(static_cast<Acc*>(pooled_.v.row(b, g, x)), s_.e, Acc(0));
        bias_[head * pools_ + x] = std::log(static_cast<Acc>(of.members[x]));
      }
    }
    part.k = pooled_.k, part.v = pooled_.v;
    part.to.dq = pooled_.dq, part.to.dk = pooled_.dk, part.to.dv = pooled_.dv;
    scored(recorded(kernel::pooled, m_.parts)).backward(exec, part, scratch());
  }

  void small(exec_ref exec, backward_problem part) {
    for (isize head = 0; head < s_.B * s_.G; ++head) {
      const kernel::block_summary<Acc> of = all_.head(head);
      const isize b = head / s_.G, g = head % s_.G;
      for (isize x = 0; x < kept_; ++x) {
        const isize t = of.small[x];
        list_[head * kept_ + x] = of.small[x];
        simd::load_row<Arch, Acc>(part.k.type, part.k.row(b, g, t), s_.d, static_cast<Acc*>(small_.k.row(b, g, x)));
        simd::load_row<Arch, Acc>(part.v.type, part.v.row(b, g, t), s_.e, static_cast<Acc*>(small_.v.row(b, g, x)));
      }
    }
    part.k = small_.k, part.v = small_.v;
    part.to.dq = small_.dq, part.to.dk = small_.dk, part.to.dv = small_.dv;
    recorded_keys visible = recorded(kernel::computed, m_.block_k);
    visible.list = list_;
    exact_of(visible).backward(exec, part, scratch());
  }

  static void add(Acc* to, const Acc* from, isize width, Acc factor) {
    for (isize c = 0; c < width; ++c) to[c] += factor * from[c];
  }
  static void add_row(const tensor_mut& to, isize b, isize h, isize i, const tensor_mut& from, isize j, Acc factor) {
    add(static_cast<Acc*>(to.row(b, h, i)), static_cast<const Acc*>(from.row(b, h, j)), to.width, factor);
  }

  /// All parts into the gradients of one KV head and its queries.
  void spread(const backward_problem& p, isize b, isize g, Acc*) const {
    for (isize h = g * s_.group(); h < (g + 1) * s_.group(); ++h)
      for (const extra* x : {&pooled_, &small_})
        for (isize i = 0; i < x->dq.length; ++i) add_row(dq_, b, h, i, x->dq, i, Acc(1));
    if (pools_ + kept_ > 0) {
      const kernel::block_summary<Acc> of = all_.head(b * s_.G + g);
      for (isize j = 0; pools_ > 0 && j < s_.m; ++j) {
        const isize x = j / (m_.block_k / m_.parts), in = of.members[x];
        if (in == 0 || is_kept(of, j)) continue;
        add_row(dk_, b, g, j, pooled_.dk, x, Acc(1) / static_cast<Acc>(in));
        add_row(dv_, b, g, j, pooled_.dv, x, Acc(1) / static_cast<Acc>(in));
      }
      for (isize x = 0; x < kept_; ++x)
        add_row(dk_, b, g, of.small[x], small_.dk, x, Acc(1)), add_row(dv_, b, g, of.small[x], small_.dv, x, Acc(1));
    }
    const auto store = [&](const tensor_mut& to, const tensor_mut& from, isize head) {
      for (isize i = 0; to && i < from.length; ++i)
        simd::store_row<Arch, Acc>(to.type, static_cast<const Acc*>(from.row(b, head, i)), from.width,
                                   to.row(b, head, i));
    };
    for (isize h = g * s_.group(); h < (g + 1) * s_.group(); ++h) store(p.to.dq, dq_, h);
    store(p.to.dk, dk_, g), store(p.to.dv, dv_, g);
  }
  bool is_kept(const kernel::block_summary<Acc>& of, isize j) const {
    for (isize x = j / std::max<isize>(of.stretch, 1) * of.kept;
         x < kept_ && x < (j / std::max<isize>(of.stretch, 1) + 1) * of.kept; ++x)
      if (of.small[x] == j) return true;
    return false;
  }

  const hybrid_attention& m_;
  shape s_;
  kernel::block_rule rule_;
  hybrid_summaries<Acc> all_;
  isize pools_ = 0, kept_ = 0;
  std::uint8_t* fates_ = nullptr;
  Acc *fold_ = nullptr, *row_ = nullptr, *bias_ = nullptr;
  std::int32_t* list_ = nullptr;
  tensor_mut out_, lse_, dq_, dk_, dv_;
  extra pooled_, small_;
  std::size_t own_ = 0;
  std::byte* own_memory_ = nullptr;
};

template <class Acc>
std::size_t hybrid_backward_bytes(const hybrid_attention& m, const shape& s, int threads) {
  arena measure;
  hybrid_backward_run<Acc>(measure, m, s, threads);
  return measure.bytes();
}

}  // namespace detail

inline void hybrid_attention::check(const backward_problem& p) const {
  detail::check_backward(p);
  check(p.forward());
  require(arithmetic == precision::f32, "arithmetic is ", name_of(arithmetic),
          "; gradients are those of f32: set precision::f32");
  require(compensate == compensation::none || compensate == compensation::zeroth,
          "backward with compensation::", name_of(compensate),
          "; it is for study and has no gradient: wanted none or zeroth");
  require(!target.on(), "backward of a mechanism with an error target; what it computed is not known any more");
  require(p.to.dbias == nullptr && p.to.dsinks == nullptr,
          "dbias or dsinks was asked for; hybrid_attention has neither a score table nor sinks");
}

inline std::size_t hybrid_attention::workspace_size_backward(const shape& s, int threads) const {
  return s.type == dtype::f64 ? detail::hybrid_backward_bytes<double>(*this, s, threads)
                              : detail::hybrid_backward_bytes<float>(*this, s, threads);
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void hybrid_attention::backward(exec_ref exec, const backward_problem& p, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::hybrid_backward_run<double>(scratch, *this, p.shape(), exec.concurrency()).run(exec, p);
  else
    detail::hybrid_backward_run<float>(scratch, *this, p.shape(), exec.concurrency()).run(exec, p);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
