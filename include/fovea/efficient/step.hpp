// SPDX-License-Identifier: MIT
#pragma once
/// @file  efficient_attention with a state: the causal prefix form token by token or in chunks, absorb and attend, merge.

#include <fovea/efficient/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
void efficient_with_state(const efficient_attention& m, exec_ref exec, const problem& p, state& s, arena memory) {
  const channel_prefix<Acc> run(memory, p.shape(), exec.concurrency());
  run.run(exec, m, p, s.as<Acc>(), s.tokens());
  s.set_tokens(s.tokens() + p.k.length);
}

template <class Acc>
void efficient_absorb(const efficient_attention& m, exec_ref exec, const tensor_ref& k, const tensor_ref& v, state& s) {
  using blocks = kernel::channel_blocks<simd::native, Acc>;
  using states = kernel::channel_state<Acc>;
  const shape& z = s.sizes();
  arena measure;
  blocks(measure, z.d, z.e);
  const std::size_t piece = round_up(measure.bytes(), alignment);
  const buffer memory(piece * static_cast<std::size_t>(exec.concurrency()) + alignment);
  std::byte* base = arena(memory.span()).template take<std::byte>(static_cast<isize>(piece) * exec.concurrency());
  exec.for_tasks(z.B * z.G, [&](isize head, isize slot) {
    arena own(std::span<std::byte>(base + static_cast<std::size_t>(slot) * piece, piece));
    blocks run(own, z.d, z.e);
    const isize b = head / z.G, g = head % z.G;
    run.absorb(states::at(s.as<Acc>() + head * states::size(z.d, z.e), z.d, z.e),
               {k.row(b, g, 0), k.type, k.row_stride}, {v.row(b, g, 0), v.type, v.row_stride}, k.length,
               m.normalisation == efficient_normalisation::softmax);
  });
  s.set_tokens(s.tokens() + k.length);
}

template <class Acc>
void efficient_attend(const efficient_attention& m, exec_ref exec, const tensor_ref& q, const tensor_mut& out,
                      const state& s) {
  using states = kernel::channel_state<Acc>;
  const shape& z = s.sizes();
  arena measure;
  channel_run<Acc>(measure, z.d, z.e, z.B, z.G, 0, exec.concurrency());
  const buffer memory(measure.bytes() + alignment);
  arena scratch(memory.span());
  const channel_run<Acc> run(scratch, z.d, z.e, z.B, z.G, 0, exec.concurrency());
  problem p;
  p.q = q, p.out = out;
  p.k.heads = p.v.heads = z.G;
  channel_plan plan = plan_of(m, p);
  plan.context_share = z.group();
  for (isize head = 0; head < z.B * z.G; ++head)
    run.finish(states::at(s.as<Acc>() + head * states::size(z.d, z.e), z.d, z.e), plan, s.tokens(),
               run.context + head * z.d * z.e);
  run.queries(exec, plan);
}

}  // namespace detail

inline std::uint64_t efficient_attention::tag() const {
  return detail::fingerprint{}
      .text(name)
      .number(static_cast<double>(normalisation))
      .number(causal ? 1 : 0)
      .number(scale_for())
      .value;
}

inline std::size_t efficient_attention::state_bytes(const shape& s) const {
  return static_cast<std::size_t>(s.B * s.G * kernel::channel_state<float>::size(s.d, s.e)) *
         (s.type == dtype::f64 ? sizeof(double) : sizeof(float));
}

inline state efficient_attention::make_state(const shape& s) const {
  require(s.B >= 0 && s.G >= 1 && s.H >= 1 && s.H % s.G == 0 && s.d >= 1 && s.e >= 1, "make_state: B, H, G, d, e are ",
          s.B, ", ", s.H, ", ", s.G, ", ", s.d, ", ", s.e, "; wanted positive sizes, H a multiple of G");
  check_settings();
  state made(tag(), s, state_bytes(s));
  const auto clear = [&]<class Acc>(Acc* at) {
    for (isize x = 0; x < s.B * s.G; ++x)
      kernel::channel_state<Acc>::at(at + x * kernel::channel_state<Acc>::size(s.d, s.e), s.d, s.e).clear();
  };
  s.type == dtype::f64 ? clear(made.as<double>()) : clear(made.as<float>());
  return made;
}

inline void efficient_attention::check(const problem& p, const state& s) const {
  check(p);
  require(causal,
          "a state was given to the bidirectional form of efficient attention; set causal = true, or use absorb and "
          "attend");
  s.check(tag(), p.shape(), name);
  require(s.bytes() == state_bytes(s.sizes()), "the state holds ", s.bytes(), " bytes and its shape needs ",
          state_bytes(s.sizes()), "; it is damaged");
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void efficient_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  p.q.type == dtype::f64 ? detail::efficient_with_state<double>(*this, exec, p, s, scratch)
                         : detail::efficient_with_state<float>(*this, exec, p, s, scratch);
}
#endif

inline void efficient_attention::merge(state& earlier, const state& later) const {
  earlier.check(tag(), later.sizes(), name);
  later.check(tag(), earlier.sizes(), name);
  const shape& z = earlier.sizes();
  const auto join = [&]<class Acc>(Acc* into, const Acc* from) {
    using states = kernel::channel_state<Acc>;
    const isize size = states::size(z.d, z.e);
    for (isize x = 0; x < z.B * z.G; ++x)
      kernel::merge_channels<simd::native, Acc>(states::at(into + x * size, z.d, z.e),
                                                states::at(const_cast<Acc*>(from) + x * size, z.d, z.e),
                                                normalisation == efficient_normalisation::softmax);
  };
  z.type == dtype::f64 ? join(earlier.as<double>(), later.as<double>()) : join(earlier.as<float>(), later.as<float>());
  earlier.set_tokens(earlier.tokens() + later.tokens());
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void absorb(exec_ref exec, const efficient_attention& m, tensor_ref k, tensor_ref v, state& s) {
  detail::check_absorbed(m.name, m.tag(), k, v, s);
  if (k.batch == 0 || k.length == 0) return;
  k.type == dtype::f64 ? detail::efficient_absorb<double>(m, exec, k, v, s)
                       : detail::efficient_absorb<float>(m, exec, k, v, s);
}
#endif

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void attend(exec_ref exec, const efficient_attention& m, tensor_ref q, tensor_mut out,
                             const state& s) {
  detail::check_asked(m.name, m.tag(), q, out, {}, s);
  require(m.lengths.empty(), "lengths were given to attend; a state holds what it has absorbed");
  if (q.batch == 0 || q.heads == 0 || q.length == 0) return;
  q.type == dtype::f64 ? detail::efficient_attend<double>(m, exec, q, out, s)
                       : detail::efficient_attend<float>(m, exec, q, out, s);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
