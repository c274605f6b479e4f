// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention over the caller's KV stores: contiguous, paged, or a ring that has dropped nothing; any type of rows.
///
///   state s = make_summaries(m, H, store.shape(), room)            what the selection keeps beside the store, for up to `room` tokens
///   prefill / step(exec, m, q, k, v, out, store, s [, options])    append k, v to the store, take them in, attend
///   prefill / step(exec, m, q, kv, out, s [, options])             the same where the kv_sequence holds the rows of q's tokens already:
///                                                                  memory of an engine's own, a store that several calls read
///
/// Contract   as a call with a state of m, on the rows as the store holds them. The summaries follow the store by themselves: tokens that
///            were appended elsewhere are taken in by the next call, and after store.truncate(t) so are the ones that replace the others,
///            if no other call has grown the store in between (else truncate(s, t) as well). After a shift make them anew.
///            A copy-on-write fork of a paged sequence wants a copy of its summaries.
/// Errors     contract_error before anything is written. Memory: store_workspace_size bytes, allocated here if not given.
/// Cost       as hybrid.hpp; bytes of the summaries: state::bytes(), none for a pattern, which softmax_attention computes as a mask.

#include <fovea/hybrid.hpp>
#include <fovea/softmax/stores.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// Summaries of one sequence of a store of this shape, for H query heads.
inline state make_summaries(const hybrid_attention& m, isize H, const kv_shape& s, isize room) {
  detail::check_hybrid(m, s.type, "summaries");
  require(H >= 1 && s.heads >= 1 && H % s.heads == 0 && room >= 0, "make_summaries: ", H, " query heads, ", s.heads,
          " KV heads, room for ", room, " tokens; wanted a multiple of the KV heads, and at least 0");
  const shape sizes{1, H, s.heads, 0, room, s.d, s.e, s.type};
  return {detail::summaries_tag(m), sizes, detail::hybrid_summary_bytes(m, sizes)};
}
/// The tokens from `tokens` on will be replaced.
inline void truncate(state& summaries, isize tokens) { kv_cache::truncate(summaries, tokens); }

namespace detail {

/// A pattern needs no summaries: over a store it is a mask of exact attention.
inline softmax_attention pattern_as_mask(const hybrid_attention& m) {
  return {.mask = hsa_pattern{m.pattern, m.stride, m.align}, .scale = m.scale};
}

/// `kv`: the store as it will be, q's tokens in it.
inline void check_hybrid_store(const hybrid_attention& m, const tensor_ref& q, const kv_sequence& kv, const state& s) {
  check_hybrid(m, q.type, "summaries");
  require(s.tag() == summaries_tag(m), "the summaries were not made for this hybrid; use make_summaries");
  const shape& z = s.sizes();
  require(q.batch == 1 && z.H == q.heads && z.G == kv.heads && z.d == kv.d && z.e == kv.e && z.type == kv.k.type,
          "the summaries were made for H, G, d, e = ", z.H, ", ", z.G, ", ", z.d, ", ", z.e, " and rows of ",
          name_of(z.type), "; q is ", describe(q), " and the store holds ", kv.heads, " KV heads, ", kv.d, ", ", kv.e,
          " wide, of ", name_of(kv.k.type));
  require(s.bytes() == hybrid_summary_bytes(m, z), "the summaries hold ", s.bytes(), " bytes; this hybrid wants ",
          hybrid_summary_bytes(m, z));
  require((q.type == dtype::f64) == (kv.k.type == dtype::f64), "q is ", name_of(q.type), " and the store holds ",
          name_of(kv.k.type), "; f64 goes with f64 only");
  const isize all = kv.length;
  require(all <= z.m, "the store will hold ", all, " tokens; the summaries have room for ", z.m);
  require(kv.dropped == 0 && (kv.k.ring == 0 || all <= kv.k.fixed + kv.k.ring), "the ring store drops tokens at ",
          kv.k.fixed + kv.k.ring, " and would hold ", all, "; a selection looks at all of them");
  require(m.select != block_selector::exact || (kv.k.page == 0 && kv.k.ring == 0 && kv.k.type != dtype::i8),
          "select exact over pages, a ring or int8 rows; it reads keys in one stretch, of a float type");
  check_hybrid_call(m, {1, q.heads, kv.heads, q.length, all, kv.d, kv.e, q.type}, "summaries");
}

}  // namespace detail

/// k, v [1, G, n, .] are the next tokens of the store's sequence, q [1, H, n, d] the same tokens.
template <class S>
  requires kv_store<std::remove_cvref_t<S>>
void prefill(exec_ref exec, const hybrid_attention& m, const tensor_ref& q, const tensor_ref& k, const tensor_ref& v,
             const tensor_mut& out, S&& store, state& summaries, const call_options& options = {}) {
  const problem p = detail::problem_of(m, q, k, v, out, options);
  detail::check_problem(p);
  require(q.length == k.length, "q has ", q.length, " tokens and k has ", k.length,
          "; a call that appends takes the same new tokens in both");
  kv_sequence grown = store.view();
  grown.length += k.length;
  detail::check_hybrid_store(m, q, grown, summaries);
  require(q.length <= store.most_at_once(), "a call of ", q.length, " tokens; the store takes ", store.most_at_once(),
          " at once");
  const key_positions as_they_come{nullptr, store.tokens(), nullptr};
  store.check_append(k, v, as_they_come);
  if (q.length == 0) return;
  if (m.select == block_selector::pattern) {
    prefill(exec, detail::pattern_as_mask(m), q, k, v, out, store,
            {.lse = options.lse, .workspace = options.workspace});
    return summaries.set_tokens(store.tokens());
  }
  shape sizes = p.shape();
  sizes.m = store.tokens() + q.length;
  buffer own;
  const std::size_t need = detail::hybrid_store_workspace(m, sizes, exec.concurrency());
  const arena scratch = detail::scratch_of(need, options.workspace, own);
  store.append(k, v, as_they_come);
  detail::attend_store(exec, m, p, store.view(), summaries, scratch);
}

template <class S>
  requires kv_store<std::remove_cvref_t<S>>
void step(exec_ref exec, const hybrid_attention& m, const tensor_ref& q, const tensor_ref& k, const tensor_ref& v,
          const tensor_mut& out, S&& store, state& summaries, const call_options& options = {}) {
  require(q.length == 1 && k.length == 1, "step takes one token; q has ", q.length, " and k has ", k.length,
          " (use prefill for more)");
  prefill(exec, m, q, k, v, out, std::forward<S>(store), summaries, options);
}

/// q [1, H, n, d] and out are the last n tokens of kv.
inline void prefill(exec_ref exec, const hybrid_attention& m, const tensor_ref& q, const kv_sequence& kv,
                    const tensor_mut& out, state& summaries, const call_options& options = {}) {
  const tensor_ref k(nullptr, q.type, q.batch, kv.heads, q.length, kv.d, 0, 0, 0),
      v(nullptr, q.type, q.batch, kv.heads, q.length, kv.e, 0, 0, 0);
  const problem p = detail::problem_of(m, q, k, v, out, options);
  require(!p.gates.any(), "gates (decay, beta, erase, write) were given; this mechanism has none");
  detail::sequence_call{q, {&kv, 1}, out, {.lse = options.lse}}.check({.mask = causal{}});
  detail::check_hybrid_store(m, q, kv, summaries);
  require(q.length <= kv.length, "q has ", q.length, " tokens and the sequence holds ", kv.length,
          " rows; it holds those of q's tokens already");
  if (q.length == 0) return;
  if (m.select == block_selector::pattern) {
    prefill(exec, detail::pattern_as_mask(m), q, {&kv, 1}, out, {.lse = options.lse, .workspace = options.workspace});
    return summaries.set_tokens(kv.length);
  }
  buffer own;
  const std::size_t need = detail::hybrid_store_workspace(
      m, {1, q.heads, kv.heads, q.length, kv.length, kv.d, kv.e, q.type}, exec.concurrency());
  detail::attend_store(exec, m, p, kv, summaries, detail::scratch_of(need, options.workspace, own));
}
inline void step(exec_ref exec, const hybrid_attention& m, const tensor_ref& q, const kv_sequence& kv,
                 const tensor_mut& out, state& summaries, const call_options& options = {}) {
  require(q.length == 1, "step takes one token; q has ", q.length, " (use prefill for more)");
  prefill(exec, m, q, kv, out, summaries, options);
}

/// Bytes that such a call needs, `tokens` of the store with the new ones: for call_options::workspace.
inline std::size_t store_workspace_size(const hybrid_attention& m, const tensor_ref& q, const kv_shape& s, isize tokens,
                                        int threads) {
  detail::check_hybrid(m, q.type, "summaries");
  if (m.select == block_selector::pattern) {
    kv_sequence kv = contiguous_store(s, 0).view();  // no rows are read
    kv.length = tokens;
    return workspace_size(detail::pattern_as_mask(m), q, {&kv, 1}, threads);
  }
  return detail::hybrid_store_workspace(m, {1, q.heads, s.heads, q.length, tokens, s.d, s.e, q.type}, threads);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
