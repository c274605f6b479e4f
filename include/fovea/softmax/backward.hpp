// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention, backward: from a checked problem to tasks over KV heads and stretches of their keys.
///
///   dS_ij = p_ij (do_i . v_j - do_i . o_i) slope_ij
///   dq_i = scale sum_j dS_ij k_j,   dk_j = scale sum_i dS_ij q_i,   dv_j = sum_i p_ij do_i,   dsink_h = -sum_i e^(sink_h - lse_i) do_i . o_i
///
/// A head's keys are cut into 1, 2, 4 or 8 pieces by m alone. A task owns some of them: their dK and dV, and its sum of dQ. Where a
/// head has several tasks (more threads than heads) these sums are joined as the same tree that one task would have built.
///
/// Contract   a row that sees nothing gives zeros and adds nothing. dbias and dsinks are float, whatever the storage type.
/// Cost       10 d flops (d = e) for each visible pair; dbias: as much as the forward pass again, no faster than one thread for each
///            row, key or head that the table has. Memory: dK and dV once a thread, dQ for each task of a head where there are several.

#include <fovea/core/backward.hpp>
#include <fovea/kernel/softmax_backward.hpp>
#include <fovea/softmax/keys.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct softmax_backward_run {
  using loop = kernel::softmax_backward<simd::native, Acc>;
  static constexpr isize most_pieces = 8, least_keys = 512;  // of a piece

  const softmax_attention& m;
  exec_ref exec;
  const backward_problem& p;
  shape s;
  double scale;

  struct plan {
    isize pieces, keys, parts;  // pieces of a head, keys of a piece, tasks of a head
    plan(const shape& s, int threads) : pieces(1), parts(1) {
      while (pieces < most_pieces && s.m >= 2 * pieces * least_keys) pieces *= 2;
      keys = ceil_div(ceil_div(s.m, pieces), loop::keys) * loop::keys;
      while (threads > 1 && parts < pieces && s.B * s.G * parts < 4 * threads) parts *= 2;
    }
    isize pieces_of_task() const { return pieces / parts; }
    int levels() const { return std::countr_zero(static_cast<unsigned>(pieces_of_task())); }
  };

  struct slot {
    loop run;
    Acc *dk, *dv, *rows;  // dk, dv: accumulators of a task's keys
    slot(arena& memory, const softmax_attention& m, const shape& s, const plan& at)
        : run(memory, s.group() * s.n, s.d, s.e, at.levels(), static_cast<bool>(m.score)) {
      const isize keys = at.keys * at.pieces_of_task();
      dk = memory.take<Acc>(keys * loop::padded(s.d)), dv = memory.take<Acc>(keys * loop::padded(s.e));
      rows = memory.take<Acc>(2 * s.e);
    }
  };
  static std::size_t slot_bytes(const softmax_attention& m, const shape& s, const plan& at) {
    arena measure;
    slot(measure, m, s, at);
    return measure.bytes();
  }
  struct layout {
    plan at;
    std::size_t slot_size;
    std::byte* slots;
    Acc* partial;  // [parts][B, H, n, d] sums of dQ, where a head has several tasks
    layout(arena& memory, const softmax_attention& m, const shape& s, int threads)
        : at(s, threads), slot_size(slot_bytes(m, s, at)) {
      slots = memory.take<std::byte>(static_cast<isize>(slot_size) * threads);
      partial = memory.take<Acc>(at.parts > 1 ? at.parts * s.B * s.H * s.n * s.d : 0);
    }
    arena memory_of(isize which) const {
      return arena(std::span<std::byte>(slots + static_cast<std::size_t>(which) * slot_size, slot_size));
    }
  };

  static std::size_t workspace_size(const softmax_attention& m, const shape& s, int threads) {
    arena measure;
    layout(measure, m, s, threads);
    return measure.bytes();
  }

  static void backward(const softmax_attention& m, exec_ref exec, const backward_problem& p, arena scratch) {
    const shape s = p.shape();
    const layout memory(scratch, m, s, exec.concurrency());
    const softmax_backward_run run{m, exec, p, s, m.scale_for(s)};
    if (p.to.dq || p.to.dk || p.to.dv) run.rows_and_keys(memory);
    if (p.to.dsinks != nullptr) run.sinks(memory);
    if (p.to.dbias != nullptr) run.bias(memory);
  }

 private:
  void rows_and_keys(const layout& memory) const {
    const isize heads = s.B * s.G;
    // The first keys come first: under a causal mask most rows see them, and no thread is left with them at the end.
    exec.for_tasks(heads * memory.at.parts, [&](isize task, isize which) {
      one_task(memory, task / heads, task % heads / s.G, task % heads % s.G, which);
    });
    if (memory.at.parts == 1 || !p.to.dq) return;
    constexpr isize rows = 64;
    const isize blocks = ceil_div(s.n, rows);
    exec.for_tasks(s.B * s.H * blocks, [&](isize task, isize) {
      const isize head = task / blocks, first = task % blocks * rows, last = first + rows < s.n ? first + rows : s.n;
      for (isize i = first; i < last; ++i) join(memory, head, i);
    });
  }

  void one_task(const layout& memory, isize part, isize b, isize g, isize which) const {
    arena room = memory.memory_of(which);
    slot own(room, m, s, memory.at);
    const plan& at = memory.at;
    const isize j0 = part * at.pieces_of_task() * at.keys < s.m ? part * at.pieces_of_task() * at.keys : s.m,
                j1 =
                    (part + 1) * at.pieces_of_task() * at.keys < s.m ? (part + 1) * at.pieces_of_task() * at.keys : s.m;
    const isize dk_ld = loop::padded(s.d), dv_ld = loop::padded(s.e);
    for (isize x = 0; x < (j1 - j0) * dk_ld; ++x) own.dk[x] = Acc(0);
    for (isize x = 0; x < (j1 - j0) * dv_ld; ++x) own.dv[x] = Acc(0);
    const auto keys = softmax_keys<Acc>(m, p.forward(), b, g);
    const isize rows = s.group() * s.n, block = loop::superblock(rows, s.d, s.e);
    for (isize r = 0; r < rows; r += block) {
      begin(own.run, b, g * s.group(), r, r + block < rows ? r + block : rows,
            {static_cast<bool>(p.to.dq), static_cast<bool>(p.to.dk), static_cast<bool>(p.to.dv)});
      for (isize x = 0; x < at.pieces_of_task(); ++x) {
        const isize first = j0 + x * at.keys < j1 ? j0 + x * at.keys : j1,
                    last = first + at.keys < j1 ? first + at.keys : j1;
        own.run.begin_piece();
        own.run.absorb(keys, first, last, own.dk + (first - j0) * dk_ld, own.dv + (first - j0) * dv_ld);
        own.run.end_piece(x);
        if (x + 1 < at.pieces_of_task()) own.run.keep_piece();
      }
      if (!p.to.dq) continue;
      if (at.parts == 1)
        own.run.finish(p.to.dq, static_cast<Acc>(scale));
      else
        own.run.finish(partial_view(memory, part), Acc(1));
    }
    if (p.to.dk) store(p.to.dk, b, g, j0, j1, own.dk, dk_ld, static_cast<Acc>(scale));
    if (p.to.dv) store(p.to.dv, b, g, j0, j1, own.dv, dv_ld, Acc(1));
  }

  void begin(loop& run, isize b, isize first_head, isize first, isize last,
             const kernel::wanted_gradients& want) const {
    run.begin({p.q, b, first_head, first, last}, p.out, p.lse, p.dout, scale, want);
  }
  tensor_mut partial_view(const layout& memory, isize part) const {
    const isize head = s.n * s.d;
    return {memory.partial + part * s.B * s.H * head, dtype_of<Acc>, s.B, s.H, s.n, s.d, s.H * head, head, s.d};
  }
  static void store(const tensor_mut& to, isize b, isize g, isize j0, isize j1, Acc* from, isize ld, Acc factor) {
    for (isize j = j0; j < j1; ++j, from += ld) {
      for (isize c = 0; c < to.width; ++c) from[c] *= factor;
      simd::store_row<simd::native, Acc>(to.type, from, to.width, to.row(b, g, j));
    }
  }
  /// dq of one row from the sums of its head's tasks.
  void join(const layout& memory, isize head, isize i) const {
    const isize step = s.B * s.H * s.n * s.d, parts = memory.at.parts;
    Acc* row = memory.partial + (head * s.n + i) * s.d;
    for (isize size = 1; size < parts; size *= 2)
      for (isize x = 0; x < parts; x += 2 * size)
        for (isize c = 0; c < s.d; ++c) row[x * step + c] = row[x * step + c] + row[(x + size) * step + c];
    for (isize c = 0; c < s.d; ++c) row[c] *= static_cast<Acc>(scale);
    simd::store_row<simd::native, Acc>(p.to.dq.type, row, s.d, p.to.dq.row(head / s.H, head % s.H, i));
  }

  void sinks(const layout& memory) const {
    exec.for_tasks(s.H, [&](isize h, isize which) {
      arena room = memory.memory_of(which);
      slot own(room, m, s, memory.at);
      const double sink = static_cast<double>(m.sinks[h]), none = -std::numeric_limits<double>::infinity();
      double sum = 0;
      for (isize b = 0; b < s.B; ++b)
        for (isize i = 0; i < s.n; ++i) {
          const double lse = static_cast<double>(*static_cast<const Acc*>(p.lse.row(b, h, i)));
          if (lse == none || sink == none) continue;
          const Acc* o = simd::row_as<simd::native, Acc>(p.out.type, p.out.row(b, h, i), s.e, own.rows);
          const Acc* g = simd::row_as<simd::native, Acc>(p.dout.type, p.dout.row(b, h, i), s.e, own.rows + s.e);
          double delta = 0;
          for (isize c = 0; c < s.e; ++c) delta += static_cast<double>(o[c]) * static_cast<double>(g[c]);
          sum -= std::exp(sink - lse) * delta;
        }
      p.to.dsinks[h] = static_cast<float>(sum);
    });
  }

  /// Tasks along the axis on which pairs never share an element of the table; each sums over everything else in order.
  void bias(const layout& memory) const {
    const table_axis axis = m.score.axis(m.site(s, 0));
    const isize size = axis == table_axis::rows   ? 128
                       : axis == table_axis::keys ? least_keys
                                                  : 1,
                length = axis == table_axis::heads  ? s.H
                         : axis == table_axis::rows ? s.n
                         : axis == table_axis::keys ? s.m
                                                    : 1;
    const auto cut = [&](table_axis x, isize task, isize all) {
      if (axis != x) return range{0, all};
      return range{task * size, task * size + size < all ? task * size + size : all};
    };
    exec.for_tasks(ceil_div(length, size), [&](isize task, isize which) {
      bias_task(memory, cut(table_axis::heads, task, s.H), cut(table_axis::rows, task, s.n),
                cut(table_axis::keys, task, s.m), which);
    });
  }
  void bias_task(const layout& memory, range heads, range rows, range keys, isize which) const {
    arena room = memory.memory_of(which);
    slot own(room, m, s, memory.at);
    const auto every = [&](auto&& f) {
      for (isize b = 0; b < s.B; ++b)
        for (isize h = heads.first; h < heads.last; ++h) f(b, h);
    };
    every([&](isize b, isize h) {
      mask_site at = m.site(s, b);
      at.h = h;
      m.score.clear_gradient(at, {rows.first, rows.last - rows.first, keys.first, keys.last, 0}, p.to.dbias);
    });
    const isize block = loop::superblock(rows.last - rows.first, s.d, s.e);
    every([&](isize b, isize h) {
      const isize g = h / s.group(), above = h % s.group() * s.n;
      const auto set = softmax_keys<Acc>(m, p.forward(), b, g);
      for (isize i = rows.first; i < rows.last; i += block) {
        const isize last = i + block < rows.last ? i + block : rows.last;
        begin(own.run, b, g * s.group(), above + i, above + last, {});
        own.run.add_table(set, keys.first, keys.last, p.to.dbias);
      }
    });
  }
};

}  // namespace detail

inline void softmax_attention::check(const backward_problem& p) const {
  detail::check_backward(p);
  check_values(p.shape());
  require(arithmetic == precision::f32, "arithmetic is ", name_of(arithmetic),
          "; gradients are those of the exact function: set precision::f32");
  require(skip == 0, "skip is ", skip, "; gradients are those of the exact function: set skip to 0");
  require(turn == nullptr, "turn is set; backward takes q and k as they come turned, and gives the gradients of those");
  require(
      score.has_slope(),
      "the score of this softmax_attention has no member `slope`, d(new) / d(old); backward needs one in each policy");
  require(
      p.to.dbias == nullptr || score.has_table(),
      "dbias was asked for; the score adds no table that it says the slots of (additive_bias does), or two of them");
  require(p.to.dsinks == nullptr || sinks != nullptr, "dsinks was asked for; this softmax_attention has no sinks");
}

inline std::size_t softmax_attention::workspace_size_backward(const shape& s, int threads) const {
  return s.type == dtype::f64 ? detail::softmax_backward_run<double>::workspace_size(*this, s, threads)
                              : detail::softmax_backward_run<float>::workspace_size(*this, s, threads);
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void softmax_attention::backward(exec_ref exec, const backward_problem& p, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::softmax_backward_run<double>::backward(*this, exec, p, scratch);
  else
    detail::softmax_backward_run<float>::backward(*this, exec, p, scratch);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
