// SPDX-License-Identifier: MIT
#pragma once
/// @file  linformer_attention: project, then the online softmax over slots (and, when causal, over the row's own block).

#include <type_traits>

#include <fovea/core/absorb.hpp>
#include <fovea/kernel/online_softmax.hpp>
#include <fovea/linformer/block_causal.hpp>
#include <fovea/linformer/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Slots of all heads, [heads, rows, d] and [heads, rows, e].
template <class Acc>
struct slot_cache {
  Acc *k = nullptr, *v = nullptr;
  isize rows = 0;  // slots a head has room for
};

/// Tokens of the current block that came before this call, [heads, block, d] and [heads, block, e]; `count` of them.
template <class Acc>
struct block_tail {
  Acc *k = nullptr, *v = nullptr;
  isize count = 0;
};

template <class Acc>
class linformer_run {
  using Arch = simd::native;
  using loop = kernel::online_softmax<Arch, Acc>;
  using projector = kernel::sequence_projector<Arch, Acc>;

 public:
  slot_cache<Acc> own;  ///< of a call without a state

  linformer_run(arena& memory, const linformer_attention& m, const shape& s, int threads) : m_(m), s_(s) {
    own.rows = m.causal ? (s.m > 0 ? (s.m - 1) / m.block : 0) * m.map(false, 0).used(m.block) : m.slots_for();
    own.k = memory.take<Acc>(s.B * s.G * own.rows * s.d);
    own.v = memory.take<Acc>(s.B * s.G * own.rows * s.e);
    arena one, two;
    loop(one, s.group() * s.n, s.d, s.e);
    projector(two, s.d > s.e ? s.d : s.e);
    piece_ = round_up(one.bytes() > two.bytes() ? one.bytes() : two.bytes(), alignment);
    pieces_ = memory.take<std::byte>(static_cast<isize>(piece_) * threads);
  }

  /// All rows of k and v, standing at positions `first` on, into the slots.
  void project(exec_ref exec, const tensor_ref& k, const tensor_ref& v, isize first, bool clear,
               const slot_cache<Acc>& to) const {
    const isize panels = ceil_div(m_.slots_for(), projector::panel), heads = s_.B * s_.G;
    exec.for_tasks(2 * heads * panels, [&](isize task, isize slot) {
      const bool values = task % 2 != 0;
      const isize head = task / 2 / panels, s0 = task / 2 % panels * projector::panel, b = head / s_.G, g = head % s_.G;
      const tensor_ref& x = values ? v : k;
      const kernel::projection map = m_.map(values, g);
      const isize count = m_.keys_of(b, x.length), length = first + count, used = map.used(length);
      const isize s1 = used < s0 + projector::panel ? used : s0 + projector::panel;
      if (s0 >= s1) return;
      arena memory = scratch(slot);
      projector run(memory, x.width);
      Acc* out = (values ? to.v : to.k) + head * to.rows * x.width;
      if (clear) projector::clear(map, x.width, s0, s1, out);
      run.absorb(map, x.row(b, g, 0), x.type, x.row_stride, first, count, length, x.width, s0, s1, out);
    });
  }

  /// Blocks [first, last) of the sequence, each into its own slots; the call's tokens stand at position `seen` on.
  void project_blocks(exec_ref exec, const problem& p, const block_tail<Acc>& tail, isize seen, isize first, isize last,
                      const slot_cache<Acc>& to) const {
    const isize blocks = last - first, heads = s_.B * s_.G;
    exec.for_tasks(2 * heads * (blocks > 0 ? blocks : 0), [&](isize task, isize slot) {
      const bool values = task % 2 != 0;
      const isize head = task / 2 / blocks, n = first + task / 2 % blocks, b = head / s_.G, g = head % s_.G,
                  start = n * m_.block;
      const tensor_ref& x = values ? p.v : p.k;
      const kernel::projection map = m_.map(values, g);
      const isize used = map.used(m_.block), old = seen > start ? seen - start : 0;
      arena memory = scratch(slot);
      projector run(memory, x.width);
      Acc* out = (values ? to.v : to.k) + (head * to.rows + n * used) * x.width;
      const Acc* before = (values ? tail.v : tail.k) + head * m_.block * x.width;
      for (isize s0 = 0; s0 < used; s0 += projector::panel) {
        const isize s1 = used < s0 + projector::panel ? used : s0 + projector::panel;
        projector::clear(map, x.width, s0, s1, out);
        if (old > 0) run.absorb(map, before, dtype_of<Acc>, x.width, 0, old, m_.block, x.width, s0, s1, out);
        run.absorb(map, x.row(b, g, start + old - seen), x.type, x.row_stride, old, m_.block - old, m_.block, x.width,
                   s0, s1, out);
      }
    });
  }

  /// Softmax over the first `used(length of the item)` slots.
  template <class Length>
  void attend(exec_ref exec, const problem& p, const slot_cache<Acc>& from, Length&& length_of) const {
    attend_rows(exec, p, [&](loop& run, isize b, isize g) {
      kernel::key_set<Acc> slots = slot_keys(from, b * s_.G + g, m_.map(false, g).used(length_of(b)));
      if (slots.count > 0) run.absorb(slots);
    });
  }

  /// Slots of past blocks, then the tail, then the call's own tokens, in one running (m, l, o).
  void attend_causal(exec_ref exec, const problem& p, const slot_cache<Acc>& from, const block_tail<Acc>& tail,
                     isize seen, isize offset) const {
    const isize used = m_.map(false, 0).used(m_.block);
    const mask past = past_block_slots{used, m_.block, offset},
               old = own_block_keys{m_.block, offset, seen - tail.count}, now = own_block_keys{m_.block, offset, seen};
    attend_rows(exec, p, [&](loop& run, isize b, isize g) {
      const isize head = b * s_.G + g, last = offset + s_.n - 1;
      kernel::key_set<Acc> slots = slot_keys(from, head, last < 0 ? 0 : last / m_.block * used);
      slots.visible = &past, slots.site = {b, 0, s_.n, slots.count, s_.H, s_.G};
      if (slots.count > 0) run.absorb(slots);
      kernel::key_set<Acc> keys;
      keys.visible = &old, keys.count = tail.count, keys.site = {b, 0, s_.n, tail.count, s_.H, s_.G};
      keys.k = dense_rows(tail.k + head * m_.block * s_.d, s_.d),
      keys.v = dense_rows(tail.v + head * m_.block * s_.e, s_.e);
      if (tail.count > 0) run.absorb(keys);
      keys.visible = &now, keys.count = s_.m, keys.site.m = s_.m;
      keys.k = rows_of(p.k, b, g), keys.v = rows_of(p.v, b, g);
      if (s_.m > 0) run.absorb(keys);
    });
  }

 private:
  arena scratch(isize slot) const {
    return arena(std::span<std::byte>(pieces_ + static_cast<std::size_t>(slot) * piece_, piece_));
  }
  kernel::key_set<Acc> slot_keys(const slot_cache<Acc>& from, isize head, isize count) const {
    kernel::key_set<Acc> set;
    set.k = dense_rows(from.k + head * from.rows * s_.d, s_.d),
    set.v = dense_rows(from.v + head * from.rows * s_.e, s_.e);
    set.count = count;
    return set;
  }
  template <class Absorb>
  void attend_rows(exec_ref exec, const problem& p, Absorb&& absorb) const {
    const isize rows = s_.group() * s_.n, block = loop::superblock(rows, s_.d, s_.e), blocks = ceil_div(rows, block);
    exec.for_tasks(s_.B * s_.G * blocks, [&](isize task, isize slot) {
      const isize b = task / (s_.G * blocks), g = task / blocks % s_.G, r0 = task % blocks * block;
      arena memory = scratch(slot);
      loop run(memory, rows, s_.d, s_.e);
      run.begin({p.q, b, g * s_.group(), r0, r0 + block < rows ? r0 + block : rows}, m_.scale_for(s_), nullptr);
      absorb(run, b, g);
      run.finish(p.out, p.lse);
    });
  }

  const linformer_attention& m_;
  shape s_;
  std::byte* pieces_;
  std::size_t piece_;
};

template <class Acc>
void linformer_prefill(const linformer_attention& m, exec_ref exec, const problem& p, arena memory) {
  const shape s = p.shape();
  const linformer_run<Acc> run(memory, m, s, exec.concurrency());
  if (m.causal) {
    const block_tail<Acc> none;
    run.project_blocks(exec, p, none, 0, 0, s.m > 0 ? (s.m - 1) / m.block : 0, run.own);
    run.attend_causal(exec, p, run.own, none, 0, s.m - s.n);
  } else {
    run.project(exec, p.k, p.v, 0, true, run.own);
    run.attend(exec, p, run.own, [&](isize b) { return m.keys_of(b, s.m); });
  }
}

inline void check_heads(const char* name, const view<const float>& w, isize G) {
  require(w.batch == 1 && (w.heads == 1 || w.heads == G), name, " is [", w.batch, ", ", w.heads, ", ", w.length, ", ",
          w.width, "]; wanted [1, 1 or G = ", G, ", positions, slots]");
  require(w.width >= 1 && w.row_stride >= w.width, name, " has ", w.width, " slots and a row stride of ", w.row_stride,
          "; wanted at least 1 slot and no overlap");
}

/// The projection is defined for `rows` positions.
inline void check_reach(const linformer_attention& m, isize rows, const char* rows_name) {
  const isize taps = static_cast<isize>(m.wk.size());
  const auto longer = [&](const char* name, isize length) {
    require(length >= rows, rows_name, " is ", rows, " and ", name, " is ", length,
            " positions long; the projection says nothing of positions behind that");
  };
  if (m.projection == sequence_projection::linear) {
    longer("E", m.E.length);
    if (m.F.data != nullptr) longer("F", m.F.length);
  } else if (m.projection == sequence_projection::conv) {
    require(m.slots * taps >= rows, rows_name, " is ", rows, " and ", m.slots, " slots of ", taps, " taps reach ",
            m.slots * taps, "; wanted at least as many");
  }
}

}  // namespace detail

inline kernel::projection linformer_attention::map(bool values, isize g) const {
  if (projection == sequence_projection::linear) {
    const view<const float>& w = values && F.data != nullptr ? F : E;
    return {projection, w.width, w.data + (w.heads == 1 ? 0 : g * w.head_stride), w.row_stride};
  }
  const auto taps = values && !wv.empty() ? wv : wk;
  return {projection, slots, taps.data(), static_cast<isize>(taps.size())};
}

inline void linformer_attention::check_settings() const {
  using kind = sequence_projection;
  if (scale) {
    require_finite("scale", *scale);
    require(*scale > 0, "scale is ", *scale, "; it must be positive");
  }
  require(projection <= kind::conv, "projection is ", static_cast<int>(projection),
          "; wanted linear, mean, max or conv");
  require(slots >= 0, "slots is ", slots, "; it must not be negative");
  require(!causal || block >= 1, "causal is true and block is ", block,
          "; every slot of a Linformer mixes all positions, so no mask over slots is ",
          "causal: give a block of at least 1 token for the block-causal form");
  require(causal || block == 0, "block is ", block, " and causal is false; blocks belong to the causal form");
  require(!causal || lengths.empty(),
          "lengths were given with causal = true; padding behind the last key is never seen by a causal row, leave "
          "them out");
  const bool linear = projection == kind::linear, conv = projection == kind::conv;
  require(!linear || E.data != nullptr, "E is null; a linear projection wants its weights [1 or G, positions, slots]");
  require(linear || (E.data == nullptr && F.data == nullptr),
          "E or F was given to a projection that has no matrix; leave them empty");
  require(!linear || slots == 0 || slots == E.width, "slots is ", slots, " and E has ", E.width,
          "; leave slots at 0 or give the same");
  require(F.data == nullptr || F.width == E.width, "E has ", E.width, " slots and F has ", F.width,
          "; they must be equal");
  require(linear || slots >= 1, "slots is ", slots, "; this projection wants at least 1");
  require(conv || (wk.empty() && wv.empty()),
          "wk or wv was given to a projection that is no convolution; leave them empty");
  require(!conv || !wk.empty(), "wk has no taps; a convolution wants kernel = stride of them, at least 1");
  require(wv.empty() || wv.size() == wk.size(), "wk has ", wk.size(), " taps and wv has ", wv.size(),
          "; they must be equal");
  if (causal) detail::check_reach(*this, block, "block");
}

inline void linformer_attention::check(const problem& p) const {
  detail::check_problem(p);
  check_settings();
  detail::check_lengths(lengths, p.q.batch, p.k.length);
  if (!causal) detail::check_reach(*this, p.k.length, "m");
  if (projection != sequence_projection::linear) return;
  detail::check_heads("E", E, p.k.heads);
  if (F.data != nullptr) detail::check_heads("F", F, p.k.heads);
}

inline std::size_t linformer_attention::workspace_size(const shape& s, int threads) const {
  arena measure;
  if (s.type == dtype::f64)
    detail::linformer_run<double>(measure, *this, s, threads);
  else
    detail::linformer_run<float>(measure, *this, s, threads);
  return measure.bytes();
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void linformer_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? detail::linformer_prefill<double>(*this, exec, p, scratch)
                         : detail::linformer_prefill<float>(*this, exec, p, scratch);
}
#endif

inline double linformer_attention::macs(const shape& s) const {
  const double width = static_cast<double>(s.d + s.e), kv = static_cast<double>(s.B * s.G),
               heads = static_cast<double>(s.B * s.H);
  const auto weight =
      static_cast<double>(projection == sequence_projection::linear ? slots_for() : 1);  // slots that a token enters
  if (!causal)
    return width * (kv * static_cast<double>(s.m) * weight +
                    heads * static_cast<double>(s.n) * static_cast<double>(map(false, 0).used(s.m)));
  const isize used = map(false, 0).used(block);
  double pairs = 0;
  for (isize i = s.m < s.n ? s.n - s.m : 0; i < s.n; ++i) {
    const isize at = i + s.m - s.n;
    pairs += static_cast<double>(at / block * used + at % block + 1);
  }
  const double projected = s.m > 0 ? static_cast<double>((s.m - 1) / block * block) : 0.0;
  return width * (kv * projected * weight + heads * pairs);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
