// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention over KV stores: any number of sequences of any lengths in one call, prefill and decoding mixed.
///
///   prefill(exec, m, q, kv, out [, options])     q [B, H, n, d]: sequence s of kv is batch item s
///                                                q [1, H, total, d] and options.cu_q: its rows are cu_q[s] .. cu_q[s + 1]
///   step(exec, m, q, kv, out [, options])        the same, one row each
///   prefill / step(exec, m, q, k, v, out, store [, options])    append k, v to one store, then attend: as a call with a state
///
/// Contract   sequence s is a problem of its own: n_s rows, the last of its tokens, against its m_s keys. out is written, stores only by the
///            calls that append. m.turn turns q alone: keys are turned when they are appended. A store that has dropped tokens is
///            refused where the mask would see one of them; a mask that does not say how far back it looks sees what is held.
/// Errors     contract_error before anything is written. Memory: workspace_size(m, q, kv, threads [, cu_q]) bytes, allocated here if not given.
/// Cost       as softmax.hpp, for each sequence by itself; bits depend neither on the other sequences nor on threads.

#include <fovea/cache/contiguous_store.hpp>
#include <fovea/cache/paged_pool.hpp>
#include <fovea/cache/ring_store.hpp>
#include <fovea/cache/sequences.hpp>
#include <fovea/softmax/check_sequences.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline std::size_t workspace_size(const softmax_attention& m, const tensor_ref& q, std::span<const kv_sequence> kv,
                                  int threads, std::span<const std::int32_t> cu_q = {}) {
  const detail::sequence_call call{q, kv, {}, {.cu_q = cu_q}};
  return call.workspace_size(m, threads);
}

inline void prefill(exec_ref exec, const softmax_attention& m, const tensor_ref& q, std::span<const kv_sequence> kv,
                    const tensor_mut& out, const sequence_options& options = {}) {
  const detail::sequence_call call{q, kv, out, options};
  call.check(m);
  if (q.heads == 0 || q.length == 0 || kv.empty()) return;
  buffer own;
  call.attend(m, exec, detail::scratch_of(call.workspace_size(m, exec.concurrency()), options.workspace, own));
}

inline void step(exec_ref exec, const softmax_attention& m, const tensor_ref& q, std::span<const kv_sequence> kv,
                 const tensor_mut& out, const sequence_options& options = {}) {
  const bool packed = !options.cu_q.empty();
  require(packed || q.length == 1, "step takes one token of each sequence; q has ", q.length,
          " (use prefill for more)");
  for (std::size_t s = 1; s < options.cu_q.size(); ++s)
    require(options.cu_q[s] - options.cu_q[s - 1] == 1, "step takes one token of each sequence; cu_q gives sequence ",
            s - 1, " ", options.cu_q[s] - options.cu_q[s - 1]);
  prefill(exec, m, q, kv, out, options);
}

/// One sequence of a pool, as a store.
class pooled_sequence {
 public:
  pooled_sequence(paged_pool& pool, page_table& table) : pool_(&pool), table_(&table) {}
  const kv_shape& shape() const { return pool_->shape(); }
  isize tokens() const { return table_->tokens; }
  isize most_at_once() const { return PTRDIFF_MAX; }
  void check_append(const tensor_ref& k, const tensor_ref& v, const key_positions& at) const {
    pool_->check_append(*table_, k, v, at);
  }
  void append(const tensor_ref& k, const tensor_ref& v, const key_positions& at) { pool_->append(*table_, k, v, at); }
  kv_sequence view() const { return pool_->view(*table_); }

 private:
  paged_pool* pool_;
  page_table* table_;
};

template <class S>
concept kv_store = requires(S& s, const tensor_ref& rows, const key_positions& at) {
  s.check_append(rows, rows, at);
  s.append(rows, rows, at);
  { s.view() } -> std::same_as<kv_sequence>;
  { s.tokens() } -> std::same_as<isize>;
  { s.most_at_once() } -> std::same_as<isize>;
};

/// k, v [1, G, n, .] are the next tokens of the store's sequence, q [1, H, n, d] the same tokens; options.cu_q stays empty.
template <class S>
  requires kv_store<std::remove_cvref_t<S>>
void prefill(exec_ref exec, const softmax_attention& m, const tensor_ref& q, const tensor_ref& k, const tensor_ref& v,
             const tensor_mut& out, S&& store, const sequence_options& options = {}) {
  const key_positions all{m.turn, store.tokens(), options.positions.empty() ? nullptr : options.positions.data()};
  const isize n = q.length, chunk = store.most_at_once(), before = store.tokens();
  detail::check_append_and_attend(m, q, k, v, out, options, store.view(), store.tokens());
  detail::check_ring_parts(m, store.view(), n, chunk);
  store.check_append(k, v, all);
  if (n == 0) return;
  const auto part = [&](isize first, isize count, std::span<const kv_sequence> kv) {
    sequence_options o = options;
    if (o.lse) o.lse = o.lse.slice(first, count);
    if (o.skipped) o.skipped = o.skipped.slice(first, count);
    if (all.positions != nullptr)
      o.positions = o.positions.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    return detail::sequence_call{q.slice(first, count), kv, out.slice(first, count), o, first, n, before + n};
  };
  kv_sequence most = store.view();
  most.length += n;
  const auto need = [&](isize count) { return part(0, count, {&most, 1}).workspace_size(m, exec.concurrency()); };
  buffer own;
  const std::size_t whole = need(n < chunk ? n : chunk), rest = n > chunk ? need(n % chunk) : 0;
  const arena scratch = detail::scratch_of(whole > rest ? whole : rest, options.workspace, own);
  for (isize first = 0; first < n; first += chunk < n ? chunk : n) {
    const isize count = chunk < n - first ? chunk : n - first;
    store.append(k.slice(first, count), v.slice(first, count),
                 key_positions{m.turn, all.first + first, all.positions == nullptr ? nullptr : all.positions + first});
    const kv_sequence kv = store.view();
    part(first, count, {&kv, 1}).attend(m, exec, scratch);
  }
}

template <class S>
  requires kv_store<std::remove_cvref_t<S>>
void step(exec_ref exec, const softmax_attention& m, const tensor_ref& q, const tensor_ref& k, const tensor_ref& v,
          const tensor_mut& out, S&& store, const sequence_options& options = {}) {
  require(q.length == 1 && k.length == 1, "step takes one token; q has ", q.length, " and k has ", k.length,
          " (use prefill for more)");
  prefill(exec, m, q, k, v, out, std::forward<S>(store), options);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
