// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention in int8: the heads of a list of problems, rounded a few at a time, and their superblocks.
///
///   for some KV heads (1, or 2 a thread):  round keys and values, in tasks of some blocks;  then attend, in tasks of superblocks
///
/// Contract   a head is rounded by itself and read by its own tasks: bits depend neither on threads nor on what else is in the list.
/// Cost       m (d + e + 30) bytes of scratch for each head that is held.

#include <fovea/kernel/int8_softmax.hpp>
#include <fovea/softmax/step.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Is this problem computed in int8? Few rows are not: decoding reads what is stored (softmax/prefill.hpp).
template <class Acc>
bool in_int8(const softmax_attention& m, const softmax_cut<Acc>& c) {
  return std::is_same_v<Acc, float> && m.arithmetic == precision::int8 && !c.few && c.tasks() > 0;
}

/// How a problem is cut for m: what skips goes over all keys of a row in one piece.
template <class Acc>
softmax_cut<Acc> cut_of(const softmax_attention& m, const sequence_problem& p) {
  softmax_cut<Acc> c(p);
  if (m.skip > 0 && !c.few) c.pieces = 1, c.keys = PTRDIFF_MAX;
  return c;
}

/// What a thread needs: to round, to attend, and to say which rows it leaves to the loop in f32.
struct int8_slot {
  static constexpr kernel::int8_recipe recipe{};
  using loop = kernel::int8_softmax<simd::native, recipe>;
  kernel::detail::int8_rounding<simd::native, recipe> rounding;
  loop attend;
  std::uint8_t* left;

  int8_slot(arena& memory, isize rows, isize d, isize e)
      : rounding(memory, d, e),
        attend(memory, rows, d, e),
        left(memory.take<std::uint8_t>(loop::superblock(rows, d, e))) {}
};

inline kernel::int8_head int8_head_of(arena& memory, const sequence_problem& p) {
  return {memory, p.kv.length, p.kv.d, p.kv.e, int8_slot::recipe.keys, int8_slot::recipe.fold};
}

/// The KV heads of those problems of a list that are computed in int8, some of them at a time.
class int8_heads {
 public:
  static constexpr isize blocks_of_task = 8;

  int8_heads(arena& memory, const softmax_attention& m, const problem_list& list, int threads) : count_(list.count()) {
    isize all = 0;
    for (isize s = 0; m.arithmetic == precision::int8 && s < count_; ++s) {
      const sequence_problem p = list[s];
      const softmax_cut<float> c(p);
      if (!in_int8(m, c)) continue;
      arena head;
      int8_head_of(head, p);
      all += c.heads, bytes_ = head.bytes() > bytes_ ? head.bytes() : bytes_;
    }
    const isize held = threads == 1 ? 1 : 2 * isize{threads};
    held_ = held < all ? held : all;
    memory_ = memory.take<std::byte>(held_ * static_cast<isize>(bytes_));
    first_head_ = memory.take<isize>(all > 0 ? count_ + 1 : 0), first_task_ = memory.take<isize>(held_ + 1);
  }
  bool any() const { return held_ > 0; }

  /// round(p, s, g, x0, x1, head, slot): blocks [x0, x1) of head g of problem s; then attend(p, s, g, task, head, slot).
  template <class Round, class Attend>
  void run(const softmax_attention& m, exec_ref exec, const problem_list& list, const Round& round,
           const Attend& attend) {
    first_head_[0] = 0;
    for (isize s = 0; s < count_; ++s) {
      const softmax_cut<float> c = cut_of<float>(m, list[s]);
      first_head_[s + 1] = first_head_[s] + (in_int8(m, c) ? c.heads : 0);
    }
    for (isize first = 0; first < first_head_[count_]; first += held_) {
      const isize left = first_head_[count_] - first, now = left < held_ ? left : held_;
      const auto each = [&](const auto& tasks_of, const auto& task) {
        first_task_[0] = 0;
        for (isize i = 0; i < now; ++i) first_task_[i + 1] = first_task_[i] + tasks_of(list[problem(first + i)]);
        exec.for_tasks(first_task_[now], [&](isize t, isize slot) {
          const isize i = std::upper_bound(first_task_, first_task_ + now + 1, t) - first_task_ - 1;
          const isize s = problem(first + i);
          const sequence_problem p = list[s];
          arena own(std::span<std::byte>(memory_ + static_cast<std::size_t>(i) * bytes_, bytes_));
          kernel::int8_head head = int8_head_of(own, p);
          task(p, s, first + i - first_head_[s], t - first_task_[i], head, slot);
        });
      };
      each(
          [&](const sequence_problem& p) {
            return ceil_div(ceil_div(p.kv.length, int8_slot::recipe.keys), blocks_of_task);
          },
          [&](const sequence_problem& p, isize s, isize g, isize t, kernel::int8_head& head, isize slot) {
            const isize x0 = t * blocks_of_task, x1 = x0 + blocks_of_task;
            round(p, s, g, x0, x1 < head.blocks ? x1 : head.blocks, head, slot);
          });
      each(
          [&](const sequence_problem& p) {
            const softmax_cut<float> c = cut_of<float>(m, p);
            return c.blocks * c.pieces;
          },
          attend);
    }
  }

 private:
  isize problem(isize head) const {
    return std::upper_bound(first_head_, first_head_ + count_ + 1, head) - first_head_ - 1;
  }

  isize count_, held_ = 0;
  std::size_t bytes_ = 0;
  std::byte* memory_;
  isize *first_head_, *first_task_;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
