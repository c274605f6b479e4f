// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention: from a checked problem to tasks over superblocks of query rows.

#include <fovea/core/partial.hpp>
#include <fovea/softmax/keys.hpp>
#include <fovea/softmax/step.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct softmax_run {
  using loop = kernel::online_softmax<simd::native, Acc>;

  static std::size_t slot_bytes(const shape& s) {
    arena measure;
    loop(measure, s.group() * s.n, s.d, s.e);
    return measure.bytes();
  }
  static std::size_t workspace_size(const shape& s, int threads) {
    arena measure;
    if (softmax_few_rows<Acc>::fits(s))
      typename softmax_few_rows<Acc>::layout(measure, s, threads);
    else
      measure.take<std::byte>(static_cast<isize>(slot_bytes(s)) * threads);
    return measure.bytes();
  }

  static void prefill(const softmax_attention& m, exec_ref exec, const problem& p, arena scratch) {
    const shape s = p.shape();
    if (softmax_few_rows<Acc>::fits(s)) return softmax_few_rows<Acc>::run(m, exec, p, scratch);
    const isize rows = s.group() * s.n, block = loop::superblock(rows, s.d, s.e), blocks = ceil_div(rows, block),
                heads = s.B * s.G;
    const double scale = m.scale_for(s);
    const std::size_t piece = slot_bytes(s);
    std::byte* base =
        scratch.take<std::byte>(static_cast<isize>(piece) * exec.concurrency());  // slot t owns the t-th piece
    exec.for_tasks(heads * blocks, [&](isize task, isize slot) {
      // The last rows come first: under a causal mask they take longest, and no thread is left with them at the end.
      const isize sb = blocks - 1 - task / heads, b = task % heads / s.G, g = task % s.G;
      arena own(std::span<std::byte>(base + static_cast<std::size_t>(slot) * piece, piece));
      loop run(own, rows, s.d, s.e);
      run.begin({p.q, b, g * s.group(), sb * block, sb * block + block < rows ? sb * block + block : rows}, scale,
                m.sinks);
      if (s.m > 0) run.absorb(softmax_keys<Acc>(m, p, b, g));
      run.finish(p.out, p.lse);
    });
  }
};

}  // namespace detail

inline std::size_t softmax_attention::workspace_size(const shape& s, int threads) const {
  // A state's call is measured with the shape of the call: n rows, whatever the number of keys.
  return s.type == dtype::f64 ? detail::softmax_run<double>::workspace_size(s, threads)
                              : detail::softmax_run<float>::workspace_size(s, threads);
}

inline void softmax_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::softmax_run<double>::prefill(*this, exec, p, scratch);
  else
    detail::softmax_run<float>::prefill(*this, exec, p, scratch);
}

inline void softmax_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  kv_cache::append(p, s);
  problem all = p;
  all.k = kv_cache::keys(s, s.tokens());
  all.v = kv_cache::values(s, s.tokens());
  prefill(exec, all, scratch);
}

inline double softmax_attention::macs(const shape& s) const {
  double pairs = 0;  // visible pairs of one head, by tiles of the mask's own answers along the rows
  mask_site at = site(s, 0);
  for (isize i = 0; i < s.n; ++i) {
    const range r = mask.keys(at, i, i + 1);
    if (r.empty()) continue;
    if (mask.tile(at, i, i + 1, r.first, r.last) == tile_kind::full)
      pairs += static_cast<double>(r.last - r.first);
    else
      for (isize j = r.first; j < r.last; ++j) pairs += mask.visible(at, i, j) ? 1 : 0;
  }
  return static_cast<double>(s.B * s.H * (s.d + s.e)) * pairs;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
