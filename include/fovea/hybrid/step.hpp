// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention with a state: the KV cache grows, block summaries follow, query blocks are aligned to absolute positions.

#include <vector>

#include <fovea/hybrid/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline std::uint64_t hybrid_attention::tag() const {
  detail::fingerprint f;
  f.text(name);
  for (const isize x :
       {static_cast<isize>(select), block_q, block_k, top, at_least, first, window, static_cast<isize>(compensate),
        static_cast<isize>(pattern), stride, parts, static_cast<isize>(share_group)})
    f.number(static_cast<double>(x));
  if (refresh > 1) f.number(static_cast<double>(refresh));
  // What no state has today: one that will have it is foreign to this one.
  if (target.on()) f.text("target").number(target.relative).number(target.absolute).number(target.estimated ? 1 : 0);
  if (!is_causal || align.how != alignment_of_rows::kind::bottom_right) f.text("not a stream");
  if (compensate == compensation::cumulant && (variance_share != 1 || std::isfinite(variance_cap)))
    f.number(variance_share).number(std::isfinite(variance_cap) ? variance_cap : -1.0);
  if (compensate == compensation::sampled)
    f.number(static_cast<double>(seed >> 32)).number(static_cast<double>(seed & 0xffffffffU));
  return f.number(budget).number(top_p).number(kept_share()).number(scale ? *scale : 0.0).value;
}

inline std::size_t hybrid_attention::state_workspace_size(const shape& s, int threads) const {
  return s.type == dtype::f64 ? detail::hybrid_run<double>::state_workspace_size(*this, s, threads)
                              : detail::hybrid_run<float>::state_workspace_size(*this, s, threads);
}

inline state hybrid_attention::make_state(const shape& s) const {
  detail::check_hybrid(*this, s.type, "a state");
  require(s.B >= 0 && s.G >= 1 && s.m >= 0 && s.d >= 1 && s.e >= 1, "make_state: B, G, m, d, e are ", s.B, ", ", s.G,
          ", ", s.m, ", ", s.d, ", ", s.e, "; wanted sizes of a problem, m tokens of room");
  return {tag(), s, detail::hybrid_state_bytes(*this, s)};
}

inline void hybrid_attention::check(const problem& p, const state& s) const {
  detail::check_problem(p);
  shape all = p.shape();
  all.m = s.tokens() + p.k.length;
  detail::check_hybrid(*this, p.q.type, "a state");
  s.check(tag(), p.shape(), name);
  detail::check_hybrid_call(*this, all, "a state");
  kv_cache::check_room(p, s);
  require(s.bytes() == detail::hybrid_state_bytes(*this, s.sizes()), "the state holds ", s.bytes(),
          " bytes; this hybrid wants ", detail::hybrid_state_bytes(*this, s.sizes()), " (use make_state)");
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void hybrid_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::hybrid_run<double>::prefill(*this, exec, p, s, scratch);
  else
    detail::hybrid_run<float>::prefill(*this, exec, p, s, scratch);
}
#endif

// ---- summaries beside a KV store (hybrid/stores.hpp) ----

namespace detail {
inline std::uint64_t summaries_tag(const hybrid_attention& m) {
  fingerprint f;
  return f.text("summaries")
      .number(static_cast<double>(m.tag() >> 32))
      .number(static_cast<double>(m.tag() & 0xffffffffU))
      .value;
}
inline std::size_t hybrid_store_workspace(const hybrid_attention& m, const shape& s, int threads) {
  const auto turned = static_cast<std::size_t>(s.H * s.n * s.d) * sizeof(float) + 2 * alignment;
  return turned + (s.type == dtype::f64 ? hybrid_run<double>::state_workspace_size(m, s, threads, true)
                                        : hybrid_run<float>::state_workspace_size(m, s, threads, true));
}
/// p: the new tokens, which `kv` holds already; its queries as the keys of the store are, turned over or not.
template <class Acc>
void attend_store_in(exec_ref exec, const hybrid_attention& m, const problem& p, kv_sequence kv, state& summaries,
                     arena scratch) {
  hybrid_memory<Acc> memory(hybrid_kv_needs<Acc>(m, summaries.sizes()), m.block_k, summaries.sizes());
  memory.base = summaries.as<std::byte>();
  problem whole = p;
  if constexpr (std::is_same_v<Acc, float>) {
    auto* const turned = scratch.take<float>(kv.k.rotated ? p.q.heads * p.q.length * p.q.width : 0);
    for (isize h = 0; kv.k.rotated && h < p.q.heads; ++h)
      for (isize i = 0; i < p.q.length; ++i) {
        float* const to = turned + (h * p.q.length + i) * p.q.width;
        simd::load_row<simd::native, float>(p.q.type, p.q.row(0, h, i), p.q.width, to);
        simd::rotate_row<simd::native>(to, p.q.width);
      }
    if (kv.k.rotated) whole.q = bhnd<const float>(turned, 1, p.q.heads, p.q.length, p.q.width);
    kv.k.rotated = false;
  }
  whole.k = {nullptr, p.q.type, 1, kv.heads, kv.length, kv.d, 0, 0, 0};
  whole.v = {nullptr, p.q.type, 1, kv.heads, kv.length, kv.e, 0, 0, 0};
  const isize past = kv.length - p.q.length;
  hybrid_run<Acc>::extend(m, exec, whole, {whole.k, whole.v, &kv}, memory, std::min(past, summaries.tokens()), past,
                          scratch);
  summaries.set_tokens(kv.length);
}
void attend_store(exec_ref exec, const hybrid_attention& m, const problem& p, const kv_sequence& kv, state& summaries,
                  arena scratch);
#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void attend_store(exec_ref exec, const hybrid_attention& m, const problem& p, const kv_sequence& kv,
                                   state& summaries, arena scratch) {
  if (p.q.type == dtype::f64)
    attend_store_in<double>(exec, m, p, kv, summaries, scratch);
  else
    attend_store_in<float>(exec, m, p, kv, summaries, scratch);
}
#endif

template <class Acc>
void hybrid_append(const hybrid_attention& m, state& earlier, const tensor_ref& k, const tensor_ref& v) {
  const auto memory = hybrid_memory_of<Acc>(m, earlier);
  std::vector<Acc> scratch(static_cast<std::size_t>(memory.scratch()));
  const isize past = earlier.tokens();
  problem p;
  p.k = k, p.v = v;
  kv_cache::append(p, earlier);
  const isize all = earlier.tokens();
  memory.append(serial, {kv_cache::keys(earlier, all), kv_cache::values(earlier, all)}, k.batch, k.heads, past, all,
                scratch.data());
}
}  // namespace detail

inline void hybrid_attention::merge(state& earlier, const state& later) const {
  detail::check_hybrid(*this, earlier.sizes().type, "a state");
  require(earlier.tag() == tag() && later.tag() == tag(), "merge: a state was not made by this hybrid; use make_state");
  const shape &a = earlier.sizes(), &b = later.sizes();
  require(a.B == b.B && a.G == b.G && a.H == b.H && a.d == b.d && a.e == b.e && a.type == b.type,
          "merge: the states were made for different shapes");
  require(earlier.tokens() + later.tokens() <= a.m, "merge: ", earlier.tokens(), " and ", later.tokens(),
          " tokens do not fit the earlier state's room of ", a.m);
  const tensor_ref k = kv_cache::keys(later, later.tokens()), v = kv_cache::values(later, later.tokens());
  if (a.type == dtype::f64)
    detail::hybrid_append<double>(*this, earlier, k, v);
  else
    detail::hybrid_append<float>(*this, earlier, k, v);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
