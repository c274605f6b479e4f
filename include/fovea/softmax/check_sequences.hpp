// SPDX-License-Identifier: MIT
#pragma once
/// @file  A call of softmax_attention over KV sequences: what it refuses, and the list of problems that it is.

#include <fovea/softmax/state.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct sequence_options {
  tensor_mut lse = {};                           ///< [B, H, n, 1], or [1, H, total, 1]
  std::span<const std::int32_t> cu_q = {};       ///< cumulative numbers of rows, one more than there are sequences
  std::span<const std::int32_t> positions = {};  ///< [B, n] or [total]: where m.turn turns q; empty: the last tokens
  std::span<std::byte> workspace = {};           ///< scratch of at least workspace_size(...) bytes
  tensor_mut skipped = {};                       ///< as lse, f32: the share of each row that m.skip left out
};

namespace detail {

/// Rows of one source, as far as a call can see them.
inline void check_rows(const char* name, isize s, const row_source& r, isize width, isize wider, isize length,
                       dtype q) {
  require((r.type == dtype::f64) == (q == dtype::f64), "sequence ", s, ": ", name, " is ", name_of(r.type),
          " and q is ", name_of(q), "; f64 goes with f64 only");
  if (length == 0) return;
  require(r.data != nullptr, "sequence ", s, ": ", name, " is null; wanted ", length, " rows");
  require(length == 1 || r.row_bytes >= width * static_cast<isize>(size_of(r.type)), "sequence ", s, ": rows of ", name,
          " are ", r.row_bytes, " bytes apart; ", width, " elements of ", name_of(r.type), " do not fit");
  require(length == 1 || r.row_bytes % static_cast<isize>(size_of(r.type)) == 0, "sequence ", s, ": rows of ", name,
          " are ", r.row_bytes, " bytes apart; wanted whole elements of ", name_of(r.type));
  const bool scaled = r.scales != nullptr && (r.scale_row == 1 || (r.scale_row >= ceil_div(width, scale_group) &&
                                                                   r.scale_row <= ceil_div(wider, scale_group)));
  require(r.type != dtype::i8 || scaled, "sequence ", s, ": ", name, " is i8 with ",
          r.scales == nullptr ? 0 : r.scale_row, " scales a row; wanted 1, or one for each ", scale_group, " of ",
          width, " elements");
  require(r.ring == 0 || (r.ring > 0 && r.start >= 0 && r.fixed >= 0 && length <= r.fixed + r.ring), "sequence ", s,
          ": ", name, " has ", length, " rows in a ring of ", r.ring, " behind ", r.fixed);
  const bool packed = r.form != row_form::plain;
  require(!packed || (r.type == dtype::i8 && r.scale_row == 1 && (r.table == nullptr || r.page % packed_rows == 0)),
          "sequence ", s, ": packed rows of ", name, " are int8 with a scale a row, in pages of a multiple of ",
          packed_rows, " (or none)");
  const isize filled = r.form == row_form::packed_keys ? ceil_div(width, isize{4}) * 4 : width;
  require(!packed || r.row_bytes >= filled, "sequence ", s, ": packed rows of ", name, " are ", r.row_bytes,
          " bytes; wanted ", filled);
  require(!r.rotated || r.type == dtype::i8, "sequence ", s, ": ", name, " is ", name_of(r.type),
          " and rotated; only int8 rows are");
  if (r.table == nullptr) return;
  require(r.page >= 1 && r.ring == 0, "sequence ", s, ": pages of ", name, " hold ", r.page,
          " rows; wanted at least 1, and no ring");
  std::int32_t low = 0;
  for (isize x = 0; x < ceil_div(length, r.page); ++x) low = r.table[x] < low ? r.table[x] : low;
  require(low >= 0, "sequence ", s, ": the page table of ", name, " names page ", low, "; pages count from 0");
}

/// Outputs may not lie in keys; of pages nothing is known but the table, and nothing is asked.
inline void check_rows_apart(const char* name, const tensor_mut& out, const row_source& r, isize heads,
                             isize head_bytes, isize length) {
  if (r.table != nullptr || length == 0 || heads == 0) return;
  isize slots = r.ring > 0 && length > r.fixed ? r.fixed + r.ring : length;
  if (r.form != row_form::plain) slots = ceil_div(slots, packed_rows) * packed_rows;
  const auto first = reinterpret_cast<std::uintptr_t>(r.data);
  const auto last = first + static_cast<std::uintptr_t>((heads - 1) * head_bytes + slots * r.row_bytes);
  const byte_range x = extent(out);
  require(x.first == x.last || x.last <= first || last <= x.first, name,
          " overlaps the keys or values of a sequence in memory; outputs need memory of their own");
}

inline void check_sequence(const softmax_attention& m, isize s, const kv_sequence& kv, const tensor_ref& q,
                           const tensor_mut& out, const tensor_mut& lse, isize n) {
  require(kv.heads >= 1 && q.heads % kv.heads == 0, "sequence ", s, " has ", kv.heads, " KV heads and q has ", q.heads,
          " heads; the query heads must be a multiple of the KV heads");
  require(kv.d == q.width && kv.e == out.width, "sequence ", s, " has keys ", kv.d, " and values ", kv.e,
          " wide; q and out are ", q.width, " and ", out.width);
  require(kv.length >= 0 && kv.dropped >= 0 && kv.kept >= 0 && (kv.dropped == 0 || kv.kept <= kv.length), "sequence ",
          s, ": length, kept, dropped are ", kv.length, ", ", kv.kept, ", ", kv.dropped,
          "; they must not be negative, and the rows kept must be there");
  require(kv.k.type == kv.v.type, "sequence ", s, ": keys are ", name_of(kv.k.type), " and values ", name_of(kv.v.type),
          "; they must be of one type");
  require((kv.k.form == row_form::packed_keys) == (kv.v.form == row_form::packed_values) &&
              kv.k.form != row_form::packed_values && kv.v.form != row_form::packed_keys && !kv.v.rotated,
          "sequence ", s, ": keys and values are both plain, or packed keys and packed values; only keys are rotated");
  require(kv.k.form == row_form::plain || (kv.k.page == kv.v.page && kv.k.ring == kv.v.ring &&
                                           kv.k.fixed == kv.v.fixed && kv.k.start == kv.v.start),
          "sequence ", s,
          ": packed keys and values lie in slots of different numbers; wanted pages of one size, or one ring");
  const isize wider = kv.d > kv.e ? kv.d : kv.e;  // values that lie in keys have the scales of those
  check_rows("k", s, kv.k, kv.d, kv.d, kv.length, q.type), check_rows("v", s, kv.v, kv.e, wider, kv.length, q.type);
  check_rows_apart("out", out, kv.k, kv.heads, kv.k_head_bytes, kv.length);
  check_rows_apart("out", out, kv.v, kv.heads, kv.v_head_bytes, kv.length);
  if (lse) check_rows_apart("lse", lse, kv.k, kv.heads, kv.k_head_bytes, kv.length);
  if (lse) check_rows_apart("lse", lse, kv.v, kv.heads, kv.v_head_bytes, kv.length);
  const kept_keys seen = m.mask.kept();
  if (kv.dropped == 0 || !seen.bounded()) return;
  const isize oldest = kv.kept + kv.dropped, first = kv.tokens() - n - seen.window + 1;
  require(seen.first <= kv.kept && first >= oldest, "sequence ", s, " has dropped tokens ", kv.kept, " to ", oldest - 1,
          "; its first row sees the first ", seen.first, " and those from ", first, " on (a larger chunk keeps more)");
}

struct sequence_call {
  tensor_ref q;
  std::span<const kv_sequence> kv;
  tensor_mut out;
  sequence_options options;
  isize part_first = 0, part_rows = 0, part_tokens = 0;  ///< first_row, all_rows, all_tokens of sequence_problem

  isize count() const { return static_cast<isize>(kv.size()); }
  bool packed() const { return !options.cu_q.empty(); }
  isize first_row(isize s) const { return packed() ? options.cu_q[static_cast<std::size_t>(s)] : 0; }
  isize rows(isize s) const { return packed() ? first_row(s + 1) - first_row(s) : q.length; }

  sequence_problem problem_of(isize s) const {
    const isize b = packed() ? 0 : s, first = first_row(s), n = rows(s);
    sequence_problem p;
    p.q = q.part(b, 0, q.heads).slice(first, n);
    if (out) p.out = out.part(b, 0, q.heads).slice(first, n);
    if (options.lse) p.lse = options.lse.part(b, 0, q.heads).slice(first, n);
    if (options.skipped) p.skipped = options.skipped.part(b, 0, q.heads).slice(first, n);
    p.kv = kv[static_cast<std::size_t>(s)], p.b = s, p.B = count();
    p.first_row = part_first, p.all_rows = part_rows, p.all_tokens = part_tokens;
    if (!options.positions.empty()) p.positions = options.positions.data() + (packed() ? first : s * n);
    return p;
  }

  void check(const softmax_attention& m) const {
    // Views without rows stand for k and v: what a plain call says of q, out and lse holds here.
    const isize heads = kv.empty() ? 1 : kv[0].heads;
    const tensor_ref k(nullptr, q.type, q.batch, heads, 0, q.width, 0, 0, 0),
        v(nullptr, q.type, q.batch, heads, 0, out.width, 0, 0, 0);
    require(heads >= 1, "sequence 0 has ", heads, " KV heads; wanted at least 1");
    check_problem({q, k, v, out, options.lse, {}});
    require(!options.skipped || m.takes_skipped(),
            "skipped was given; this softmax_attention skips nothing (set skip)");
    check_skipped({q, k, v, out, options.lse, {}, nullptr, options.skipped});
    check_rows_of_q();
    require(options.positions.empty() || m.turn != nullptr,
            "positions were given; this mechanism turns nothing (set softmax_attention::turn)");
    require(options.positions.empty() || static_cast<isize>(options.positions.size()) == q.batch * q.length,
            "positions holds ", options.positions.size(), " numbers; wanted one for each of ", q.batch * q.length,
            " rows of q");
    for (isize s = 0; s < count(); ++s) {
      const kv_sequence& x = kv[static_cast<std::size_t>(s)];
      const isize n = rows(s);
      require(x.heads == heads, "sequence ", s, " has ", x.heads, " KV heads and sequence 0 has ", heads,
              "; they must be equal");
      check_sequence(m, s, x, q, out, options.lse, n);
      m.check_items({count(), q.heads, heads, n, x.tokens(), x.d, x.e, q.type}, s, s + 1);
      if (m.turn != nullptr && n > 0) check_turn(*m.turn, x.d, problem_of(s).positions, n, x.tokens() - n, n);
    }
  }

  std::size_t workspace_size(const softmax_attention& m, int threads) const {
    const auto make = [this](isize s) { return problem_of(s); };
    const problem_list list(count(), make);
    return q.type == dtype::f64 ? softmax_workspace<double>(m, list, threads)
                                : softmax_workspace<float>(m, list, threads);
  }
  void attend(const softmax_attention& m, exec_ref exec, arena scratch) const {
    const auto make = [this](isize s) { return problem_of(s); };
    const problem_list list(count(), make);
    if (q.type == dtype::f64)
      detail::attend<double>(m, exec, list, scratch);
    else
      detail::attend<float>(m, exec, list, scratch);
  }

  void check_rows_of_q() const {
    if (!packed()) {
      require(q.batch == count(), "q has a batch of ", q.batch, " and ", count(),
              " sequences were given; wanted one for each item, or cu_q");
      return;
    }
    const auto& cu = options.cu_q;
    require(cu.size() == kv.size() + 1, "cu_q holds ", cu.size(), " numbers; ", kv.size(), " sequences need ",
            kv.size() + 1);
    require(q.batch == 1, "q has a batch of ", q.batch, "; with cu_q it is [1, H, total, d]");
    for (std::size_t s = 0; s + 1 < cu.size(); ++s)
      require(cu[s] <= cu[s + 1], "cu_q falls from ", cu[s], " to ", cu[s + 1], " at sequence ", s,
              "; it must not decrease");
    require(cu.front() == 0 && cu.back() == q.length, "cu_q runs from ", cu.front(), " to ", cu.back(),
            "; wanted 0 to the ", q.length, " rows of q");
  }
};

/// A call that appends to a ring part by part: what a part pushes out must lie behind what its first row sees.
inline void check_ring_parts(const softmax_attention& m, const kv_sequence& held, isize n, isize most_at_once) {
  const kept_keys seen = m.mask.kept();
  if (held.k.ring == 0 || !seen.bounded()) return;
  for (isize first = 0, count = 0; first < n; first += count) {
    count = most_at_once < n - first ? most_at_once : n - first;
    const isize before = held.tokens() + first, low = before + count - held.k.ring, old = held.kept + held.dropped,
                oldest = low > old ? low : old;
    require(oldest <= held.kept || (seen.first <= held.kept && before - seen.window + 1 >= oldest),
            "the ring store keeps the first ", held.kept, " tokens and the last ", held.k.ring,
            "; the mask sees the first ", seen.first, " and ", seen.window, " others from each of ", count,
            " new tokens (make the ring with the window and the first keys of the mask)");
  }
}

/// What prefill and step with a store refuse; the store itself speaks of k and v.
inline void check_append_and_attend(const softmax_attention& m, const tensor_ref& q, const tensor_ref& k,
                                    const tensor_ref& v, const tensor_mut& out, const sequence_options& o,
                                    const kv_sequence& held, isize tokens) {
  require(o.cu_q.empty(), "cu_q was given; a call that appends to one store has one sequence");
  require(q.length == k.length, "q has ", q.length, " tokens and k has ", k.length,
          "; a call that appends takes the same new tokens in both");
  check_problem({q, k, v, out, o.lse, {}});
  require(!o.skipped || m.takes_skipped(), "skipped was given; this softmax_attention skips nothing (set skip)");
  check_skipped({q, k, v, out, o.lse, {}, nullptr, o.skipped});
  require(m.mask.is_causal(),
          "the mask of a call that appends to a store must be causal (causal or window, "
          "bottom-right); a row cannot see keys that have not come");
  require(o.positions.empty() || m.turn != nullptr,
          "positions were given; this mechanism turns nothing (set softmax_attention::turn)");
  require(o.positions.empty() || static_cast<isize>(o.positions.size()) == q.length, "positions holds ",
          o.positions.size(), " numbers; wanted one for each of ", q.length, " tokens");
  require(q.batch == 1 && held.heads == k.heads && held.d == q.width && held.e == out.width, "q is ", describe(q),
          ", k ", describe(k), " and out ", describe(out), "; the store holds one sequence of ", held.heads,
          " KV heads, keys ", held.d, " and values ", held.e, " wide");
  m.check_values({1, q.heads, held.heads, q.length, tokens + q.length, held.d, held.e, q.type});
  if (m.turn != nullptr && q.length > 0)
    check_turn(*m.turn, held.d, o.positions.empty() ? nullptr : o.positions.data(), q.length, tokens, q.length);
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
