// SPDX-License-Identifier: MIT
#pragma once
/// @file  kfree_reconstruction: the same two products as efficient_attention with other roles and normalisations.

#include <fovea/efficient/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline channel_plan plan_of(const kfree_reconstruction& m, const problem& p) {
  using form = kfree_reconstruction::form_type;
  if (m.form == form::efficient) return plan_of(efficient_attention{.scale = m.scale}, p);
  const isize group = p.shape().group();
  channel_plan plan;
  plan.out = p.out;
  plan.exponential = plan.feature_softmax = false, plan.context_softmax = true;
  plan.context_scale = p.k.length > 0 ? 1.0 / std::sqrt(static_cast<double>(p.k.length)) : 1.0;
  if (m.form == form::context) {
    plan.left.t = p.k, plan.right.t = p.v, plan.query = p.q;
    plan.contexts = p.k.heads, plan.context_share = group, plan.query_scale = m.scale_for();
  } else {
    plan.left.t = p.q, plan.right = {p.k, group}, plan.query = p.v;
    plan.contexts = p.q.heads, plan.query_share = group, plan.context_scale *= m.scale_for();
  }
  return plan;
}

/// Width and heads of the context: d x d a query head for the channel form, d x e a KV head for the others.
template <class Acc>
channel_run<Acc> kfree_layout(const kfree_reconstruction& m, arena& memory, const shape& s, int threads) {
  const bool channel = m.form == kfree_reconstruction::form_type::channel;
  return {memory, s.d, channel ? s.d : s.e, s.B, channel ? s.H : s.G, s.m, threads};
}

template <class Acc>
void kfree_prefill(const kfree_reconstruction& m, exec_ref exec, const problem& p, arena memory) {
  const auto run = kfree_layout<Acc>(m, memory, p.shape(), exec.concurrency());
  const channel_plan plan = plan_of(m, p);
  run.contexts_of(exec, plan);
  run.queries(exec, plan);
}

}  // namespace detail

inline void kfree_reconstruction::check(const problem& p) const {
  efficient_attention{.scale = scale}.check(p);
  require(form == form_type::efficient || form == form_type::context || form == form_type::channel, "form is ",
          static_cast<int>(form), "; wanted efficient, context or channel");
  if (form != form_type::channel) return;
  require(p.q.length == p.k.length, "q has ", p.q.length, " rows and k has ", p.k.length,
          "; the channel form contracts Q with K over positions and wants as many of each");
  require(p.v.width == p.q.width, "v is ", p.v.width, " wide and q is ", p.q.width,
          "; the channel form mixes the value columns by a d x d map and wants them equal");
}

inline std::size_t kfree_reconstruction::workspace_size(const shape& s, int threads) const {
  arena measure;
  if (s.type == dtype::f64)
    detail::kfree_layout<double>(*this, measure, s, threads);
  else
    detail::kfree_layout<float>(*this, measure, s, threads);
  return measure.bytes();
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void kfree_reconstruction::prefill(exec_ref exec, const problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? detail::kfree_prefill<double>(*this, exec, p, scratch)
                         : detail::kfree_prefill<float>(*this, exec, p, scratch);
}
#endif

inline double kfree_reconstruction::macs(const shape& s) const {
  if (form == form_type::channel)
    return static_cast<double>(s.B * s.H) * static_cast<double>(s.n + s.m) * static_cast<double>(s.d * s.d);
  return efficient_attention{}.macs(s);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
