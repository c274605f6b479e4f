// SPDX-License-Identifier: MIT
#pragma once
/// @file  From the gradients of slots back to the rows that were projected, and to the numbers of the projection.
///
///   linear  dx_i = sum_s E_is dP_s,   dE_is = sum x_i . dP_s         conv  dx_i = w_t dP_s,   dw_t = sum x_(s taps + t) . dP_s
///   mean    dx_i = dP_s / rows of s                                  max   dx_ic = dP_sc for the first row that holds the maximum, else 0
///
/// Contract   sums go over items, heads and, in the causal form, blocks, in that order for any number of threads. Rows behind a length are
///            not read and get zeros. dE and dF are float, dense in the shapes of E and F (rows that no key reached: zero), [taps] for conv.
/// Cost       linear: 2 slots (d + e) multiply-adds a row and KV head; the others read each row once or twice.

#include <algorithm>
#include <cstdint>

#include <fovea/core/backward.hpp>
#include <fovea/kernel/linear_backward_pairs.hpp>
#include <fovea/linformer/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Rows of a head that are projected together: the keys of an item, or a block of the causal form; the open block at the end feeds none.
struct projected_stretch {
  isize first = 0, rows = 0;  // of the head
  isize fed = 0;              // rows that are projected
  isize slot = 0, used = 0;   // of the head's slots
};
class linformer_stretches {
 public:
  linformer_stretches(const linformer_attention& m, const shape& s)
      : m_(m), rows_(s.m), blocks_(m.causal && s.m > 0 ? (s.m - 1) / m.block : 0) {}
  isize count() const { return m_.causal ? blocks_ + 1 : 1; }
  isize longest() const { return m_.causal ? std::min(m_.block, rows_) : rows_; }
  projected_stretch at(isize b, isize x) const {
    const isize fed = m_.causal ? m_.block : m_.keys_of(b, rows_), used = m_.map(false, 0).used(fed);
    if (!m_.causal) return {0, rows_, fed, 0, used};
    if (x == blocks_) return {x * m_.block, rows_ - x * m_.block, 0, x * used, 0};
    return {x * m_.block, m_.block, fed, x * used, used};
  }

 private:
  const linformer_attention& m_;
  isize rows_, blocks_;
};

template <class Acc>
class projection_backward {
  using native = simd::native;
  using kind = sequence_projection;
  static constexpr isize block = 64;

 public:
  /// Of keys, or of values.
  struct side {
    const tensor_ref* x;
    tensor_mut dx;
    const Acc* slots;  // gradients by the slots, [heads, slot_rows, width]
    const Acc* own;    // what else the rows got, [heads, m, width]; null: nothing
  };

  projection_backward(arena& memory, const linformer_attention& m, const shape& s, isize slot_rows, int threads)
      : m_(m), s_(s), stretches_(m, s), heads_(s.B * s.G), slot_rows_(slot_rows) {
    const bool linear = m.projection == kind::linear;
    slots_ = linear ? m.slots_for() : 0, taps_ = static_cast<isize>(m.wk.size());
    for (const int x : {0, 1}) {
      const isize all = heads_ * slot_rows * (x == 0 ? s.d : s.e);
      turned_[x] = memory.take<Acc>(linear ? all : 0);
      first_[x] = memory.take<std::int32_t>(m.projection == kind::max ? all : 0);
    }
    sums_ = memory.take<double>(2 * heads_ * taps_);
    piece_ = 2 * block * (std::max(s.d, s.e) + slots_);
    pieces_ = memory.take<Acc>(piece_ * threads);
  }

  void run(exec_ref exec, const side (&sides)[2], float* dE, float* dF) const {
    if (m_.projection == kind::max)
      exec.for_tasks(heads_ * stretches_.count(), [&](isize task, isize slot) {
        for (const int x : {0, 1}) find_first(sides, x, task / stretches_.count(), task % stretches_.count(), slot);
      });
    const isize chunks = ceil_div(stretches_.longest(), block), each = stretches_.count() * chunks;
    exec.for_tasks(heads_ * each, [&](isize task, isize slot) {
      for (const int x : {0, 1})
        if (sides[x].dx)
          rows_back(sides[x], x, task / each, task % each / chunks, task % chunks * block, pieces_ + slot * piece_);
    });
    if (dE == nullptr && dF == nullptr) return;
    if (m_.projection == kind::linear) return matrices(exec, sides, dE, dF);
    exec.for_tasks(2 * heads_, [&](isize task, isize slot) {
      sum_taps(sides[task % 2], task / 2, sums_ + task * taps_, pieces_ + slot * piece_);
    });
    const bool apart = !m_.wv.empty();
    for (isize t = 0; t < taps_; ++t) {
      double of[2] = {};
      for (isize task = 0; task < 2 * heads_; ++task) of[apart ? task % 2 : 0] += sums_[task * taps_ + t];
      if (dE != nullptr) dE[t] = static_cast<float>(of[0]);
      if (dF != nullptr) dF[t] = static_cast<float>(of[1]);
    }
  }

 private:
  isize at_slot(isize head, isize slot) const { return head * slot_rows_ + slot; }
  const Acc* row_of(const side& x, isize head, isize i, Acc* room) const {
    return simd::row_as<native, Acc>(x.x->type, x.x->row(head / s_.G, head % s_.G, i), x.x->width, room);
  }

  /// Which row of its window holds the largest number of each column of a slot, the first of equals.
  void find_first(const side (&sides)[2], int which, isize head, isize stretch, isize slot) const {
    const side& x = sides[which];
    const projected_stretch at = stretches_.at(head / s_.G, stretch);
    const isize width = x.x->width;
    Acc *room = pieces_ + slot * piece_, *top = room + width;
    for (isize s = 0; s < at.used; ++s) {
      const range w = m_.map(false, 0).window(s, at.fed);
      std::int32_t* first = first_[which] + at_slot(head, at.slot + s) * width;
      for (isize i = w.first; i < w.last; ++i) {
        const Acc* row = row_of(x, head, at.first + i, room);
        for (isize c = 0; c < width; ++c)
          if (i == w.first || row[c] > top[c]) top[c] = row[c], first[c] = static_cast<std::int32_t>(i);
      }
    }
  }

  /// Rows [from, from + 64) of a stretch.
  void rows_back(const side& x, int which, isize head, isize stretch, isize from, Acc* room) const {
    const projected_stretch at = stretches_.at(head / s_.G, stretch);
    const isize width = x.x->width, count = std::min(block, at.rows - from), fed = std::min(count, at.fed - from);
    if (count <= 0) return;
    Acc* out = room;
    std::fill_n(out, count * width, Acc(0));
    const Acc* slots = x.slots + at_slot(head, at.slot) * width;
    if (fed > 0 && m_.projection == kind::linear) {
      Acc* weights = room + block * width;
      load(which != 0, head % s_.G, from, fed, weights);
      tile::gemm<native, Acc>(fed, width, slots_, weights, slots_, 1, slots, width, out, width, false);
    } else if (fed > 0) {
      windows_back(at, which, head, from, fed, slots, width, out);
    }
    const Acc* own = x.own == nullptr ? nullptr : x.own + (head * s_.m + at.first + from) * width;
    for (isize y = 0; own != nullptr && y < count * width; ++y) out[y] += own[y];
    for (isize i = 0; i < count; ++i)
      simd::store_row<native, Acc>(x.dx.type, out + i * width, width,
                                   x.dx.row(head / s_.G, head % s_.G, at.first + from + i));
  }
  void windows_back(const projected_stretch& at, int which, isize head, isize from, isize fed, const Acc* slots,
                    isize width, Acc* out) const {
    const kernel::projection map = m_.map(which != 0, 0);
    const isize first =
        m_.projection == kind::conv ? from / taps_ : from * at.used / at.fed;  // none before it meets them
    for (isize s = first; s < at.used && map.window(s, at.fed).first < from + fed; ++s) {
      const range w = map.window(s, at.fed), own = meet(w, {from, from + fed});
      const Acc* d = slots + s * width;
      const std::int32_t* largest = first_[which] + at_slot(head, at.slot + s) * width;
      for (isize i = own.first; i < own.last; ++i) {
        Acc* row = out + (i - from) * width;
        if (m_.projection == kind::max) {
          for (isize c = 0; c < width; ++c) row[c] += largest[c] == i ? d[c] : Acc(0);
          continue;
        }
        const Acc weight = m_.projection == kind::conv ? static_cast<Acc>(map.weights[i - w.first])
                                                       : Acc(1) / static_cast<Acc>(w.last - w.first);
        for (isize c = 0; c < width; ++c) row[c] += weight * d[c];
      }
    }
  }

  /// Rows of E or F as Acc, [count][slots].
  void load(bool values, isize g, isize first, isize count, Acc* to) const {
    const auto& E = matrix(values);
    for (isize i = 0; i < count; ++i)
      for (isize s = 0; s < slots_; ++s) to[i * slots_ + s] = static_cast<Acc>(E(0, head_of(E, g), first + i, s));
  }
  const view<const float>& matrix(bool values) const { return values && m_.F.data != nullptr ? m_.F : m_.E; }
  static isize head_of(const view<const float>& E, isize g) { return E.heads == 1 ? 0 : g; }

  void matrices(exec_ref exec, const side (&sides)[2], float* dE, float* dF) const {
    const isize each = stretches_.count();
    exec.for_tasks(heads_ * each, [&](isize task, isize) {
      const isize head = task / each, first = at_slot(head, stretches_.at(head / s_.G, task % each).slot);
      const bool open = stretches_.at(head / s_.G, task % each).used == 0;
      for (int x = 0; x < 2 && !open; ++x) {
        const isize width = sides[x].x->width;
        kernel::chunk_pairs<native, Acc>::turn(sides[x].slots + first * width, slots_, width, width,
                                               turned_[x] + first * width, slots_);
      }
    });
    const bool apart = m_.F.data != nullptr;
    for (const int x : {0, 1}) {
      float* to = x == 0 ? dE : dF;
      if (to == nullptr) continue;
      const auto& E = x == 0 ? m_.E : m_.F;
      const isize chunks = ceil_div(E.length, block);
      exec.for_tasks(E.heads * chunks, [&](isize task, isize slot) {
        Acc *room = pieces_ + slot * piece_, *sum = room + block * std::max(s_.d, s_.e);
        const isize first = task % chunks * block, count = std::min(block, E.length - first);
        std::fill_n(sum, count * slots_, Acc(0));
        for (int of = x; of < (x == 0 && !apart ? 2 : x + 1); ++of)
          add_matrix(sides[of], of, task / chunks, E, first, room, sum);
        float* rows = to + (task / chunks * E.length + first) * slots_;
        for (isize y = 0; y < count * slots_; ++y) rows[y] = static_cast<float>(sum[y]);
      });
    }
  }
  /// sum += rows [first, first + 64) of the gradient of E's head, by one side.
  void add_matrix(const side& x, int which, isize of, const view<const float>& E, isize first, Acc* room,
                  Acc* sum) const {
    const isize width = x.x->width;
    for (isize head = 0; head < heads_; ++head)
      for (isize y = 0; head_of(E, head % s_.G) == of && y < stretches_.count(); ++y) {
        const projected_stretch at = stretches_.at(head / s_.G, y);
        const isize fed = std::min(block, at.fed - first);
        if (fed <= 0) continue;
        for (isize i = 0; i < fed; ++i)
          simd::load_row<native, Acc>(x.x->type, x.x->row(head / s_.G, head % s_.G, at.first + first + i), width,
                                      room + i * width);
        tile::gemm<native, Acc>(fed, slots_, width, room, width, 1, turned_[which] + at_slot(head, at.slot) * width,
                                slots_, sum, slots_, true);
      }
  }

  /// Gradients of the taps by one head.
  void sum_taps(const side& x, isize head, double* sums, Acc* room) const {
    using P = simd::pack<Acc, native>;
    const isize width = x.x->width;
    std::fill_n(sums, taps_, 0.0);
    for (isize y = 0; y < stretches_.count(); ++y) {
      const projected_stretch at = stretches_.at(head / s_.G, y);
      for (isize i = 0; i < at.fed; ++i) {
        const Acc *row = row_of(x, head, at.first + i, room), *d = x.slots + at_slot(head, at.slot + i / taps_) * width;
        P sum(Acc(0));
        for (isize c = 0; c < width; c += P::size)
          sum = simd::fma(simd::load_n<P>(row + c, width - c), simd::load_n<P>(d + c, width - c), sum);
        sums[i % taps_] += static_cast<double>(simd::reduce_add(sum));
      }
    }
  }

  const linformer_attention& m_;
  shape s_;
  linformer_stretches stretches_;
  isize heads_, slot_rows_, slots_, taps_, piece_;
  Acc *turned_[2], *pieces_;
  std::int32_t* first_[2];  // of max: rows within their stretch
  double* sums_;            // of conv: [heads, keys or values, taps]
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
