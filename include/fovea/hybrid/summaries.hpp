// SPDX-License-Identifier: MIT
#pragma once
/// @file  The block summaries of all KV heads in one stretch of memory: the scratch of a call, or a state behind its KV cache.
///
/// State      kv_cache ([B, G, capacity, d] keys, [B, G, capacity, e] values, storage type), then for each KV head its block_summary.

#include <fovea/core/exec.hpp>
#include <fovea/kernel/block_summary.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct hybrid_summaries {
  kernel::summary_needs needs;
  isize tokens, block_k, d, e;
  std::size_t piece;
  std::byte* base = nullptr;

  hybrid_summaries(const kernel::summary_needs& wanted, isize block, const shape& s, isize capacity)
      : needs(wanted), tokens(capacity), block_k(block), d(s.d), e(s.e) {
    arena measure;
    kernel::block_summary<Acc>(measure, needs, tokens, block_k, d, e);
    piece = measure.bytes();
  }
  bool any() const { return needs.means || needs.range || needs.bounds || needs.levels > 0 || needs.kept > 0; }
  kernel::block_summary<Acc> head(isize index) const {
    arena memory(std::span<std::byte>(base + static_cast<std::size_t>(index) * piece, piece));
    return {memory, needs, tokens, block_k, d, e};
  }
  std::size_t bytes(isize heads) const { return piece * static_cast<std::size_t>(heads); }

  /// Folds tokens first, first + 1, ... of k and v, which hold all tokens so far, into every head's summary.
  /// `scratch`: max(d, e) a slot.
  void append(exec_ref exec, const tensor_ref& k, const tensor_ref& v, isize first, Acc* scratch) const {
    if (!any()) return;
    exec.for_tasks(k.batch * k.heads, [&](isize task, isize slot) {
      kernel::summarise<simd::native>(head(task), first, k.length - first, k, v, task / k.heads, task % k.heads,
                                      scratch + slot * (d > e ? d : e));
    });
  }
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
