// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a hybrid_attention computes of each row: its share of the exact softmax mass, and its share of the keys.
///
///   recall_i  = sum_{j computed} e^(s_ij) / sum_{j allowed} e^(s_ij) = e^(lse of the computed keys - lse of exact attention)
///   density_i = |{j computed}| / |{j allowed}|           kept keys count as computed; 1 for a row that may see nothing

#include <limits>
#include <vector>

#include <fovea/hybrid/prefill.hpp>
#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline void mass_recall(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k, tensor_ref v,
                        tensor_mut out) {
  hybrid_attention computed = m;
  computed.compensate = compensation::none;
  computed.variance_share = 1, computed.variance_cap = std::numeric_limits<double>::infinity();
  require(!m.target.on(), "mass_recall of a mechanism with an error target; prefill_within tells what is proven");
  softmax_attention exact{.scale = m.scale};
  if (m.is_causal) exact.mask = causal{.align = m.align};

  const bool wide = q.type == dtype::f64;
  const std::size_t element = wide ? 8 : 4, rows = static_cast<std::size_t>(q.batch * q.heads * q.length);
  buffer o(rows * static_cast<std::size_t>(v.width) * size_of(q.type)), sums(rows * element);
  const tensor_mut values{o.data(),           q.type, q.batch, q.heads, q.length, v.width, q.heads * q.length * v.width,
                          q.length * v.width, v.width};
  const tensor_mut lse{
      sums.data(), wide ? dtype::f64 : dtype::f32, q.batch, q.heads, q.length, 1, q.heads * q.length, q.length, 1};
  require(
      out.type == lse.type && out.batch == q.batch && out.heads == q.heads && out.length == q.length && out.width == 1,
      "out is ", detail::describe(out), "; mass_recall wants ", detail::describe(lse));
  fovea::prefill(exec, computed, q, k, v, values, {.lse = out});
  fovea::prefill(exec, exact, q, k, v, values, {.lse = lse});
  for (isize b = 0; b < q.batch; ++b)
    for (isize h = 0; h < q.heads; ++h)
      for (isize i = 0; i < q.length; ++i) {
        const double all = lse.get(b, h, i, 0), some = out.get(b, h, i, 0);
        out.set(b, h, i, 0,
                std::isinf(all) && all < 0 ? 1.0 : std::exp(some - all));  // a row with no key misses nothing
      }
}

namespace detail {

/// Keys before `seen` that a pattern computes for row i.
inline isize computed_of_pattern(const hybrid_attention& m, const mask_site& at, isize i, isize seen) {
  const hsa_pattern pattern{m.pattern, m.stride, m.align};
  isize count = 0;
  for (isize j = 0; j < seen; ++j) count += pattern.visible(at, i, j) ? 1 : 0;
  return count;
}

template <class Acc>
void density(exec_ref exec, const hybrid_attention& m, const problem& p, const tensor_mut& out) {
  const shape s = p.shape();
  const kernel::block_rule rule = hybrid_run<Acc>(m, s, 0).rule;
  const isize width = rule.blocks(), lines = m.select == block_selector::pattern ? 0 : ceil_div(s.n, m.block_q);
  std::vector<std::uint8_t> fates(static_cast<std::size_t>(s.B * s.H * lines * width));
  buffer work(m.workspace_size(s, exec.concurrency()) + alignment);
  if (lines > 0) hybrid_run<Acc>::prefill(m, exec, p, arena(work.span()), fates.data());
  kernel::summary_needs needs;
  if (m.kept_share() > 0) needs.keep(m.keep_small, m.block_k);
  hybrid_summaries<Acc> all(needs, m.block_k, s, s.m);
  buffer memory(all.bytes(s.B * s.G) + alignment);
  all.base = memory.data();
  std::vector<Acc> fold(static_cast<std::size_t>(std::max(s.d, s.e) * exec.concurrency()));
  all.append(exec, p.k, p.v, 0, fold.data());
  exec.for_tasks(s.B * s.H, [&](isize task, isize) {
    const isize b = task / s.H, h = task % s.H;
    const kernel::block_summary<Acc> summary = all.head(b * s.G + h / s.group());
    const mask_site at{b, h, s.n, s.m, s.H, s.G, s.B};
    for (isize i = 0; i < s.n; ++i) {
      const isize seen = std::clamp<isize>(m.is_causal ? m.align.position(at, i) + 1 : s.m, 0, s.m);
      isize count = lines == 0 ? computed_of_pattern(m, at, i, seen) : 0;
      const std::uint8_t* fate = fates.data() + (task * lines + i / m.block_q) * width;
      for (isize J = 0; lines > 0 && J * m.block_k < seen; ++J)
        count += fate[J] == kernel::computed ? std::min((J + 1) * m.block_k, seen) - J * m.block_k : 0;
      const isize over = m.is_causal ? rule.start(i / m.block_q) : s.m;  // stretches that end before the query block
      for (isize x = 0; summary.kept > 0 && (x / summary.kept + 1) * summary.stretch <= std::min(over, s.m); ++x)
        count += fate[summary.small[x] / m.block_k] != kernel::computed ? 1 : 0;
      out.set(b, h, i, 0, seen == 0 ? 1.0 : static_cast<double>(count) / static_cast<double>(seen));
    }
  });
}

}  // namespace detail

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void computed_density(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k,
                                       tensor_ref v, tensor_mut out) {
  const bool wide = q.type == dtype::f64;
  buffer o(static_cast<std::size_t>(q.batch * q.heads * q.length * v.width) * size_of(q.type));
  const problem p{
      q,
      k,
      v,
      {o.data(), q.type, q.batch, q.heads, q.length, v.width, q.heads * q.length * v.width, q.length * v.width, v.width},
      {},
      {},
      {}};
  m.check(p);
  require(out.type == (wide ? dtype::f64 : dtype::f32) && out.batch == q.batch && out.heads == q.heads &&
              out.length == q.length && out.width == 1,
          "out is ", detail::describe(out), "; computed_density wants [", q.batch, ", ", q.heads, ", ", q.length,
          ", 1] ", wide ? "f64" : "f32");
  wide ? detail::density<double>(exec, m, p, out) : detail::density<float>(exec, m, p, out);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
