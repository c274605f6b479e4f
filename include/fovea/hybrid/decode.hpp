// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention's decode steps with an int8 or int4 selection: a few rows against a state's summaries, without unfolding them.
///
///   votes      one pass over the codes for all query heads of a KV head (kernel/code_panels.hpp)
///   choice     candidates are one stretch of blocks, between the first keys and the window: a threshold, then one list a head
///   sum        pooled tokens and copies of kept keys for all heads together, each head's others hidden by a bias of -infinity;
///              the blocks that any head has chosen, as pages of the cache, hidden from the heads that have not
///
/// Contract   hybrid_attention's. Rows of query blocks of up to 3 rows. Keys and values from views or from any KV store.
/// Cost       codes, pooled tokens and chosen blocks are read once for a KV head.

#include <cstring>

#include <fovea/core/partial.hpp>
#include <fovea/hybrid/decode_sets.hpp>
#include <fovea/hybrid/plan.hpp>
#include <fovea/kernel/decode.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Arch: one with integers worth the name (kernel::has_code_pass).
template <class Arch>
class hybrid_decode {
  using arch = Arch;
  using P = simd::pack<float, arch>;
  using rows_loop = kernel::decode_rows<arch, float>;
  static constexpr float none = -std::numeric_limits<float>::infinity();
  static constexpr isize gathered = 256, most_n = 3;

 public:
  template <class Acc>
  static constexpr bool can = std::is_same_v<Acc, float>&& kernel::has_code_pass<Arch>;
  template <class Acc>
  static bool takes(const hybrid_attention& m, const shape& s) {
    if constexpr (!can<Acc>) return false;
    return s.n <= most_n && m.is_causal && m.compensate != compensation::cumulant &&
           (m.select == block_selector::int8 || m.select == block_selector::int4);
  }

  hybrid_decode(const hybrid_attention& mechanism, const shape& sizes, isize tokens_before)
      : m(mechanism),
        s(sizes),
        rule(hybrid_plan<float>(mechanism, sizes, tokens_before).rule),
        parts(mechanism.compensate == compensation::none ? 1 : mechanism.parts) {
    voters = s.group() * std::min(s.n, m.block_q);
    selections = rule.share > 1 ? 1 : s.group();
    rows = s.group() < rows_loop::most_rows ? s.group() : rows_loop::most_rows;
  }

  struct slot {
    kernel::code_panels<arch> panels;
    rows_loop run;
    float *row, *peak, *mass, *votes, *sorted, *bias, *base, *logs, *kept_bias;
    float *m, *l, *o;  // of the rows so far, m in nats
    float *part_m, *part_l, *part_o;
    std::uint8_t *fate, *hidden;  // [selections][blocks]
    std::int32_t *lists, *pages_k, *pages_v;
    kernel::block_list* chosen;  // [selections]
    kernel::block_list all;
    std::byte *k, *v;  // gathered rows and their scales
    float *k_scales, *v_scales;

    slot(arena& memory, const hybrid_decode& x)
        : panels(memory, {x.s.d, x.m.select == block_selector::int8 ? 127 : 7}, x.rule.block_k, x.voters),
          run(memory, x.s.d, x.s.e) {
      const isize blocks = x.rule.blocks(), group = x.s.group(), pools = x.rule.pool ? blocks * x.parts : 0;
      row = memory.take<float>(x.s.d);
      peak = memory.take<float>(x.voters * x.ld()), mass = memory.take<float>(x.voters * x.ld());
      votes = memory.take<float>(x.ld()), sorted = memory.take<float>(x.ld());
      bias = memory.take<float>(group * pools), base = memory.take<float>(pools);
      logs = memory.take<float>(x.rule.pool ? x.rule.block_k / x.parts + 1 : 0);
      kept_bias = memory.take<float>(group * x.keeps());
      m = memory.take<float>(group), l = memory.take<float>(group), o = memory.take<float>(group * x.s.e);
      part_m = memory.take<float>(x.rows), part_l = memory.take<float>(x.rows),
      part_o = memory.take<float>(x.rows * x.s.e);
      fate = memory.take<std::uint8_t>(x.selections * x.ld_fate());
      hidden = memory.take<std::uint8_t>(x.selections * x.ld_fate());
      lists = memory.take<std::int32_t>((x.selections + 1) * blocks);
      pages_k = memory.take<std::int32_t>(blocks), pages_v = memory.take<std::int32_t>(blocks);
      chosen = memory.take<kernel::block_list>(x.selections);
      k = memory.take<std::byte>(x.gather_keys() * x.s.d * 4), v = memory.take<std::byte>(x.gather_keys() * x.s.e * 4);
      const isize scales = ceil_div(std::max(x.s.d, x.s.e), scale_group);
      k_scales = memory.take<float>(x.gather_keys() * scales), v_scales = memory.take<float>(x.gather_keys() * scales);
    }
  };
  std::size_t slot_bytes() const {
    arena measure;
    slot(measure, *this);
    return measure.bytes();
  }

  /// Every KV head; `memory` holds all tokens of `keys` that are in whole blocks.
  void attend(exec_ref exec, const problem& p, const hybrid_rows& keys, const hybrid_memory<float>& memory,
              arena scratch) const {
    const std::size_t piece = slot_bytes();
    auto* base_of = scratch.take<std::byte>(static_cast<isize>(piece) * exec.concurrency());
    // A kept selection is of single tokens: made at position `chosen_at`, used at `now`.
    const isize now = s.m - 1, chosen_at = memory.selected() - 1;
    const bool keeps = m.refresh > 1 && s.n == 1, again = keeps && chosen_at >= 0 && now - chosen_at < m.refresh;
    exec.for_tasks(s.B * s.G, [&](isize task, isize index) {
      arena own(std::span<std::byte>(base_of + static_cast<std::size_t>(index) * piece, piece));
      slot at(own, *this);
      const isize b = task / s.G, g = task % s.G;
      const kernel::kv_summary<float> summary = memory.head(task);
      kernel::key_set<float> set;
      set.k = keys.keys(b, g), set.v = keys.values(b, g), set.count = s.m, set.site = {b, 0, 1, s.m, s.H, s.G};
      const isize first = rule.origin / m.block_q, last = (rule.origin + s.n - 1) / m.block_q;
      for (isize block = first; block <= last; ++block) {
        if (again)
          recall(at, summary, block, chosen_at);
        else
          select(at, p, summary, set.k.rotated, b, g, block);
        if (keeps && !again) keep(at, summary, block);
        const range own_rows = rule.rows(block);
        for (isize i = own_rows.first; i < own_rows.last; ++i) one_row(at, p, summary, set, b, g, block, i);
      }
    });
    if (keeps && !again) memory.selected() = now + 1;
  }

 private:
  isize ld() const { return rule.blocks() + 2 * P::size; }
  isize ld_fate() const { return ceil_div(rule.blocks(), isize{8}) * 8; }
  isize keeps() const { return rule.kept > 0 ? s.m / rule.stretch * rule.kept : 0; }
  isize gather_keys() const { return std::max(gathered / rule.block_k, isize{1}) * std::min(rule.block_k, gathered); }

  // ---- the selection of a query block ----

  void select(slot& at, const problem& p, const kernel::kv_summary<float>& summary, bool rotated, isize b, isize g,
              isize block) const {
    const range r = rule.rows(block);
    const isize n = r.last - r.first, past = rule.reach_of(block).past;
    const float factor = static_cast<float>(rule.scale * 1.4426950408889634074);
    for (isize x = 0; x < s.group() * n; ++x) {
      const kernel::query_rows rows_of_head{p.q, b, 0, 0, 0, nullptr, nullptr, 0, rotated};
      const float* q =
          kernel::load_query<arch, float>(rows_of_head, g * s.group() + x / n, r.first + x % n, s.d, at.row);
      at.panels.load(q, factor, summary.needs.levels, x);
    }
    const isize stretches = rule.stretch > 0 ? past * rule.block_k / rule.stretch : 0;
    at.panels.run(summary.code, summary.step, s.group() * n, past, at.peak, at.mass, ld(),
                  {summary.small, std::max(rule.stretch, isize{1}), rule.kept, stretches});
    for (isize h = 0; h < selections; ++h) {
      const isize first = rule.share > 1 ? 0 : h * n, count = rule.share > 1 ? s.group() * n : n;
      vote(at, first, count, rule.settled(block));
      std::fill(at.votes + rule.settled(block), at.votes + past, 0.0F);  // computed whatever it is
      choose(at, h, block);
    }
  }
  /// votes_ of voters [first, first + count): logarithms for one row that votes alone, else the sum of their shares.
  void vote(slot& at, isize first, isize count, isize past) const {
    float* const votes = at.votes;
    if (rule.votes_are_logs()) {
      const float *peak = at.peak + first * ld(), *mass = at.mass + first * ld();
      for (isize J = 0; J < past; ++J) {  // the chord of log2, in the order of the masses; NaN stays
        const auto bits = std::bit_cast<std::int32_t>(mass[J]) - (127 << 23);
        votes[J] = peak[J] + static_cast<float>(bits) * 0x1p-23F + mass[J] * 0.0F;
      }
      return;
    }
    for (isize J = 0; J < past; ++J) votes[J] = 0;
    for (isize r = first; r < first + count; ++r) {
      float *peak = at.peak + r * ld(), *mass = at.mass + r * ld();
      for (isize J = past; J < past + P::size; ++J) peak[J] = none, mass[J] = 0;
      P top(none), sum(0.0F);
      for (isize J = 0; J < past; J += P::size) top = simd::max(top, P::load(peak + J));
      const P highest(simd::highest(top));
      for (isize J = 0; J < past; J += P::size) {  // peaks are whole numbers: the chord is exact
        const P weight = P::load(mass + J) * kernel::chord_of_bits<arch>(P::load(peak + J) - highest);
        weight.store(mass + J), sum = sum + weight;
      }
      const P inverse(1.0F / simd::reduce_add(sum));
      for (isize J = 0; J < past; J += P::size)
        simd::fma(P::load(mass + J), inverse, P::load(votes + J)).store(votes + J);
    }
  }
  /// Candidates are blocks [first, second) of those before the query block; the others are computed in any case.
  range candidates(isize block) const {
    const isize p0 = rule.start(block), past = rule.reach_of(block).past;
    const isize first = std::min(past, ceil_div(rule.first, rule.block_k));
    isize last = past;
    if (rule.window > 0)
      last = std::min(last, ceil_div(std::max(p0 - rule.window - rule.block_k + 2, isize{0}), rule.block_k));
    if (rule.stretch > 0) last = std::min(last, p0 / rule.stretch * (rule.stretch / rule.block_k));
    return {first, std::max(first, last)};
  }
  void choose(slot& at, isize h, isize block) const {
    const auto reach = rule.reach_of(block);
    const range all = candidates(block);
    const isize open = all.last - all.first;
    std::uint8_t* const fate = at.fate + h * ld_fate();
    std::int32_t* const list = at.lists + h * rule.blocks();
    isize count = rule.count(open, reach.seen - reach.past);
    if (rule.top_p > 0) {
      const isize by_mass = kernel::count_by_mass<arch>(rule, block, reach.past, at.votes, at.sorted);
      count = std::max(by_mass, std::min(open, ceil_div(rule.at_least, rule.block_k)));
    }
    float* const votes = at.sorted;
    for (isize J = 0; J < open; ++J) {
      const float x = at.votes[all.first + J];
      votes[J] = x == x ? x : -none;
    }
    for (isize J = open; J < open + 2 * P::size; ++J) votes[J] = none;
    const float least = count <= 0     ? -none
                        : count < open ? kernel::detail::count_th_largest<arch>(votes, open, count)
                                       : none;
    isize ties = count;  // of the candidates as good as the last one, so many, the earlier ones
    for (isize J = 0; J < open; ++J) ties -= votes[J] > least ? 1 : 0;
    isize taken = 0;
    const std::uint8_t rest = rule.pool ? std::uint8_t{kernel::pooled} : std::uint8_t{kernel::skipped};
    const auto take = [&](isize from, isize to) {
      for (isize J = from; J < to; ++J) fate[J] = kernel::computed, list[taken++] = static_cast<std::int32_t>(J);
    };
    take(0, all.first);
    for (isize J = 0; J < open; ++J) {
      const bool tie = votes[J] == least && ties > 0, in = votes[J] > least || tie;
      ties -= tie ? 1 : 0;
      fate[all.first + J] = in ? std::uint8_t{kernel::computed} : rest;
      list[taken] = static_cast<std::int32_t>(all.first + J);
      taken += in ? 1 : 0;
    }
    take(all.last, reach.seen);
    for (isize J = reach.seen; J < ld_fate(); ++J) fate[J] = kernel::skipped;
    at.chosen[h] = {list, taken};
  }

  /// The fates of blocks before the query block, into the summaries; and back: blocks that are whole since then are computed.
  void keep(const slot& at, const kernel::kv_summary<float>& summary, isize block) const {
    for (isize h = 0; h < selections; ++h)
      std::copy_n(at.fate + h * ld_fate(), rule.reach_of(block).past, summary.fates + h * room(summary));
  }
  void recall(slot& at, const kernel::kv_summary<float>& summary, isize block, isize chosen_at) const {
    // Chosen were the blocks before the query block of that position; its own ones were computed.
    const isize known = chosen_at / m.block_q * m.block_q / rule.block_k, seen = rule.reach_of(block).seen;
    for (isize h = 0; h < selections; ++h) {
      std::uint8_t* const fate = at.fate + h * ld_fate();
      std::int32_t* const list = at.lists + h * rule.blocks();
      isize taken = 0;
      for (isize J = 0; J < ld_fate(); ++J) {
        fate[J] = J < known ? summary.fates[h * room(summary) + J]
                            : static_cast<std::uint8_t>(J < seen ? kernel::computed : kernel::skipped);
        if (fate[J] == kernel::computed) list[taken++] = static_cast<std::int32_t>(J);
      }
      at.chosen[h] = {list, taken};
    }
  }
  static isize room(const kernel::kv_summary<float>& summary) { return ceil_div(summary.tokens, summary.block_k); }

  // ---- the sum of a row, for all heads of the group ----

  void one_row(slot& at, const problem& p, const kernel::kv_summary<float>& summary, const kernel::key_set<float>& keys,
               isize b, isize g, isize block, isize i) const {
    const isize group = s.group(), head = g * group, end = std::min(i + rule.offset + 1, s.m);
    for (isize h = 0; h < group; ++h) at.m[h] = none, at.l[h] = 0;
    for (isize c = 0; c < group * s.e; ++c) at.o[c] = 0;
    const tensor_ref q = p.q.slice(i, 1);
    const auto begin = [&](isize first, isize last) {
      at.run.begin({q, b, head, first, last, nullptr, nullptr, 0, keys.k.rotated}, rule.scale);
    };
    kernel::key_set<float> pool, kept;
    const score pool_score = pool_of(at, summary, block, head, pool),
                kept_score = kept_of(at, summary, block, head, kept);
    pool.modify = &pool_score, kept.modify = &kept_score;
    pool.site = kept.site = keys.site;
    for (isize first = 0; first < group; first += rows) {
      const isize last = std::min(first + rows, group);
      begin(first, last);
      if (pool.count > 0) join(at, pool, first, last);
      if (kept.count > 0) join(at, kept, first, last);
      if (selections == 1) chosen(at, keys, at.chosen[0], end, first, last, nullptr);
      if (selections == 1) continue;
      if (!summary.odd() && overlap(at, first, last)) {  // what is hidden weighs 0, and 0 times infinity is not 0
        const hidden_blocks apart = join_lists(at, block, head, first, last);
        chosen(at, keys, at.all, end, first, last, &apart);
        continue;
      }
      for (isize h = first; h < last; ++h) {
        begin(h, h + 1);
        chosen(at, keys, at.chosen[h], end, h, h + 1, nullptr);
      }
    }
    for (isize h = 0; h < group; ++h) {
      partial<float> all{at.m[h], at.l[h], at.o + h * s.e};
      const float lse = normalise(all, s.e);
      simd::store_row<arch, float>(p.out.type, all.o, s.e, p.out.row(b, head + h, i));
      if (p.lse) *static_cast<float*>(p.lse.row(b, head + h, i)) = lse;
    }
  }
  const std::uint8_t* fate_of(const slot& at, isize h) const { return at.fate + (selections > 1 ? h : 0) * ld_fate(); }

  score pool_of(slot& at, const kernel::kv_summary<float>& summary, isize block, isize head,
                kernel::key_set<float>& set) const {
    if (!rule.pool) return {};
    const isize past = rule.reach_of(block).past;
    set.k = summary.pooled(summary.pool_k, s.d), set.v = summary.pooled(summary.pool_v, s.e), set.count = past * parts;
    const isize most = rule.block_k / parts;
    for (isize x = 0; x <= most; ++x) at.logs[x] = x > 0 ? std::log2(static_cast<float>(x)) : none;
    for (isize x = 0; x < set.count; ++x) at.base[x] = at.logs[summary.members[x]];
    for (isize h = 0; h < s.group(); ++h) {
      const std::uint8_t* fate = fate_of(at, h);
      float* to = at.bias + h * set.count;
      if (parts == 1)
        for (isize J = 0; J < past; ++J) to[J] = fate[J] == kernel::pooled ? at.base[J] : none;
      else
        for (isize x = 0; x < set.count; ++x) to[x] = fate[x / parts] == kernel::pooled ? at.base[x] : none;
    }
    return token_bias{at.bias, set.count, head};
  }
  score kept_of(slot& at, const kernel::kv_summary<float>& summary, isize block, isize head,
                kernel::key_set<float>& set) const {
    set.count = rule.kept > 0 ? rule.start(block) / rule.stretch * rule.kept : 0;
    if (set.count == 0) return {};
    set.k = summary.kept(summary.kept_k, s.d), set.v = summary.kept(summary.kept_v, s.e);
    for (isize h = 0; h < s.group(); ++h)
      for (isize x = 0; x < set.count; ++x)
        at.kept_bias[h * set.count + x] =
            fate_of(at, h)[summary.small[x] / rule.block_k] == kernel::computed ? none : 0.0F;
    return token_bias{at.kept_bias, set.count, head};
  }

  /// Do heads [first, last) of the group choose so much in common that reading it together, a third dearer a block, is less?
  bool overlap(const slot& at, isize first, isize last) const {
    isize sum = 0, any = 0;
    for (isize h = first; h < last; ++h) sum += at.chosen[h].count;
    for (isize J = 0; J < ld_fate(); J += 8) {
      std::uint64_t in = 0, one = 0;
      for (isize h = first; h < last; ++h) std::memcpy(&one, at.fate + h * ld_fate() + J, 8), in |= one;
      any += std::popcount(in & 0x0101010101010101U);
    }
    return 4 * any < 3 * sum;
  }
  /// at.all: the blocks that heads [first, last) have chosen between them.
  hidden_blocks join_lists(slot& at, isize block, isize head, isize first, isize last) const {
    const isize seen = rule.reach_of(block).seen;
    std::int32_t* const list = at.lists + selections * rule.blocks();
    isize count = 0;
    for (isize J = 0; J < seen; ++J) {
      std::uint8_t any = 0;
      for (isize h = first; h < last; ++h) {
        const bool in = at.fate[h * ld_fate() + J] == kernel::computed;
        any |= in, at.hidden[h * ld_fate() + count] = in ? 0 : 1;
      }
      list[count] = static_cast<std::int32_t>(J), count += any;
    }
    at.all = {list, count};
    return {at.hidden, ld_fate(), head, rule.block_k, 0};
  }
  /// The listed blocks' keys before `end`, for rows [first, last) of the group, which `begin` has loaded.
  void chosen(slot& at, const kernel::key_set<float>& keys, const kernel::block_list& list, isize end, isize first,
              isize last, const hidden_blocks* apart) const {
    const isize size = rule.block_k;
    isize count = list.count;
    while (count > 0 && list.at[count - 1] * size >= end) --count;
    if (count == 0) return;
    const isize held = (count - 1) * size + std::min(size, end - list.at[count - 1] * size);
    const auto take = [&](kernel::key_set<float>& set, isize shift) {
      score hides;
      if (apart != nullptr) {
        hidden_blocks moved = *apart;
        moved.shift = shift, hides = moved, set.modify = &hides;
      }
      join(at, set, first, last);
    };
    kernel::key_set<float> set = keys;
    set.count = held;
    if (blocks_as_pages(keys.k, size, list, at.pages_k, set.k) &&
        blocks_as_pages(keys.v, size, list, at.pages_v, set.v))
      return take(set, 0);
    for (isize x = 0; x < held; x += set.count) {  // row by row into one stretch
      set.count = std::min(gather_keys(), held - x);
      set.k = gather(keys.k, list, x, set.count, s.d, at.k, at.k_scales);
      set.v = gather(keys.v, list, x, set.count, s.e, at.v, at.v_scales);
      take(set, x);
    }
  }
  row_source gather(const row_source& from, const kernel::block_list& list, isize first, isize count, isize width,
                    std::byte* to, float* scales) const {
    row_source r;
    const auto bytes = static_cast<std::size_t>(width) * size_of(from.type);
    r.data = to, r.type = from.type, r.row_bytes = static_cast<isize>(bytes), r.rotated = from.rotated;
    r.scales = from.type == dtype::i8 ? scales : nullptr, r.scale_row = from.scale_row;
    for (isize x = first; x < first + count; ++x, to += bytes, scales += from.scale_row) {
      const isize j = list.at[x / rule.block_k] * rule.block_k + x % rule.block_k;
      if (from.form != row_form::plain) {
        gather_codes(from, j, 1, width, reinterpret_cast<std::int8_t*>(to), width, scales);
        continue;
      }
      const stretch row = from.at(j);
      std::memcpy(to, row.data, bytes);
      for (isize y = 0; y < from.scale_row; ++y) scales[y] = row.scales[y];
    }
    return r;
  }

  void join(slot& at, const kernel::key_set<float>& set, isize first, isize last) const {
    at.run.run(set, 0, set.count, at.part_m, at.part_l, at.part_o);
    for (isize h = first; h < last; ++h) {
      const isize x = h - first;
      partial<float> all{at.m[h], at.l[h], at.o + h * s.e};
      merge(all, {at.part_m[x] * 0.69314718055994530942F, at.part_l[x], at.part_o + x * s.e}, s.e);
      at.m[h] = all.m, at.l[h] = all.l;
    }
  }

  const hybrid_attention& m;
  shape s;
  kernel::block_rule rule;
  isize parts, voters = 0, selections = 0, rows = 0;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
