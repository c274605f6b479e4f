// SPDX-License-Identifier: MIT
#pragma once
/// @file  linformer_attention with a state: the block-causal form in chunks or token by token; absorb, attend and append.
///
/// Layout     64 bytes: position of the first token; then bidirectional: slots [B, G, slots, d], [B, G, slots, e]; causal: the same for
///            all blocks there is room for, then the tokens of the current block [B, G, block, d], [B, G, block, e].

#include <algorithm>

#include <fovea/linformer/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct linformer_store {
  slot_cache<Acc> slots;
  block_tail<Acc> tail;
  isize room = 0, used = 0;  // blocks; slots of one

  linformer_store(const linformer_attention& m, const state& s) {
    const shape& z = s.sizes();
    used = m.causal ? m.map(false, 0).used(m.block) : 0;
    room = m.causal ? z.m / m.block : 0;
    slots.rows = m.causal ? room * used : m.slots_for();
    Acc* at = s.as<Acc>() + 64 / sizeof(Acc);
    slots.k = at, at += z.B * z.G * slots.rows * z.d;
    slots.v = at, at += z.B * z.G * slots.rows * z.e;
    if (!m.causal) return;
    tail.k = at, at += z.B * z.G * m.block * z.d;
    tail.v = at;
    tail.count = s.tokens() % m.block;
  }
};
inline std::int64_t& first_position(const state& s) { return *s.as<std::int64_t>(); }

template <class Acc>
void linformer_with_state(const linformer_attention& m, exec_ref exec, const problem& p, state& s, arena memory) {
  const shape z = p.shape();
  const linformer_run<Acc> run(memory, m, z, exec.concurrency());
  linformer_store<Acc> store(m, s);
  const isize seen = s.tokens(), after = seen + z.m;
  run.project_blocks(exec, p, store.tail, seen, seen / m.block, after / m.block, store.slots);
  run.attend_causal(exec, p, store.slots, store.tail, seen, seen);
  const isize keep = after % m.block,
              fresh = keep < z.m ? keep : z.m;  // tokens of the call that stay in the current block
  for (isize head = 0; head < z.B * z.G; ++head)
    for (isize t = z.m - fresh; t < z.m; ++t) {
      const isize at = head * m.block + (seen + t) % m.block;
      simd::load_row<simd::native, Acc>(p.k.type, p.k.row(head / z.G, head % z.G, t), z.d, store.tail.k + at * z.d);
      simd::load_row<simd::native, Acc>(p.v.type, p.v.row(head / z.G, head % z.G, t), z.e, store.tail.v + at * z.e);
    }
  s.set_tokens(after);
}

template <class Acc>
void linformer_absorb(const linformer_attention& m, exec_ref exec, const tensor_ref& k, const tensor_ref& v, state& s) {
  shape z = s.sizes();
  z.n = 0, z.m = 0;
  arena measure;
  linformer_run<Acc>(measure, m, z, exec.concurrency());
  const buffer memory(measure.bytes() + alignment);
  arena scratch(memory.span());
  const linformer_run<Acc> run(scratch, m, z, exec.concurrency());
  run.project(exec, k, v, first_position(s) + s.tokens(), false, linformer_store<Acc>(m, s).slots);
  s.set_tokens(s.tokens() + k.length);
}

template <class Acc>
void linformer_attend(const linformer_attention& m, exec_ref exec, const problem& p, const state& s) {
  shape z = s.sizes();
  z.n = p.q.length, z.m = 0;
  arena measure;
  linformer_run<Acc>(measure, m, z, exec.concurrency());
  const buffer memory(measure.bytes() + alignment);
  arena scratch(memory.span());
  const linformer_run<Acc> run(scratch, m, z, exec.concurrency());
  run.attend(exec, p, linformer_store<Acc>(m, s).slots, [&](isize) { return s.tokens(); });
}

/// Bidirectional: slots add up. Causal: slots and tail of `later` go behind those of `earlier`.
template <class Acc>
void linformer_append(const linformer_attention& m, state& earlier, const state& later) {
  const shape& z = earlier.sizes();
  linformer_store<Acc> to(m, earlier);
  const linformer_store<Acc> from(m, later);
  const isize heads = z.B * z.G, done = m.causal ? later.tokens() / m.block * from.used : 0;
  if (!m.causal) {
    for (isize x = 0; x < heads * to.slots.rows * z.d; ++x) to.slots.k[x] += from.slots.k[x];
    for (isize x = 0; x < heads * to.slots.rows * z.e; ++x) to.slots.v[x] += from.slots.v[x];
  }
  for (isize head = 0; m.causal && head < heads; ++head) {
    const isize at = head * to.slots.rows + earlier.tokens() / m.block * to.used, of = head * from.slots.rows;
    std::copy_n(from.slots.k + of * z.d, done * z.d, to.slots.k + at * z.d);
    std::copy_n(from.slots.v + of * z.e, done * z.e, to.slots.v + at * z.e);
    std::copy_n(from.tail.k + head * m.block * z.d, from.tail.count * z.d, to.tail.k + head * m.block * z.d);
    std::copy_n(from.tail.v + head * m.block * z.e, from.tail.count * z.e, to.tail.v + head * m.block * z.e);
  }
  earlier.set_tokens(earlier.tokens() + later.tokens());
}

}  // namespace detail

inline std::uint64_t linformer_attention::tag() const {
  detail::fingerprint f;
  f.text(name).number(static_cast<double>(projection)).number(static_cast<double>(slots_for())).number(causal ? 1 : 0);
  f.number(static_cast<double>(block)).number(static_cast<double>(E.heads)).number(static_cast<double>(E.length));
  return f.number(static_cast<double>(wk.size())).number(scale ? *scale : 0).value;
}

inline std::size_t linformer_attention::state_bytes(const shape& s) const {
  const isize rows = causal ? s.m / block * map(false, 0).used(block) + block : slots_for();
  return 64 + static_cast<std::size_t>(s.B * s.G * rows * (s.d + s.e)) *
                  (s.type == dtype::f64 ? sizeof(double) : sizeof(float));
}

inline state linformer_attention::make_state(const shape& s, isize first) const {
  require(s.B >= 0 && s.G >= 1 && s.H >= 1 && s.H % s.G == 0 && s.d >= 1 && s.e >= 1 && s.m >= 0,
          "make_state: B, H, G, m, d, e are ", s.B, ", ", s.H, ", ", s.G, ", ", s.m, ", ", s.d, ", ", s.e,
          "; wanted positive sizes, H a multiple of G");
  require(first >= 0 && (first == 0 || !causal), "make_state: first is ", first,
          causal ? "; a causal state begins at 0" : "; it must not be negative");
  check_settings();
  require(causal || projection == sequence_projection::linear || projection == sequence_projection::conv,
          "the windows of mean and max pooling depend on the whole length, so that no state can be kept for them; use "
          "a linear or conv projection, or the causal form");
  state made(tag(), s, state_bytes(s));
  detail::first_position(made) = first;
  return made;
}

inline void linformer_attention::check(const problem& p, const state& s) const {
  check(p);
  require(causal,
          "a state was given to the bidirectional form of linformer, whose slots mix all positions; set causal = true "
          "and a block, or use absorb and attend");
  s.check(tag(), p.shape(), name);
  require(s.bytes() == state_bytes(s.sizes()), "the state holds ", s.bytes(), " bytes and its shape needs ",
          state_bytes(s.sizes()), "; it is damaged");
  require(s.tokens() + p.k.length <= s.sizes().m, "the state has room for ", s.sizes().m, " tokens, holds ", s.tokens(),
          " and the call brings ", p.k.length, "; make it with a larger m");
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void linformer_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  p.q.type == dtype::f64 ? detail::linformer_with_state<double>(*this, exec, p, s, scratch)
                         : detail::linformer_with_state<float>(*this, exec, p, s, scratch);
}
#endif

inline void linformer_attention::append(state& earlier, const state& later) const {
  earlier.check(tag(), later.sizes(), name);
  later.check(tag(), earlier.sizes(), name);
  if (later.tokens() == 0) return;
  if (causal) {
    require(earlier.tokens() % block == 0, "append: the earlier state holds ", earlier.tokens(),
            " tokens; wanted a multiple of the block of ", block);
    require(earlier.tokens() + later.tokens() <= earlier.sizes().m, "append: the earlier state has room for ",
            earlier.sizes().m, " tokens, holds ", earlier.tokens(), " and the later brings ", later.tokens());
  } else {
    const std::int64_t next = detail::first_position(earlier) + earlier.tokens();
    require(detail::first_position(later) == next, "append: the later state begins at position ",
            detail::first_position(later), " and the earlier ends before ", next, "; make_state takes the position");
  }
  earlier.sizes().type == dtype::f64 ? detail::linformer_append<double>(*this, earlier, later)
                                     : detail::linformer_append<float>(*this, earlier, later);
}

inline double linformer_attention::step_macs(const shape& s) const {
  const auto entered = static_cast<double>(projection == sequence_projection::linear ? slots_for() : 1);
  const isize used = map(false, 0).used(causal ? block : s.m);
  const isize seen = causal ? s.m / block * used + s.m % block + 1 : used;
  return static_cast<double>(s.B * (s.d + s.e)) *
         (static_cast<double>(s.G) * entered + static_cast<double>(s.H * seen));
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void absorb(exec_ref exec, const linformer_attention& m, tensor_ref k, tensor_ref v, state& s) {
  require(
      !m.causal && m.lengths.empty(),
      "absorb belongs to the bidirectional form without lengths; the causal form takes its tokens by prefill and step");
  detail::check_absorbed(m.name, m.tag(), k, v, s);
  const isize next = detail::first_position(s) + s.tokens(), room = m.projection == sequence_projection::linear
                                                                        ? m.E.length
                                                                        : m.slots * static_cast<isize>(m.wk.size());
  require(next + k.length <= room, "absorb: the tokens stand at positions ", next, " to ", next + k.length - 1,
          " and the projection reaches ", room - 1);
  if (k.batch == 0 || k.length == 0) return;
  k.type == dtype::f64 ? detail::linformer_absorb<double>(m, exec, k, v, s)
                       : detail::linformer_absorb<float>(m, exec, k, v, s);
}
#endif

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void attend(exec_ref exec, const linformer_attention& m, tensor_ref q, tensor_mut out, const state& s,
                             tensor_mut lse) {
  require(!m.causal && m.lengths.empty(),
          "attend belongs to the bidirectional form without lengths; the causal form answers by prefill and step");
  detail::check_asked(m.name, m.tag(), q, out, lse, s);
  require(detail::first_position(s) == 0, "attend: the state begins at position ", detail::first_position(s),
          "; append it to the one before it first");
  if (q.batch == 0 || q.heads == 0 || q.length == 0) return;
  problem p;
  p.q = q, p.out = out, p.lse = lse;
  q.type == dtype::f64 ? detail::linformer_attend<double>(m, exec, p, s)
                       : detail::linformer_attend<float>(m, exec, p, s);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
