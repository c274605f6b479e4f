// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a state of hybrid_attention holds, for its options: the needs of its summaries, where they lie, how many bytes.

#include <fovea/core/kv_cache.hpp>
#include <fovea/hybrid/plan.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// What a state holds beside its KV cache; s.type: of the cache.
template <class Acc>
kernel::kv_needs hybrid_kv_needs(const hybrid_attention& m, const shape& s) {
  const dtype stored = s.type;
  kernel::kv_needs needs;
  static_cast<kernel::summary_needs&>(needs) = hybrid_needs(m);
  const bool codes = needs.levels > 0, narrow = stored == dtype::f16 || stored == dtype::bf16;
  needs.pools = m.compensate != compensation::none;
  needs.gate = m.select == block_selector::mean || m.select == block_selector::variance;
  needs.copies = codes && needs.kept > 0;
  needs.selections = m.refresh > 1 ? (m.share_group ? 1 : s.group()) : 0;
  needs.pool_type = codes && narrow ? stored : dtype_of<Acc>;
  needs.kept_type = stored == dtype::i8 ? dtype_of<Acc> : stored;
  return needs;
}
/// Scratch of taking tokens in.
template <class Acc>
isize hybrid_settling(const hybrid_attention& m, const shape& s, int threads) {
  return kernel::settle_scratch(hybrid_kv_needs<Acc>(m, s), s.d, s.e) * threads;
}
template <class Acc>
hybrid_memory<Acc> hybrid_memory_of(const hybrid_attention& m, const state& s) {
  hybrid_memory<Acc> all(hybrid_kv_needs<Acc>(m, s.sizes()), m.block_k, s.sizes());
  all.base = s.as<std::byte>() + round_up(kv_cache::bytes(s.sizes()), alignment);
  return all;
}
/// s.type: of the rows that the summaries stand for.
inline std::size_t hybrid_summary_bytes(const hybrid_attention& m, const shape& s) {
  return s.type == dtype::f64 ? hybrid_memory<double>(hybrid_kv_needs<double>(m, s), m.block_k, s).bytes(s.B * s.G)
                              : hybrid_memory<float>(hybrid_kv_needs<float>(m, s), m.block_k, s).bytes(s.B * s.G);
}
inline std::size_t hybrid_state_bytes(const hybrid_attention& m, const shape& s) {
  return round_up(kv_cache::bytes(s), alignment) + hybrid_summary_bytes(m, s);
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
