// SPDX-License-Identifier: MIT
#pragma once
/// @file  Gradients of exact softmax attention for a superblock of query rows and a stretch of keys of one KV head.
///
///   P = 2^(S - lse),  dP = dO V^T,  dS = P (dP - delta),  delta_i = do_i . o_i       S^T, dP^T [keys x rows] as in the forward pass
///   dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS                                      five products, none of P or dS turned
///
/// Queries lie along the vector lanes in S, dP and dQ; dK and dV have their columns there and sum over `chunk` tiles of rows at a time,
/// with P and dS as broadcast scalars. Q and dO are turned once for each superblock and kept both ways.
///
/// Contract   begin, then for each of a power of two of pieces: begin_piece, absorb over its blocks, end_piece; then finish. dk, dv
///            are [keys][ld] accumulators that absorb adds to; dK lacks the factor `scale`. Lanes and rows without a share add nothing.
/// Cost       10 d flops (d = e) for each visible pair; scratch depends on neither n nor m.
/// Numerics   partial sums of dQ over pieces are joined as a binary tree: the bits do not depend on which thread had which.
/// Reference  softmax/reference_backward.hpp.      Source  Dao et al., FlashAttention (2022), appendix B.

#include <fovea/kernel/softmax_backward_panels.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

struct wanted_gradients {
  bool dq = false, dk = false, dv = false;
};

template <class Arch, class Acc>
class softmax_backward {
  using T = detail::gradient_tile<Arch, Acc>;
  using tiles = query_tiles<Arch, Acc>;
  static constexpr isize R = T::rows, W = T::W;

 public:
  static constexpr isize keys = T::keys;                                // of a block
  static constexpr isize chunk = R >= 128 ? 1 : R <= 16 ? 8 : 128 / R;  // tiles that dK and dV sum over at a time
  // ld of P and dS: an odd number of cache lines, so that the rows of a tile fill L1 evenly
  static constexpr isize ld = chunk * R + W, most_panels = (keys + T::MR - 1) / T::MR;
  static constexpr isize row_bytes = 512 << 10;  // what a superblock may take of L2

  /// Rows of a superblock: Q, dO twice and dQ within row_bytes, whole chunks.
  static isize superblock(isize rows, isize d, isize e) {
    isize most = 512;
    while (most > chunk * R && most * (3 * d + 2 * e) * static_cast<isize>(sizeof(Acc)) > row_bytes) most /= 2;
    most = most < chunk * R ? chunk * R : most;
    return rows < most ? ceil_div(rows, R) * R : most;
  }
  static isize padded(isize width) { return ceil_div(width, W) * W; }  // ld of the dk and dv accumulators

  /// `levels`: log2 of the pieces. `has_score`: some score policy will ask for the old scores or their slopes.
  softmax_backward(arena& memory, isize rows, isize d, isize e, int levels, bool has_score)
      : d_(d), e_(e), most_(superblock(rows, d, e)), q_(memory, most_, d), do_(memory, most_, e) {
    shift_ = memory.take<Acc>(most_), delta_ = memory.take<Acc>(most_);
    p_ = memory.take<Acc>(keys * ld), ds_ = memory.take<Acc>(keys * ld);
    old_ = memory.take<Acc>(has_score ? keys * ld : 0);
    k_ = memory.take<Acc>(keys * d), v_ = memory.take<Acc>(keys * e);
    pair_ = memory.take<Acc>(2 * e);
    turned_ = memory.take<Acc>(W * d);
    for (int x = 0; x <= levels; ++x) sums_[x] = memory.take<Acc>(most_ * d);
    lanes_ = memory.take<std::uint64_t>(chunk * keys);
    runs_ = memory.take<key_run>(keys);
    row_runs_ = memory.take<detail::row_run>(most_panels * chunk * R);
  }

  void begin(const query_rows& rows, const tensor_ref& out, const tensor_ref& lse, const tensor_ref& dout, double scale,
             const wanted_gradients& want) noexcept {
    at_.place(rows);
    out_from_ = out, lse_from_ = lse, do_from_ = dout;
    scale_ = scale, want_ = want, loaded_ = false;
  }

  void begin_piece() noexcept { filled_[0] = false; }
  /// Keys [j0, j1) of a set; dk, dv: accumulator rows of key j0.
  void absorb(const key_set<Acc>& set, isize j0, isize j1, Acc* dk, Acc* dv) noexcept {
    for (isize j = j0; j < j1; j += keys) {
      block x{j, j + keys < j1 ? j + keys : j1, nullptr, nullptr, 0, 0};
      for (isize t = 0; t < at_.used(); t += chunk)
        absorb_chunk(set, t, x, dk + (j - j0) * padded(d_), dv + (j - j0) * padded(e_));
    }
  }
  /// The x-th of a power of two of pieces is complete: sums of equal size are joined, the earlier one first.
  void end_piece(isize x) noexcept {
    if (!want_.dq) return;
    int level = 1;
    for (; (x & 1) != 0; x >>= 1, ++level) {
      if (!filled_[0] && !filled_[level]) continue;  // zeros both
      fill(0), fill(level);
      for (isize y = 0; y < at_.used() * R * d_; ++y) sums_[0][y] = sums_[level][y] + sums_[0][y];
    }
    open_ = level;
  }
  /// After end_piece, where another piece follows.
  void keep_piece() noexcept {
    Acc* const sum = sums_[0];
    sums_[0] = sums_[open_], sums_[open_] = sum;
    filled_[open_] = filled_[0];
  }

  /// dq = factor * dQ for the superblock's rows.
  void finish(const tensor_mut& dq, Acc factor) noexcept {
    const bool direct = dq.type == dtype_of<Acc>;
    Acc factors[W];
    for (Acc& f : factors) f = factor;
    fill(0);
    for (isize t = 0; t < at_.used(); ++t)
      for (isize lane = 0; lane < at_.count(t); lane += W) {
        const isize first = t * R + lane, left = at_.count(t) - lane;
        Acc* to[W];
        for (isize l = 0; l < W; ++l) to[l] = direct && l < left ? row_of(dq, first + l) : turned_ + l * d_;
        simd::columns_to_rows<Acc, Arch>(sums_[0] + t * d_ * R + lane, R, d_, factors, to);
        for (isize l = 0; !direct && l < W && l < left; ++l)
          simd::store_row<Arch, Acc>(dq.type, to[l], d_, dq.row(at_.rows().b, at_.head(first + l), at_.row(first + l)));
      }
  }

  /// table += gradients of the score's table over keys [j0, j1), for the rows that `begin` named.
  void add_table(const key_set<Acc>& set, isize j0, isize j1, float* table) noexcept {
    for (isize j = j0; j < j1; j += keys) {
      block x{j, j + keys < j1 ? j + keys : j1, nullptr, nullptr, 0, 0};
      for (isize t = 0; t < at_.used(); ++t) {
        const isize runs = at_.look(set, t, x.j0, x.j1, lanes_, runs_);
        if (runs == 0) continue;
        fetch(set, x);
        scores<true>(set, t, 0, x, runs);
        for (isize n = 0; n < runs; ++n)
          for_areas(set, t, 0, x, runs_[n],
                    [&](const mask_site& site, const fovea::detail::score_area& area, isize to) {
                      set.modify->template add_gradient<Acc>(site, area, old_ + to, ds_ + to, table);
                    });
      }
    }
  }

 private:
  struct block {  // keys [j0, j1) of a set, converted when the first tile needs them
    isize j0, j1;
    const Acc *k, *v;
    isize k_stride, v_stride;
  };

  /// A sum that nothing was added to yet becomes zeros.
  void fill(int level) noexcept {
    for (isize y = 0; !filled_[level] && y < at_.used() * R * d_; ++y) sums_[level][y] = Acc(0);
    filled_[level] = true;
  }

  Acc* row_of(const tensor_mut& t, isize r) const noexcept {
    return static_cast<Acc*>(t.row(at_.rows().b, at_.head(r), at_.row(r)));
  }

  void fetch(const key_set<Acc>& set, block& x) noexcept {
    if (x.k != nullptr) return;
    if (!loaded_) load();
    x.k = block_of_rows<Arch, Acc>(set.k, x.j0, x.j1, d_, k_, x.k_stride);
    x.v = block_of_rows<Arch, Acc>(set.v, x.j0, x.j1, e_, v_, x.v_stride);
  }

  /// Q and dO both ways, lse and delta: not before a key is seen.
  void load() noexcept {
    loaded_ = true;
    load_shift(at_, lse_from_, shift_);
    q_.load(at_, at_.rows().q, static_cast<Acc>(scale_ * 1.4426950408889634074), shift_, true);
    do_.load(at_, do_from_, Acc(1), shift_, false);
    for (isize r = 0; r < at_.used() * R; ++r) {
      delta_[r] = Acc(0);
      if (shift_[r] == std::numeric_limits<Acc>::infinity()) continue;
      const isize b = at_.rows().b, h = at_.head(r), row = at_.row(r);
      delta_[r] = dot(simd::row_as<Arch, Acc>(out_from_.type, out_from_.row(b, h, row), e_, pair_),
                      simd::row_as<Arch, Acc>(do_from_.type, do_from_.row(b, h, row), e_, pair_ + e_));
    }
  }
  Acc dot(const Acc* a, const Acc* b) const noexcept {
    using P = simd::pack<Acc, Arch>;
    P sum(Acc(0));
    for (isize c = 0; c < e_; c += W)
      sum = simd::fma(simd::load_n<P>(a + c, e_ - c), simd::load_n<P>(b + c, e_ - c), sum);
    return simd::reduce_add(sum);
  }

  void absorb_chunk(const key_set<Acc>& set, isize t0, block& x, Acc* dk, Acc* dv) noexcept {
    const isize t1 = t0 + chunk < at_.used() ? t0 + chunk : at_.used();
    range seen{x.j1 - x.j0, 0};
    for (isize t = t0; t < t1; ++t) {
      const isize runs = at_.look(set, t, x.j0, x.j1, lanes_ + (t - t0) * keys, runs_);
      if (runs == 0) continue;
      fetch(set, x);
      const key_run& last = runs_[runs - 1];
      seen = {runs_[0].first < seen.first ? runs_[0].first : seen.first,
              last.first + last.count > seen.last ? last.first + last.count : seen.last};
      scores<false>(set, t, t - t0, x, runs);
      if (!want_.dq) continue;
      fill(0);
      add_dq(t, t - t0, x, runs);
    }
    if (!seen.empty()) add_keys(t0, t1 - t0, seen, dk, dv);
  }

  /// f(site, area, offset into P) for each head's part of tile t, the c-th of its chunk.
  template <class F>
  void for_areas(const key_set<Acc>& set, isize t, isize c, const block& x, const key_run& run, F&& f) const noexcept {
    at_.for_segments(t, [&](const typename tiles::segment& g) {
      f(tiles::site(set, g),
        fovea::detail::score_area{g.i, g.count, x.j0 + run.first, x.j0 + run.first + run.count, ld},
        run.first * ld + c * R + g.lane);
    });
  }

  /// P and dS of tile t, the c-th of its chunk. Table: dS is that of the modified score, and the old one stays in old_.
  template <bool Table>
  void scores(const key_set<Acc>& set, isize t, isize c, const block& x, isize runs) noexcept {
    const bool slopes = !Table && set.modify != nullptr && !set.modify->unit_slope();
    for (isize n = 0; n < runs; ++n) {
      const key_run& run = runs_[n];
      const isize lane = run.vector * W, to = run.first * ld + c * R + lane;
      detail::score_product<Arch, Acc>(run.count, run.vectors, d_, x.k + run.first * x.k_stride, x.k_stride,
                                       q_.columns(t) + lane, p_ + to, ld);
      if (Table || want_.dq || want_.dk)
        detail::score_product<Arch, Acc>(run.count, run.vectors, e_, x.v + run.first * x.v_stride, x.v_stride,
                                         do_.columns(t) + lane, ds_ + to, ld);
      if (set.modify != nullptr)
        for_areas(set, t, c, x, run, [&](const mask_site& site, const fovea::detail::score_area& area, isize at) {
          if (slopes) set.modify->template slopes<Acc>(site, area, p_ + at, old_ + at);
          for (isize y = 0; Table && y < run.count; ++y)
            for (isize l = 0; l < area.count; ++l) old_[at + y * ld + l] = p_[at + y * ld + l];
          set.modify->template apply<Acc>(site, area.i0, area.count, area.j0, area.j1, p_ + at, ld);
        });
      const auto finish = [&](auto f) {
        f(run.count, run.vectors, ld, p_ + to, ds_ + to, slopes ? old_ + to : nullptr, shift_ + t * R + lane,
          delta_ + t * R + lane, lanes_ + c * keys + run.first, lane);
      };
      run.masked ? finish(detail::score_gradients<Arch, Acc, true>) : finish(detail::score_gradients<Arch, Acc, false>);
    }
  }

  void add_dq(isize t, isize c, const block& x, isize runs) noexcept {
    const tile::balanced columns(d_, T::MR);
    isize first = 0;
    for (isize g = 0; g < columns.groups; ++g) {
      const isize count = columns.size(g);
      tile::with_constant<T::MR>(count, [&](auto m) {
        detail::query_gradient<Arch, Acc, m, T::NR>(runs_, runs, x.k + first, x.k_stride, ds_ + c * R, ld,
                                                    lanes_ + c * keys, sums_[0] + (t * d_ + first) * R);
      });
      first += count;
    }
  }

  /// dV and dK of the block's keys that some row of the chunk sees.
  void add_keys(isize t0, isize used, range seen, Acc* dk, Acc* dv) noexcept {
    const tile::balanced panels(seen.last - seen.first, T::MR);
    isize runs[most_panels], k = seen.first;
    for (isize g = 0; g < panels.groups; k += panels.size(g), ++g)
      runs[g] = detail::rows_of_panel(lanes_ + k, keys, panels.size(g), used, R, row_runs_ + g * chunk * R);
    if (want_.dv) add_panels(panels, runs, seen.first, p_, do_, t0, dv);
    if (want_.dk) add_panels(panels, runs, seen.first, ds_, q_, t0, dk);
  }
  /// A panel of columns stays in L1 while all keys go by.
  void add_panels(const tile::balanced& panels, const isize* runs, isize k0, const Acc* p,
                  const turned_rows<Arch, Acc>& rows, isize t0, Acc* to) noexcept {
    const isize to_ld = rows.padded();
    isize first = 0;
    for (isize x = 0; x < rows.panels(); first += rows.columns_of(x), ++x) {
      isize k = k0;
      for (isize g = 0; g < panels.groups; k += panels.size(g), ++g) {
        if (runs[g] == 0) continue;
        tile::with_constant<T::NR>(rows.columns_of(x) / W, [&](auto v) {
          tile::with_constant<T::MR>(panels.size(g), [&](auto m) {
            detail::key_gradient<Arch, Acc, m, v>(row_runs_ + g * chunk * R, runs[g], p + k * ld, ld,
                                                  rows.panel(x, first, t0), lanes_ + k, keys, to + k * to_ld + first,
                                                  to_ld);
          });
        });
      }
    }
  }

  isize d_, e_, most_;
  tiles at_;
  turned_rows<Arch, Acc> q_, do_;
  tensor_ref out_from_, lse_from_, do_from_;
  double scale_ = 1;
  wanted_gradients want_;
  bool loaded_ = false;
  int open_ = 1;
  Acc *shift_, *delta_, *p_, *ds_, *old_, *k_, *v_, *pair_, *turned_;
  Acc* sums_[5] = {};  // of dQ: the piece at work, then sums of 1, 2, 4, 8 pieces
  bool filled_[5] = {};
  std::uint64_t* lanes_;
  key_run* runs_;
  detail::row_run* row_runs_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
