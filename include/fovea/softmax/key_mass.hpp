// SPDX-License-Identifier: MIT
#pragma once
/// @file  Attention mass of keys: what eviction policies count (H2O's heavy hitters, SnapKV's votes).
///
///   mass[b, h, j] = sum_i p_ij,   p_ij = e^(s_ij - lse_i) for the keys j that row i sees
///
///   key_mass(exec, m, q, k, lse, mass [, options])     q [B, H, n, d], k [B, G, m, d], lse [B, H, n, 1] as prefill wrote it
///   key_mass(exec, m, q, kv, lse, mass [, options])    KV sequences, as prefill takes them: q [B, H, n, d], or packed with cu_q
///
/// Contract   mass [B, H, 1, m] for each query head, or [B, G, 1, m] summed over a KV head's group; sequence s writes rows of its store
///            to item s, and zeros behind them. f32, or f64 with f64. Masses of a row add up to 1 less what its sink takes. The
///            same bits for any number of threads and any batch. Adding up calls (decoding steps) is the caller's.
/// Cost       2 d flops for each visible pair: half of the forward pass. Tiles that the mask rules out are skipped.
/// Source     Zhang et al., H2O, arXiv 2306.14048.

#include <fovea/core/backward.hpp>
#include <fovea/kernel/key_mass.hpp>
#include <fovea/softmax/stores.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline constexpr isize key_mass_piece = 480;  // keys of a task: a whole number of blocks

template <class Acc>
struct key_mass_run {
  using loop = kernel::key_mass<simd::native, Acc>;
  static constexpr isize W = simd::pack<Acc, simd::native>::size;

  struct slot {
    loop run;
    Acc* sums;
    slot(arena& memory, isize rows, isize d) : run(memory, rows, d), sums(memory.take<Acc>(key_mass_piece * W)) {}
  };
  static std::size_t slot_bytes(isize rows, isize d) {
    arena measure;
    slot(measure, rows, d);
    return measure.bytes();
  }
  static std::size_t workspace_size(isize rows, isize d, int threads) {
    arena measure;
    measure.take<std::byte>(static_cast<isize>(slot_bytes(rows, d)) * threads);
    return measure.bytes();
  }

  /// `rows`: the most rows of a query group in the list.
  static void run(const softmax_attention& m, exec_ref exec, const problem_list& list, const tensor_mut& mass,
                  isize rows, arena scratch) {
    const isize pieces = ceil_div(mass.width, key_mass_piece), d = list[0].q.width;
    const std::size_t size = slot_bytes(rows, d);
    std::byte* slots = scratch.take<std::byte>(static_cast<isize>(size) * exec.concurrency());
    exec.for_tasks(list.count() * mass.heads * pieces, [&](isize task, isize which) {
      arena memory(std::span<std::byte>(slots + static_cast<std::size_t>(which) * size, size));
      slot own(memory, rows, d);
      const sequence_problem p = list[task / (mass.heads * pieces)];
      one_task(m, p, mass, task / pieces % mass.heads, task % pieces * key_mass_piece, own);
    });
  }

 private:
  static void one_task(const softmax_attention& m, const sequence_problem& p, const tensor_mut& mass, isize head,
                       isize j0, slot& own) {
    const isize end = j0 + key_mass_piece < mass.width ? j0 + key_mass_piece : mass.width,
                j1 = end < p.kv.length  ? end
                     : p.kv.length < j0 ? j0
                                        : p.kv.length,
                n = p.q.length;
    // One query head, or all heads of a group: rows [first, last) of the group.
    const bool whole = mass.heads == p.kv.heads;
    const isize g = whole ? head : head / p.group(), first = whole ? 0 : head % p.group() * n,
                last = whole ? p.rows() : first + n;
    for (isize x = 0; x < (j1 - j0) * W; ++x) own.sums[x] = Acc(0);
    if (j0 < j1) {
      const problem_keys<Acc> keys(m, p, g);
      const shape s{1, p.q.heads, p.kv.heads, n, p.kv.length, p.q.width, 1, p.q.type};
      const isize block = loop::superblock(last - first);
      for (isize r = first; r < last; r += block) {
        kernel::query_rows rows{p.q, 0, g * p.group(), r, r + block < last ? r + block : last};
        rows.turn = m.turn, rows.positions = p.positions, rows.first_position = p.kv.tokens() - n;
        own.run.begin(rows, p.lse, m.scale_for(s));
        own.run.absorb(keys.set, j0, j1, own.sums);
      }
    }
    Acc* to = static_cast<Acc*>(mass.row(p.b, head, 0));
    for (isize j = j0; j < end; ++j)
      to[j] = j < j1 ? simd::reduce_add(simd::pack<Acc, simd::native>::load(own.sums + (j - j0) * W)) : Acc(0);
  }
};

inline void check_key_mass(const tensor_ref& q, const tensor_ref& lse, const tensor_mut& mass, isize items, isize heads,
                           isize keys) {
  const dtype wide = q.type == dtype::f64 ? dtype::f64 : dtype::f32;
  check_tensor("q", q), check_tensor("lse", lse), check_tensor("mass", mass);
  require(q.width > 0, "q is ", q.width, " wide; widths must be positive");
  require(lse.batch == q.batch && lse.heads == q.heads && lse.length == q.length && lse.width == 1 && lse.type == wide,
          "lse is ", describe(lse), "; wanted [", q.batch, ", ", q.heads, ", ", q.length, ", 1] ", name_of(wide));
  require(heads >= 1 && q.heads % heads == 0, "q has ", q.heads, " heads and there are ", heads,
          " KV heads; the query heads must be a multiple of them");
  require(mass.batch == items && (mass.heads == q.heads || mass.heads == heads) && mass.length == 1 &&
              mass.width >= keys && mass.type == wide,
          "mass is ", describe(mass), "; wanted [", items, ", ", q.heads, " or ", heads, ", 1, ", keys, "] ",
          name_of(wide));
  check_apart("mass", mass, "q", q), check_apart("mass", mass, "lse", lse);
}

/// Calls f(Acc(0)) with the accumulator of a storage type.
template <class F>
auto with_accumulator(dtype type, F&& f) {
  return type == dtype::f64 ? f(0.0) : f(0.0F);
}

void run_key_mass(const softmax_attention& m, exec_ref exec, const problem_list& list, const tensor_ref& q,
                  const tensor_mut& mass, isize rows, std::span<std::byte> workspace);
#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void run_key_mass(const softmax_attention& m, exec_ref exec, const problem_list& list,
                                   const tensor_ref& q, const tensor_mut& mass, isize rows,
                                   std::span<std::byte> workspace) {
  if (list.count() == 0 || mass.heads == 0 || mass.width == 0) return;
  with_accumulator(q.type, [&](auto acc) {
    using run = key_mass_run<decltype(acc)>;
    buffer own;
    run::run(m, exec, list, mass, rows,
             scratch_of(run::workspace_size(rows, q.width, exec.concurrency()), workspace, own));
  });
}
#endif

}  // namespace detail

/// Bytes of scratch for up to n rows of each item.
inline std::size_t workspace_size_key_mass(const shape& s, int threads) {
  return detail::with_accumulator(s.type, [&](auto acc) {
    return detail::key_mass_run<decltype(acc)>::workspace_size(s.group() * s.n, s.d, threads);
  });
}

inline void key_mass(exec_ref exec, const softmax_attention& m, const tensor_ref& q, const tensor_ref& k,
                     const tensor_ref& lse, const tensor_mut& mass, const sequence_options& options = {}) {
  detail::check_tensor("k", k);
  detail::check_key_mass(q, lse, mass, q.batch, k.heads, k.length);
  require(k.batch == q.batch && k.width == q.width && k.type == q.type, "k is ", detail::describe(k), "; q is ",
          detail::describe(q), ", and batch, width and type must be equal");
  require(mass.width == k.length, "mass is ", detail::describe(mass), "; wanted a width of ", k.length, " keys");
  detail::check_apart("mass", mass, "k", k);
  require(m.turn == nullptr && options.cu_q.empty() && options.positions.empty(),
          "turn, cu_q or positions were given; of views key_mass takes q and k as they come turned");
  const shape s{q.batch, q.heads, k.heads, q.length, k.length, q.width, 1, q.type};
  m.check_values(s);
  const auto item = [&](isize b) {
    detail::sequence_problem p;
    p.q = q.part(b, 0, q.heads), p.b = b, p.B = q.batch;
    p.lse = detail::as_output(lse).part(b, 0, q.heads);
    p.kv.heads = k.heads, p.kv.d = q.width, p.kv.length = k.length;
    if (k.length > 0)
      p.kv.k = rows_of(k, b, 0), p.kv.k_head_bytes = k.head_stride * static_cast<isize>(size_of(k.type));
    return p;
  };
  detail::run_key_mass(m, exec, detail::problem_list(q.batch, item), q, mass, s.group() * q.length, options.workspace);
}

inline void key_mass(exec_ref exec, const softmax_attention& m, const tensor_ref& q, std::span<const kv_sequence> kv,
                     const tensor_ref& lse, const tensor_mut& mass, const sequence_options& options = {}) {
  detail::sequence_call call{q, kv, {}, options};
  call.options.lse = detail::as_output(lse);
  isize keys = 0, rows = 0;
  for (const kv_sequence& x : kv) keys = x.length > keys ? x.length : keys;
  const isize heads = kv.empty() ? 1 : kv[0].heads;
  detail::check_key_mass(q, lse, mass, call.count(), heads, keys);
  call.check_rows_of_q();
  for (isize s = 0; s < call.count(); ++s) {
    const kv_sequence& x = kv[static_cast<std::size_t>(s)];
    require(x.heads == heads, "sequence ", s, " has ", x.heads, " KV heads and sequence 0 has ", heads,
            "; they must be equal");
    const tensor_mut out(nullptr, q.type, 1, q.heads, 0, x.e, 0, 0, 0);
    const isize n = call.rows(s);
    detail::check_sequence(m, s, x, q, out, {}, n);
    m.check_items({call.count(), q.heads, heads, n, x.tokens(), x.d, x.e, q.type}, s, s + 1);
    if (m.turn != nullptr && n > 0)
      detail::check_turn(*m.turn, x.d, call.problem_of(s).positions, n, x.tokens() - n, n);
    rows = q.heads / heads * n > rows ? q.heads / heads * n : rows;
  }
  detail::run_key_mass(m, exec, detail::problem_list(call.count(), [&](isize s) { return call.problem_of(s); }), q,
                       mass, rows, options.workspace);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
