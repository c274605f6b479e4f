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
  return f.number(budget).number(top_p).number(kept_share()).number(scale ? *scale : 0.0).value;
}

inline state hybrid_attention::make_state(const shape& s) const {
  detail::check_hybrid_options(*this);
  detail::check_hybrid_storage(*this, s.type);
  require(
      is_causal,
      "a hybrid_attention with a state must be causal (is_causal = true); a row cannot see keys that have not come");
  require(!target.on(), "a hybrid_attention with an error target has no state; the target is of a prefill");
  require(s.B >= 0 && s.G >= 1 && s.m >= 0 && s.d >= 1 && s.e >= 1, "make_state: B, G, m, d, e are ", s.B, ", ", s.G,
          ", ", s.m, ", ", s.d, ", ", s.e, "; wanted sizes of a problem, m tokens of room");
  return {tag(), s, detail::hybrid_state_bytes(*this, s)};
}

inline void hybrid_attention::check(const problem& p, const state& s) const {
  detail::check_problem(p);
  detail::check_hybrid_options(*this);
  detail::check_hybrid_storage(*this, p.q.type);
  s.check(tag(), p.shape(), name);
  require(is_causal && align.how == alignment_of_rows::kind::bottom_right,
          "a hybrid_attention with a state must be causal (is_causal = true) and bottom-right");
  kv_cache::check_room(p, s);
  require(s.bytes() == detail::hybrid_state_bytes(*this, s.sizes()), "the state holds ", s.bytes(),
          " bytes; this hybrid wants ", detail::hybrid_state_bytes(*this, s.sizes()), " (use make_state)");
  const isize all = s.tokens() + p.k.length;
  if (select == block_selector::given) detail::check_given_blocks(*this, p.shape(), all, all, false);
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void hybrid_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::hybrid_run<double>::prefill(*this, exec, p, s, scratch);
  else
    detail::hybrid_run<float>::prefill(*this, exec, p, s, scratch);
}
#endif

namespace detail {
template <class Acc>
void hybrid_append(const hybrid_attention& m, state& earlier, const tensor_ref& k, const tensor_ref& v) {
  const auto all = hybrid_summaries_of<Acc>(m, earlier);
  std::vector<Acc> row(static_cast<std::size_t>(std::max(k.width, v.width)));
  const isize past = earlier.tokens();
  problem p;
  p.k = k, p.v = v;
  kv_cache::append(p, earlier);
  all.append(serial, kv_cache::keys(earlier, earlier.tokens()), kv_cache::values(earlier, earlier.tokens()), past,
             row.data());
}
}  // namespace detail

inline void hybrid_attention::merge(state& earlier, const state& later) const {
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
