// SPDX-License-Identifier: MIT
#pragma once
/// @file  efficient_attention: from a checked problem to tasks. Bidirectional: contexts by stretches of keys, then queries by blocks
///        of rows. Causal: one sweep a KV head, cut by value columns.

#include <cmath>

#include <fovea/core/absorb.hpp>
#include <fovea/efficient/mechanism.hpp>
#include <fovea/kernel/channel_softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// One role of the product (left^T right), then query * context: a tensor, and how many context heads share one of its heads.
struct channel_role {
  tensor_ref t;
  isize share = 1;
  kernel::stored_rows rows(isize b, isize context, isize first) const {
    return {t.row(b, context / share, first), t.type, t.row_stride};
  }
};

/// out = f(query) * g(left^T right), contexts in heads of their own.
struct channel_plan {
  channel_role left, right;  ///< "keys" [d] and "values" [e] of the context
  tensor_ref query;
  tensor_mut out;
  isize contexts = 0;            ///< heads of contexts
  isize query_share = 1;         ///< out heads that share a query head
  isize context_share = 1;       ///< out heads that share a context
  bool exponential = true;       ///< keys are normalised over positions
  bool feature_softmax = true;   ///< queries are normalised over features
  bool context_softmax = false;  ///< rows of the context are normalised (k-free forms)
  bool mean = false;             ///< the context is divided by the number of keys (scaling normalisation)
  double query_scale = 1, context_scale = 1;
  std::span<const std::int32_t> lengths = {};

  isize keys_of(isize b) const { return lengths.empty() ? left.t.length : lengths[static_cast<std::size_t>(b)]; }
};

template <class Acc>
struct channel_run {
  using Arch = simd::native;
  using states = kernel::channel_state<Acc>;
  static constexpr isize rows = 64, stretch = 2048, most_stretches = 16;

  isize d, e, B, contexts, parts;
  Acc *partial, *context;
  std::byte* pieces;
  std::size_t piece;

  /// Lays out (or measures) the scratch of a bidirectional run; `length` is the longest item.
  channel_run(arena& memory, isize d_, isize e_, isize B_, isize contexts_, isize length, int threads)
      : d(d_), e(e_), B(B_), contexts(contexts_), parts(parts_of(length)) {
    partial = memory.take<Acc>(B * contexts * parts * states::size(d, e));
    context = memory.take<Acc>(B * contexts * d * e);
    arena one;
    kernel::channel_blocks<Arch, Acc>(one, d, e);
    arena two;
    two.take<Acc>(rows * d), two.take<Acc>(rows * e);
    piece = round_up(one.bytes() > two.bytes() ? one.bytes() : two.bytes(), alignment);
    pieces = memory.take<std::byte>(static_cast<isize>(piece) * threads);
  }
  /// Stretches of an item of `length` keys: a matter of its own length alone.
  static isize parts_of(isize length) {
    const isize p = ceil_div(length, stretch);
    return p < 1 ? 1 : p < most_stretches ? p : most_stretches;
  }
  arena scratch(isize slot) const {
    return arena(std::span<std::byte>(pieces + static_cast<std::size_t>(slot) * piece, piece));
  }
  Acc* part(isize head, isize x) const { return partial + (head * parts + x) * states::size(d, e); }

  void contexts_of(exec_ref exec, const channel_plan& p) const {
    exec.for_tasks(B * contexts * parts, [&](isize task, isize slot) {
      const isize head = task / parts, x = task % parts, b = head / contexts, c = head % contexts;
      const isize length = p.keys_of(b), own = parts_of(length);
      if (x >= own) return;
      const isize share = ceil_div(ceil_div(length, own), kernel::channel_blocks<Arch, Acc>::block) *
                          kernel::channel_blocks<Arch, Acc>::block;
      const isize first = x * share < length ? x * share : length,
                  last = first + share < length ? first + share : length;
      arena memory = scratch(slot);
      kernel::channel_blocks<Arch, Acc> blocks(memory, d, e);
      const states s = states::at(part(head, x), d, e);
      s.clear();
      if (first < last)
        blocks.absorb(s, p.left.rows(b, c, first), p.right.rows(b, c, first), last - first, p.exponential);
    });
    exec.for_tasks(B * contexts, [&](isize head, isize) {
      const isize length = p.keys_of(head / contexts);
      const states s = states::at(part(head, 0), d, e);
      for (isize x = 1; x < parts_of(length); ++x)
        kernel::merge_channels<Arch, Acc>(s, states::at(part(head, x), d, e), p.exponential);
      finish(s, p, length, context + head * d * e);
    });
  }
  void finish(const states& s, const channel_plan& p, isize length, Acc* out) const {
    const double factor = length == 0 ? 0.0 : p.mean ? p.context_scale / static_cast<double>(length) : p.context_scale;
    kernel::finish_channels<Arch, Acc>(s, p.exponential ? s.sum : nullptr, factor, out);
    if (p.context_softmax && length > 0) kernel::softmax_rows<Arch, Acc>(out, d, e, 1.0);
  }

  void queries(exec_ref exec, const channel_plan& p) const {
    const isize n = p.query.length, blocks = ceil_div(n, rows), heads = p.out.heads;
    exec.for_tasks(B * heads * blocks, [&](isize task, isize slot) {
      const isize b = task / (heads * blocks), h = task / blocks % heads, i0 = task % blocks * rows,
                  count = n - i0 < rows ? n - i0 : rows;
      arena memory = scratch(slot);
      Acc *weights = memory.take<Acc>(rows * d), *result = memory.take<Acc>(rows * e);
      const isize qh = h / p.query_share;
      kernel::feature_rows<Arch, Acc>({p.query.row(b, qh, i0), p.query.type, p.query.row_stride}, count, d,
                                      p.query_scale, p.feature_softmax, weights);
      const Acc* map = context + (b * contexts + h / p.context_share) * d * e;
      const bool direct = p.out.type == dtype_of<Acc>;
      Acc* to = direct ? static_cast<Acc*>(p.out.row(b, h, i0)) : result;
      tile::gemm<Arch, Acc>(count, e, d, weights, d, 1, map, e, to, direct ? p.out.row_stride : e, false);
      for (isize i = 0; !direct && i < count; ++i)
        simd::store_row<Arch, Acc>(p.out.type, result + i * e, e, p.out.row(b, h, i0 + i));
    });
  }
};

inline channel_plan plan_of(const efficient_attention& m, const problem& p) {
  const isize group = p.shape().group();
  channel_plan plan;
  plan.left.t = p.k, plan.right.t = p.v, plan.query = p.q, plan.out = p.out;
  plan.contexts = p.k.heads, plan.context_share = group;
  plan.exponential = plan.feature_softmax = m.normalisation == efficient_normalisation::softmax;
  plan.mean = !plan.exponential;
  plan.query_scale = m.scale_for(), plan.lengths = m.lengths;
  return plan;
}

/// The causal sweep over the states at `at(b, g)`, contiguous, `seen` tokens in them.
template <class Acc>
struct channel_prefix {
  using Arch = simd::native;
  using states = kernel::channel_state<Acc>;
  static constexpr isize columns = 64;

  shape s;
  isize panels;
  Acc *own, *ends;
  std::byte* pieces;
  std::size_t piece;

  channel_prefix(arena& memory, const shape& sizes, int threads) : s(sizes), panels(ceil_div(s.e, columns)) {
    own = memory.take<Acc>(s.B * s.G * states::size(s.d, s.e));
    ends = memory.take<Acc>(s.B * s.G * 2 * s.d);
    arena one;
    one.take<Acc>(2 * s.d);
    kernel::channel_sweep<Arch, Acc>(one, s.d, s.e < columns ? s.e : columns, s.group());
    piece = round_up(one.bytes(), alignment);
    pieces = memory.take<std::byte>(static_cast<isize>(piece) * threads);
  }
  void clear() const {
    for (isize x = 0; x < s.B * s.G; ++x) states::at(own + x * states::size(s.d, s.e), s.d, s.e).clear();
  }

  void run(exec_ref exec, const efficient_attention& m, const problem& p, Acc* at, isize seen) const {
    const isize size = states::size(s.d, s.e);
    exec.for_tasks(s.B * s.G * panels, [&](isize task, isize slot) {
      const isize head = task / panels, x0 = task % panels * columns, width = s.e - x0 < columns ? s.e - x0 : columns;
      const states whole = states::at(at + head * size, s.d, s.e);
      arena memory(std::span<std::byte>(pieces + static_cast<std::size_t>(slot) * piece, piece));
      // Every panel of columns walks the same maxima and sums in memory of its own; the first one leaves its end values.
      Acc* top = memory.take<Acc>(2 * s.d);
      for (isize c = 0; c < 2 * s.d; ++c) top[c] = whole.top[c];
      const states part{top, top + s.d, whole.context + x0, s.d, width};
      kernel::channel_sweep<Arch, Acc> sweep(memory, s.d, s.e < columns ? s.e : columns, s.group());
      const isize b = head / s.G, g = head % s.G, size_v = static_cast<isize>(size_of(p.v.type));
      kernel::stored_rows v{s.m > 0 ? static_cast<const unsigned char*>(p.v.row(b, g, 0)) + x0 * size_v : nullptr,
                            p.v.type, p.v.row_stride};
      kernel::stored_rows k{p.k.row(b, g, 0), p.k.type, p.k.row_stride};
      sweep.run(part, s.e,
                {k, v, &p.q, &p.out, b, g * s.group(), s.group(), s.n - s.m, x0, m.scale_for(),
                 m.normalisation == efficient_normalisation::softmax, seen},
                s.m);
      for (isize c = 0; x0 == 0 && c < 2 * s.d; ++c) ends[head * 2 * s.d + c] = top[c];
    });
    for (isize head = 0; head < s.B * s.G; ++head)
      for (isize c = 0; c < 2 * s.d; ++c) at[head * size + c] = ends[head * 2 * s.d + c];
    for (isize b = 0; b < s.B; ++b)  // rows before the first key
      for (isize h = 0; h < s.H; ++h)
        for (isize i = 0; i < s.n - s.m; ++i)
          for (isize x = 0; x < s.e; ++x) p.out.set(b, h, i, x, 0.0);
  }
};

template <class Acc>
void efficient_layout(const efficient_attention& m, arena& memory, const shape& s, int threads) {
  if (m.causal)
    channel_prefix<Acc>(memory, s, threads);
  else
    channel_run<Acc>(memory, s.d, s.e, s.B, s.G, s.m, threads);
}

template <class Acc>
void efficient_prefill(const efficient_attention& m, exec_ref exec, const problem& p, arena memory) {
  const shape s = p.shape();
  if (m.causal) {
    const channel_prefix<Acc> run(memory, s, exec.concurrency());
    run.clear();
    run.run(exec, m, p, run.own, 0);
  } else {
    const channel_run<Acc> run(memory, s.d, s.e, s.B, s.G, s.m, exec.concurrency());
    const channel_plan plan = plan_of(m, p);
    run.contexts_of(exec, plan);
    run.queries(exec, plan);
  }
}

}  // namespace detail

inline void efficient_attention::check_settings() const {
  if (scale) {
    require_finite("scale", *scale);
    require(*scale > 0, "scale is ", *scale, "; it must be positive");
  }
  require(normalisation <= efficient_normalisation::scaling, "normalisation is ", static_cast<int>(normalisation),
          "; wanted softmax or scaling");
  require(lengths.empty() || !causal,
          "lengths were given with causal = true; padding behind the last key is never seen by a causal row, leave "
          "them out");
}

inline void efficient_attention::check(const problem& p) const {
  detail::check_problem(p);
  check_settings();
  require(!p.lse, "lse was given; efficient attention is no softmax over keys and has no log-sum-exp");
  detail::check_lengths(lengths, p.q.batch, p.k.length);
}

inline std::size_t efficient_attention::workspace_size(const shape& s, int threads) const {
  arena measure;
  s.type == dtype::f64 ? detail::efficient_layout<double>(*this, measure, s, threads)
                       : detail::efficient_layout<float>(*this, measure, s, threads);
  return measure.bytes();
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void efficient_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? detail::efficient_prefill<double>(*this, exec, p, scratch)
                         : detail::efficient_prefill<float>(*this, exec, p, scratch);
}
#endif

inline double efficient_attention::macs(const shape& s) const {
  return static_cast<double>(s.B) * static_cast<double>(s.G * s.m + s.H * s.n) * static_cast<double>(s.d * s.e);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
