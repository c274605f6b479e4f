// SPDX-License-Identifier: MIT
#pragma once
/// @file  The block summaries of all KV heads in one stretch of memory: the scratch of a call (hybrid_summaries), or what a state holds
/// beside its KV cache (hybrid_memory).
///
/// State      kv_cache ([B, G, capacity, d] keys, [B, G, capacity, e] values, storage type), or none of its own; then how many tokens
///            the summaries have seen and where the last kept selection was made (64 bytes), then for each KV head its kv_summary.

#include <fovea/core/exec.hpp>
#include <fovea/core/kv_layout.hpp>
#include <fovea/kernel/kv_summary.hpp>

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

/// Keys and values of a call: views, or a sequence of a KV store.
struct hybrid_rows {
  tensor_ref k, v;
  const kv_sequence* kv = nullptr;
  row_source keys(isize b, isize g) const { return kv != nullptr ? kv->keys(g) : rows_of(k, b, g); }
  row_source values(isize b, isize g) const { return kv != nullptr ? kv->values(g) : rows_of(v, b, g); }
};

template <class Acc>
struct hybrid_memory {
  kernel::kv_needs needs;
  isize tokens, block_k, d, e;
  std::size_t piece;
  std::byte* base = nullptr;

  hybrid_memory(const kernel::kv_needs& wanted, isize block, const shape& s)
      : needs(wanted), tokens(s.m), block_k(block), d(s.d), e(s.e) {
    arena measure;
    kernel::kv_summary<Acc>(measure, needs, tokens, block_k, d, e);
    piece = measure.bytes();
  }
  std::size_t bytes(isize heads) const { return alignment + piece * static_cast<std::size_t>(heads); }
  kernel::kv_summary<Acc> head(isize index) const {
    arena memory(std::span<std::byte>(base + alignment + static_cast<std::size_t>(index) * piece, piece));
    return {memory, needs, tokens, block_k, d, e};
  }
  isize scratch() const { return kernel::settle_scratch(needs, d, e); }
  /// One behind the position of the last selection that is kept; 0: there is none.
  std::int64_t& selected() const { return reinterpret_cast<std::int64_t*>(base)[1]; }

  /// Takes in tokens [past, all) of B x G heads; scratch() a slot. Of a cache that was truncated the last stretch is taken in anew.
  void append(exec_ref exec, const hybrid_rows& rows, isize B, isize G, isize past, isize all, Acc* scratch_of) const {
    auto& seen = *reinterpret_cast<std::int64_t*>(base);
    const isize done = seen > past && needs.kept > 0 ? past / needs.stretch * needs.stretch : past;
    if (seen > past) selected() = 0;  // a selection of tokens that are gone
    seen = all;
    if (all / block_k == done / block_k) return;
    exec.for_tasks(B * G, [&](isize task, isize slot) {
      kernel::settle<simd::native>(head(task), done, all, rows.keys(task / G, task % G),
                                   rows.values(task / G, task % G), scratch_of + slot * scratch());
    });
  }
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
