// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention with a few query rows for each KV head: split over the keys, then merge.
///
/// The keys are cut by m alone (at most 16 pieces, none under 4096 keys), whatever the number of threads: the same bits for any.

#include <fovea/core/partial.hpp>
#include <fovea/kernel/decode.hpp>
#include <fovea/softmax/keys.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct softmax_few_rows {
  using loop = kernel::decode_rows<simd::native, Acc>;

  static bool fits(const shape& s) { return s.group() * s.n <= loop::most_rows; }
  static isize piece(isize m) {
    const isize keys = ceil_div(m, 16);
    return keys < 4096 ? 4096 : ceil_div(keys, 64) * 64;
  }

  struct layout {
    Acc *m, *l, *o;
    std::byte* slots;
    std::size_t slot_bytes;
    layout(arena& memory, const shape& s, int threads) {
      const isize rows = s.group() * s.n, parts = s.B * s.G * 16;
      m = memory.take<Acc>(parts * rows);
      l = memory.take<Acc>(parts * rows);
      o = memory.take<Acc>(parts * rows * s.e);
      arena one;
      loop(one, s.d, s.e);
      slot_bytes = one.bytes();
      slots = memory.take<std::byte>(static_cast<isize>(slot_bytes) * threads);
    }
  };

  static void run(const softmax_attention& a, exec_ref exec, const problem& p, arena scratch) {
    const shape s = p.shape();
    const layout at(scratch, s, exec.concurrency());
    const isize rows = s.group() * s.n, keys = piece(s.m), pieces = s.m > 0 ? ceil_div(s.m, keys) : 0,
                heads = s.B * s.G;
    const double scale = a.scale_for(s);
    exec.for_tasks(heads * pieces, [&](isize task, isize slot) {
      const isize b = task / pieces / s.G, g = task / pieces % s.G, j0 = task % pieces * keys;
      arena own(std::span<std::byte>(at.slots + static_cast<std::size_t>(slot) * at.slot_bytes, at.slot_bytes));
      loop run(own, s.d, s.e);
      run.begin({p.q, b, g * s.group(), 0, rows}, scale);
      run.run(softmax_keys<Acc>(a, p, b, g), j0, j0 + keys < s.m ? j0 + keys : s.m, at.m + task * rows,
              at.l + task * rows, at.o + task * rows * s.e);
    });
    for (isize head = 0; head < heads; ++head)
      for (isize r = 0; r < rows; ++r) finish(a, p, at, head, r, rows, pieces);
  }

 private:
  /// Joins the pieces of one row, in order, and writes it.
  static void finish(const softmax_attention& a, const problem& p, const layout& at, isize head, isize r, isize rows,
                     isize pieces) {
    constexpr Acc ln2 = static_cast<Acc>(0.69314718055994530942);
    const shape s = p.shape();
    const isize b = head / s.G, h = head % s.G * s.group() + r / s.n, i = r % s.n;
    Acc* o = at.o + (head * pieces * rows + r) * s.e;
    partial<Acc> all{pieces > 0 ? at.m[head * pieces * rows + r] * ln2 : -std::numeric_limits<Acc>::infinity(),
                     pieces > 0 ? at.l[head * pieces * rows + r] : Acc(0), o};
    if (pieces == 0)
      for (isize c = 0; c < s.e; ++c) o[c] = Acc(0);
    for (isize x = 1; x < pieces; ++x) {
      const isize from = (head * pieces + x) * rows + r;
      merge(all, {at.m[from] * ln2, at.l[from], at.o + from * s.e}, s.e);
    }
    if (a.sinks != nullptr) {
      const Acc sink = static_cast<Acc>(a.sinks[h]), top = all.m > sink ? all.m : sink, shrink = std::exp(all.m - top);
      all.l = all.l * shrink + std::exp(sink - top);
      for (isize c = 0; c < s.e; ++c) o[c] *= shrink;
      all.m = top;
    }
    const Acc lse = normalise(all, s.e);
    simd::store_row<simd::native, Acc>(p.out.type, o, s.e, p.out.row(b, h, i));
    if (p.lse) *static_cast<Acc*>(p.lse.row(b, h, i)) = lse;
  }
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
