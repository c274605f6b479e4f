// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention over a token pattern: strided tokens as dense problems of their own, copied side by side.
///
///   strided   rows and keys of one residue class mod stride, in order, are a causal problem of n / stride rows:
///             q'_a = q[x + a stride], k'_b = k[rho + b stride], b <= a + shift
///   sparse    the same without b = a + shift, the own key; then the window of `stride` keys, which has it, takes (m, l, O) up again
///   fixed     the last keys of all stretches, as a key set of m / stride rows; then the own stretch
///   local     a window
///
/// Contract   the outputs of hsa_pattern as a mask, but for rounding: the order of a row's keys is another. Classes are tasks; a row's bits do not
///            depend on the number of threads.
/// Cost       time follows the visible share (docs/performance.md). Scratch: q, k and v of a class in Acc for each thread, up to 1 MB (larger
///            classes are read where they lie); of sparse also (m, l) of each row, and where `out` is not stored as Acc, a copy of it that is.
/// Source     mask/patterns.hpp defines the patterns.

#include <fovea/hybrid/mechanism.hpp>
#include <fovea/kernel/online_softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Key t is the last one of stretch t: seen by the rows of later stretches.
struct ends_of_stretches {
  isize stride = 1, offset = 0;  // row i sits at position i + offset
  isize end(isize i) const { return i + offset < 0 ? 0 : (i + offset) / stride; }
  bool visible(const mask_site&, isize i, isize t) const { return t < end(i); }
  range keys(const mask_site&, isize, isize i1) const { return {0, end(i1 - 1)}; }
  range queries(const mask_site& at, isize t) const { return {(t + 1) * stride - offset, at.n}; }
  tile_kind tile(const mask_site&, isize i0, isize i1, isize t0, isize t1) const {
    return t0 >= end(i1 - 1) ? tile_kind::empty : t1 <= end(i0) ? tile_kind::full : tile_kind::partial;
  }
};

template <class Acc>
class hybrid_pattern {
  using loop = kernel::online_softmax<simd::native, Acc>;

 public:
  hybrid_pattern(const hybrid_attention& m, const shape& s) : m_(m), s_(s), rows_(s.group() * s.n) {}

  std::size_t workspace_size(int threads) const {
    arena measure;
    lay_out(measure, threads);
    return measure.bytes();
  }
  void run(exec_ref exec, const problem& p, arena scratch) const {
    const parts at = lay_out(scratch, exec.concurrency());
    if (rows_ == 0) return;
    const bool strided = by_class(p);
    problem earlier = p;  // where the classes leave their rows
    if (strided) {
      if (m_.pattern == hsa_mode::sparse) earlier.lse = dense(at.so_far, p.q, 2);
      if (m_.pattern == hsa_mode::sparse && p.out.type != dtype_of<Acc>) earlier.out = dense(at.out, p.q, s_.e);
      const isize classes = std::min(s_.n, m_.stride);
      each(exec, at, classes, [&](loop& run, Acc* copies, isize b, isize g, isize x) {
        if (copies == nullptr) ask_for_class(earlier, b, g, x + exec.concurrency());
        one_class(run, earlier, copies, b, g, x);
      });
      if (m_.pattern == hsa_mode::strided) return;
    }
    const isize span = std::min(loop::superblock(rows_, s_.d, s_.e), rows_), blocks = ceil_div(rows_, span);
    each(exec, at, blocks, [&](loop& run, Acc*, isize b, isize g, isize x) {
      // The longest rows first; in order where all are alike: the keys and queries that come next lie behind.
      const isize first = (strided || m_.pattern == hsa_mode::local ? x : blocks - 1 - x) * span;
      run.begin({p.q, b, g * s_.group(), first, std::min(first + span, rows_)}, m_.scale_for(s_), nullptr, p.out);
      if (strided) run.resume(earlier.out, earlier.lse);
      in_order(run, p, b, g, strided);
      run.finish(p.out, p.lse);
    });
  }

 private:
  struct parts {
    std::byte* slots;
    isize slot;
    bool copies;
    Acc *so_far, *out;
  };
  parts lay_out(arena& memory, int threads) const {
    const bool twice = has_classes() && m_.pattern == hsa_mode::sparse;
    const isize all = twice ? s_.B * s_.H * s_.n : 0;
    arena measure;
    parts at{};
    loop(measure, rows_, s_.d, s_.e);
    const isize copy = has_classes() ? class_numbers() : 0;
    at.copies = copy > 0 && copy * isize{sizeof(Acc)} <= (1 << 20);
    if (at.copies) measure.take<Acc>(copy);
    at.slot = static_cast<isize>(measure.bytes());
    at.slots = memory.take<std::byte>(at.slot * threads);
    at.so_far = memory.take<Acc>(2 * all), at.out = memory.take<Acc>(s_.type != dtype_of<Acc> ? all * s_.e : 0);
    return at;
  }
  /// f(run, memory for a class or null, b, g, x) for x < count of every KV head.
  template <class F>
  void each(exec_ref exec, const parts& at, isize count, F&& f) const {
    const isize heads = s_.B * s_.G;
    exec.for_tasks(heads * count, [&](isize task, isize index) {
      arena own(std::span<std::byte>(at.slots + index * at.slot, static_cast<std::size_t>(at.slot)));
      loop run(own, rows_, s_.d, s_.e);
      Acc* const copies = at.copies ? own.take<Acc>(class_numbers()) : nullptr;
      const isize head = task / count;  // neighbouring classes one after the other
      f(run, copies, head / s_.G, head % s_.G, task % count);
    });
  }
  tensor_mut dense(Acc* data, const tensor_ref& q, isize width) const {
    return bhnd<Acc>(data, q.batch, q.heads, q.length, width);
  }

  bool has_classes() const {
    return (m_.pattern == hsa_mode::strided || m_.pattern == hsa_mode::sparse) && m_.stride >= 2;
  }
  /// An `out` of 16 bits beside a q of 32 is rare: the mask serves it.
  bool by_class(const problem& p) const {
    return has_classes() &&
           (m_.pattern == hsa_mode::strided || p.out.type == dtype_of<Acc> || s_.type != dtype_of<Acc>);
  }
  isize offset(isize b) const { return m_.align.position({b, 0, s_.n, s_.m, s_.H, s_.G, s_.B}, 0); }
  template <class T>
  static T every(T rows, isize first, isize step, isize count) {
    T x = rows.slice(first, count);
    x.row_stride *= step;
    return x;
  }
  static isize count_from(isize first, isize end, isize step) { return first < end ? (end - first - 1) / step + 1 : 0; }

  kernel::key_set<Acc> keys_of(const tensor_ref& k, const tensor_ref& v, isize b, isize g, isize n) const {
    kernel::key_set<Acc> keys;
    keys.count = k.length, keys.site = {b, 0, n, k.length, s_.H, s_.G, s_.B};
    if (k.length > 0) keys.k = rows_of(k, b, g), keys.v = rows_of(v, b, g);
    return keys;
  }

  /// Rows of a class lie far apart, where no processor guesses them: those of a later class are asked for (7.9 -> 5.2 ms for the
  /// strided part of 16k tokens, d = 64), where the class is not copied.
  void ask_for_class(const problem& p, isize b, isize g, isize x) const {
    if (x >= std::min(s_.n, m_.stride)) return;
    const isize of_store = static_cast<isize>(size_of(s_.type)), first = (x + offset(b)) % m_.stride;
    for (isize i = x; i < s_.n; i += m_.stride)
      for (isize h = g * s_.group(); h < (g + 1) * s_.group(); ++h) {
        simd::prefetch(p.q.row(b, h, i), s_.d * of_store);
        simd::prefetch_to_write(p.out.row(b, h, i), s_.e * static_cast<isize>(size_of(p.out.type)));
      }
    for (isize j = first < 0 ? first + m_.stride : first; j < s_.m; j += m_.stride)
      simd::prefetch(p.k.row(b, g, j), s_.d * of_store), simd::prefetch(p.v.row(b, g, j), s_.e * of_store);
  }

  /// Numbers of q, k and v of one class.
  isize class_numbers() const {
    return s_.group() * ceil_div(s_.n, m_.stride) * s_.d + ceil_div(s_.m, m_.stride) * (s_.d + s_.e);
  }
  /// Rows of `from` side by side: where they lie, whole strides apart, they share few sets of the caches.
  static tensor_ref side_by_side(const tensor_ref& from, Acc*& to) {
    const tensor_ref x = bhnd<const Acc>(to, 1, from.heads, from.length, from.width);
    constexpr isize ahead = 16;
    const isize bytes = from.width * static_cast<isize>(size_of(from.type));
    for (isize h = 0; h < from.heads; ++h)
      for (isize i = 0; i < from.length; ++i, to += from.width) {
        if (i + ahead < from.length) simd::prefetch(from.row(0, h, i + ahead), bytes);
        simd::load_row<simd::native, Acc>(from.type, from.row(0, h, i), from.width, to);
      }
    return x;
  }

  /// Rows x, x + stride, ... of the heads of a group, and the keys at whole strides from them.
  void one_class(loop& run, const problem& p, Acc* copies, isize b, isize g, isize x) const {
    const isize step = m_.stride, position = x + offset(b), rho = (position % step + step) % step;
    const isize n = count_from(x, s_.n, step), m = count_from(rho, s_.m, step), head = g * s_.group();
    const bool sparse = m_.pattern == hsa_mode::sparse;
    const auto of_group = [&](const auto& t) { return every(t, x, step, n).part(b, head, s_.group()); };
    tensor_ref q = of_group(p.q), k = every(p.k, rho, step, m).part(b, g, 1),
               v = every(p.v, rho, step, m).part(b, g, 1);
    const tensor_mut out = of_group(p.out), lse = p.lse ? of_group(p.lse) : p.lse;
    if (copies != nullptr) q = side_by_side(q, copies), k = side_by_side(k, copies), v = side_by_side(v, copies);
    kernel::key_set<Acc> keys = keys_of(k, v, 0, 0, n);
    const fovea::mask past = causal{at_offset((position - rho) / step - (sparse ? 1 : 0))};  // without the own key
    keys.visible = &past;
    const isize rows = s_.group() * n, span = loop::superblock(rows_, s_.d, s_.e);
    for (isize r = 0; r < rows; r += span) {
      run.begin({q, 0, 0, r, std::min(r + span, rows)}, m_.scale_for(s_), nullptr, out);
      if (m > 0) run.absorb(keys);
      if (sparse)
        run.suspend(out, lse);
      else
        run.finish(out, lse);
    }
  }

  /// The rows in order: what they see of the keys nearby, and of the ends of stretches.
  void in_order(loop& run, const problem& p, isize b, isize g, bool strided) const {
    const isize step = m_.stride;
    if (s_.m == 0) return;
    kernel::key_set<Acc> keys = keys_of(p.k, p.v, b, g, s_.n);
    if (m_.pattern == hsa_mode::fixed) {
      const isize count = s_.m / step;
      kernel::key_set<Acc> ends =
          keys_of(every(p.k, step - 1, step, count), every(p.v, step - 1, step, count), b, g, s_.n);
      const fovea::mask later = ends_of_stretches{step, offset(b)};
      ends.visible = &later;
      if (count > 0) run.absorb(ends);
      const fovea::mask own = chunked_local{step, m_.align};
      keys.visible = &own;
      return run.absorb(keys);
    }
    const fovea::mask near = window{step, 0, m_.align}, all = hsa_pattern{m_.pattern, step, m_.align};
    keys.visible = strided || m_.pattern == hsa_mode::local ? &near : &all;
    run.absorb(keys);
  }

  const hybrid_attention& m_;
  shape s_;
  isize rows_;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
