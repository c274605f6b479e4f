// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention over a list of problems: one code path for views, states and KV stores, prefill and decoding mixed.

#include <fovea/kernel/decode_int8.hpp>
#include <fovea/softmax/int8.hpp>
#include <fovea/softmax/keys.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
class softmax_run {
  using cut = softmax_cut<Acc>;
  using few_loop = typename cut::few_loop;
  using block_loop = typename cut::block_loop;
  using codes_loop = kernel::decode_int8<simd::native>;

  /// Few rows over an int8 store: where the arithmetic is int8, the stored integers are multiplied as they are.
  static bool in_codes(const softmax_attention& m, const sequence_problem& p) {
    return std::is_same_v<Acc, float> && m.arithmetic == precision::int8 && kernel::takes_codes(p.kv.k) &&
           kernel::takes_codes(p.kv.v);
  }

  /// Scratch of one thread: one of the loops, and the rows of a decode step on their way out.
  struct slot {
    std::optional<block_loop> blocks;
    std::optional<few_loop> few;
    std::optional<codes_loop> codes;    // few rows over int8, in integers
    std::optional<int8_slot> integers;  // blocks, in integers; what they leave is done by `blocks`
    Acc* rows = nullptr;
    slot(arena memory, const softmax_attention& m, const sequence_problem& p, const cut& c, std::size_t& bytes) {
      const isize d = p.kv.d, e = p.kv.e;
      if (c.few) {
        if (in_codes(m, p))
          codes.emplace(memory, d, e);
        else
          few.emplace(memory, d, e);
        rows = memory.take<Acc>(few_loop::most_rows * (e + 2));
      } else {
        blocks.emplace(memory, c.rows, d, e);
        if constexpr (std::is_same_v<Acc, float>)
          if (in_int8(m, c)) integers.emplace(memory, c.rows, d, e);
      }
      bytes = memory.bytes();
    }
  };

 public:
  /// How a list is cut, and where its parts lie in memory.
  softmax_run(arena& memory, const softmax_attention& m, const problem_list& list, int threads)
      : count_(list.count()), heads_(memory, m, list, threads) {
    isize numbers = 0;
    for (isize s = 0; s < count_; ++s) {
      const sequence_problem p = list[s];
      const cut c = cut_of<Acc>(m, p);
      if (c.tasks() == 0) continue;
      numbers += c.partial_size(p.kv.e);
      std::size_t bytes = 0;
      slot({}, m, p, c, bytes);
      slot_bytes_ = bytes > slot_bytes_ ? bytes : slot_bytes_;
    }
    first_task_ = memory.take<isize>(count_ + 1);
    first_number_ = memory.take<isize>(count_);
    partials_ = memory.take<Acc>(numbers);
    slots_ = memory.take<std::byte>(static_cast<isize>(slot_bytes_) * threads);
  }

  void run(const softmax_attention& m, exec_ref exec, const problem_list& list) {
    isize split = 0;
    first_task_[0] = 0;
    for (isize s = 0, number = 0; s < count_; ++s) {
      const sequence_problem p = list[s];
      const cut c = cut_of<Acc>(m, p);
      first_task_[s + 1] = first_task_[s] + (in_int8(m, c) ? 0 : c.tasks());
      first_number_[s] = number;
      number += c.partial_size(p.kv.e), split += c.tasks() > 0 && c.pieces > 1 ? 1 : 0;
    }
    exec.for_tasks(first_task_[count_], [&](isize task, isize which) {
      const isize s = std::upper_bound(first_task_, first_task_ + count_ + 1, task) - first_task_ - 1;
      one(m, list[s], s, task - first_task_[s], which, nullptr);
    });
    if constexpr (std::is_same_v<Acc, float>)
      if (heads_.any()) in_integers(m, exec, list);
    if (split == 0) return;
    exec.for_tasks(count_, [&](isize s, isize) {
      const sequence_problem p = list[s];
      const cut c = cut_of<Acc>(m, p);
      if (c.tasks() == 0 || c.pieces == 1) return;
      const isize all = c.heads * c.rows;
      const softmax_partials<Acc> parts(partials_ + first_number_[s], all, c.pieces, p.kv.e);
      for (isize row = 0; row < all; ++row) finish_row(m, p, parts, c.pieces, row, row);
    });
  }

 private:
  arena memory_of(isize thread) const {
    return arena(std::span<std::byte>(slots_ + static_cast<std::size_t>(thread) * slot_bytes_, slot_bytes_));
  }

  void in_integers(const softmax_attention& m, exec_ref exec, const problem_list& list) {
    heads_.run(
        m, exec, list,
        [&](const sequence_problem& p, isize, isize g, isize x0, isize x1, kernel::int8_head& head, isize which) {
          std::size_t bytes = 0;
          slot own(memory_of(which), m, p, cut_of<Acc>(m, p), bytes);
          const problem_keys<float> keys(m, p, g);
          for (isize x = x0; x < x1; ++x) own.integers->rounding.block(keys.set, head, x);
        },
        [&](const sequence_problem& p, isize s, isize g, isize task, const kernel::int8_head& head, isize which) {
          const cut c = cut_of<Acc>(m, p);
          one(m, p, s, (task / c.pieces * c.heads + g) * c.pieces + task % c.pieces, which, &head);
        });
  }

  void one(const softmax_attention& m, const sequence_problem& p, isize s, isize task, isize which,
           const kernel::int8_head* head) noexcept {
    const cut c = cut_of<Acc>(m, p);
    // The last rows come first: under a causal mask they take longest, and no thread is left with them at the end. The heads of few
    // rows take a stretch of pages in turn: their rows lie side by side there, and so do the entries of the memory's page tables.
    const bool in_turn = c.few && p.kv.k.table != nullptr;
    const isize piece = in_turn ? task / c.heads : task % c.pieces,
                g = in_turn ? task % c.heads : task / c.pieces % c.heads,
                block = c.blocks - 1 - task / c.pieces / c.heads, last = (block + 1) * c.block,
                j0 = c.pieces == 1 ? 0 : piece * c.keys;
    std::size_t bytes = 0;
    slot own(memory_of(which), m, p, c, bytes);
    problem_keys<Acc> keys(m, p, g);
    keys.set.first = j0;
    if (c.pieces > 1 && j0 + c.keys < keys.set.count) keys.set.count = j0 + c.keys;
    const kernel::query_rows rows{p.q,
                                  0,
                                  g * p.group(),
                                  block * c.block,
                                  last < c.rows ? last : c.rows,
                                  m.turn,
                                  p.positions,
                                  p.kv.tokens() - p.q.length,
                                  p.kv.k.rotated};
    const double scale = m.scale_for({1, p.q.heads, p.kv.heads, p.q.length, p.kv.length, p.kv.d, p.kv.e, p.q.type});
    if (c.few) return few_rows(m, p, c, keys.set, rows, scale, partials_ + first_number_[s], piece, own);
    const rows_written to(p, c, rows, partials_ + first_number_[s], piece);
    const float* joined = c.pieces == 1 ? m.sinks : nullptr;
    const std::uint8_t* left = nullptr;
    if constexpr (std::is_same_v<Acc, float>)
      if (head != nullptr) {
        own.integers->attend.begin(rows, scale, joined, m.skip);
        if (own.integers->attend.in_floats(keys.set, *head, own.integers->left)) left = own.integers->left;
      }
    if (head == nullptr || left != nullptr) {
      own.blocks->begin(rows, scale, joined, to.out, head == nullptr ? m.skip : 0.0F);
      if (keys.set.count > keys.set.first) own.blocks->absorb(keys.set);
      own.blocks->finish(to.out, to.lse, head == nullptr ? p.skipped : tensor_mut{});
    }
    if constexpr (std::is_same_v<Acc, float>)
      if (head != nullptr) {
        if (keys.set.count > keys.set.first)
          own.integers->attend.attend(keys.set, *head, to.out, to.lse, p.skipped, left);
        else
          own.integers->attend.finish(to.out, to.lse, p.skipped, left);
      }
    to.weigh();
  }

  static void few_rows(const softmax_attention& m, const sequence_problem& p, const cut& c,
                       const kernel::key_set<Acc>& set, const kernel::query_rows& rows, double scale, Acc* numbers,
                       isize piece, slot& own) noexcept {
    constexpr Acc ln2 = static_cast<Acc>(0.69314718055994530942);
    const bool alone = c.pieces == 1;
    const softmax_partials<Acc> to(alone ? own.rows : numbers, alone ? c.rows : c.heads * c.rows, c.pieces, p.kv.e);
    const isize row = rows.first_head * p.q.length, at = alone ? 0 : piece * to.all + row;
    const auto run = [&](auto& loop) {
      loop.begin(rows, scale);
      loop.run(set, set.first, set.count, to.m + at, to.l + at, to.o + at * to.e);
    };
    if (own.few) run(*own.few);
    if constexpr (std::is_same_v<Acc, float>)
      if (own.codes) run(*own.codes);
    for (isize r = 0; r < c.rows; ++r) {
      to.m[at + r] *= ln2;
      if (p.skipped) *static_cast<float*>(p.skipped.row(0, (row + r) / p.q.length, (row + r) % p.q.length)) = 0;
    }
    for (isize r = 0; alone && r < c.rows; ++r) finish_row(m, p, to, 1, r, row + r);
  }

  /// Where the rows of a superblock go: the outputs, or one piece of a problem that is split over its keys.
  struct rows_written {
    tensor_mut out, lse;
    Acc *m = nullptr, *l = nullptr;  // of the piece
    isize first = 0, last = 0;

    rows_written(const sequence_problem& p, const cut& c, const kernel::query_rows& rows, Acc* numbers, isize piece)
        : out(p.out), lse(p.lse) {
      if (c.pieces == 1) return;
      const isize n = p.q.length, H = p.q.heads, e = p.kv.e, row = rows.first_head * n;
      const softmax_partials<Acc> to(numbers, c.heads * c.rows, c.pieces, e);
      const isize at = piece * to.all;
      out = {to.o + at * e, dtype_of<Acc>, 1, H, n, e, H * n * e, n * e, e};
      lse = {to.m + at, dtype_of<Acc>, 1, H, n, 1, H * n, n, 1};
      m = to.m + at, l = to.l + at, first = row + rows.first, last = row + rows.last;
    }
    /// A normalised row with its log-sum-exp is a partial as well: (lse, 1, o).
    void weigh() const noexcept {
      for (isize r = first; r < last; ++r) l[r] = m[r] == -std::numeric_limits<Acc>::infinity() ? Acc(0) : Acc(1);
    }
  };

  isize count_;
  int8_heads heads_;
  std::size_t slot_bytes_ = 0;
  isize *first_task_, *first_number_;
  Acc* partials_;
  std::byte* slots_;
};

template <class Acc>
std::size_t softmax_workspace(const softmax_attention& m, const problem_list& list, int threads) {
  arena measure;
  softmax_run<Acc>(measure, m, list, threads);
  return measure.bytes();
}
template <class Acc>
void attend(const softmax_attention& m, exec_ref exec, const problem_list& list, arena scratch);
#if FOVEA_DEFINES_LOOPS
template <class Acc>
void attend(const softmax_attention& m, exec_ref exec, const problem_list& list, arena scratch) {
  softmax_run<Acc>(scratch, m, list, exec.concurrency()).run(m, exec, list);
}
FOVEA_INSTANTIATE(template void attend<float>(const softmax_attention&, exec_ref, const problem_list&, arena);
                  template void attend<double>(const softmax_attention&, exec_ref, const problem_list&, arena);)
#endif

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
