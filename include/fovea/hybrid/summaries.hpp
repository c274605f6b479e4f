// SPDX-License-Identifier: MIT
#pragma once
/// @file  Which block summaries a hybrid_attention needs, and where they lie: in the scratch of a call, or in a state behind the KV cache.
///
/// State      kv_cache ([B, G, capacity, d] keys, [B, G, capacity, e] values, storage type), then for each KV head its block_summary.

#include <fovea/core/kv_cache.hpp>
#include <fovea/hybrid.hpp>
#include <fovea/kernel/block_select.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline kernel::summary_needs hybrid_needs(const hybrid_attention& m) {
  const bool pools = m.compensate != compensation::none;
  kernel::summary_needs needs;
  needs.means = pools || m.select == block_selector::mean || m.select == block_selector::variance;
  needs.spread = m.compensate == compensation::cumulant || m.select == block_selector::variance;
  needs.range = m.select == block_selector::bound;
  needs.levels = m.select == block_selector::int8 ? 127 : m.select == block_selector::int4 ? 7 : 0;
  return needs;
}

/// The summaries of all KV heads in one stretch of memory.
template <class Acc>
struct hybrid_summaries {
  kernel::summary_needs needs;
  isize tokens, block_k, d, e;
  std::size_t piece;
  std::byte* base = nullptr;

  hybrid_summaries(const hybrid_attention& m, const shape& s, isize capacity) : needs(hybrid_needs(m)), tokens(capacity), block_k(m.block_k), d(s.d), e(s.e) {
    arena measure;
    kernel::block_summary<Acc>(measure, needs, tokens, block_k, d, e);
    piece = measure.bytes();
  }
  bool any() const { return needs.means || needs.range || needs.levels > 0; }
  kernel::block_summary<Acc> head(isize index) const {
    arena memory(std::span<std::byte>(base + static_cast<std::size_t>(index) * piece, piece));
    return {memory, needs, tokens, block_k, d, e};
  }
  std::size_t bytes(isize heads) const { return piece * static_cast<std::size_t>(heads); }

  /// Folds the rows of k and v, which are tokens first, first + 1, ..., into every head's summary. `scratch`: max(d, e) a slot.
  void append(exec_ref exec, const tensor_ref& k, const tensor_ref& v, isize first, Acc* scratch) const {
    if (!any()) return;
    exec.for_tasks(k.batch * k.heads, [&](isize task, isize slot) {
      kernel::summarise<simd::native>(head(task), first, k.length, k, v, task / k.heads, task % k.heads, scratch + slot * (d > e ? d : e));
    });
  }
};

/// The summaries that lie in a state, behind its KV cache.
template <class Acc>
hybrid_summaries<Acc> hybrid_summaries_of(const hybrid_attention& m, const state& s) {
  hybrid_summaries<Acc> all(m, s.sizes(), s.sizes().m);
  all.base = s.as<std::byte>() + round_up(kv_cache::bytes(s.sizes()), alignment);
  return all;
}

inline std::size_t hybrid_state_bytes(const hybrid_attention& m, const shape& s) {
  const std::size_t summaries = s.type == dtype::f64 ? hybrid_summaries<double>(m, s, s.m).bytes(s.B * s.G) : hybrid_summaries<float>(m, s, s.m).bytes(s.B * s.G);
  return round_up(kv_cache::bytes(s), alignment) + summaries;
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
