// SPDX-License-Identifier: MIT
#pragma once
/// @file  Attention in int8 of query rows to lists of key blocks: the tiles of sparse_tiles.hpp, the integers of int8_softmax.hpp.
///
///   S = round(64 (s + log2 vscale)),  p = u8(255 2^((S - M) / 64)),  O = O + 2^(M - m) sum p v8,  l = l + 2^(M - m) sum p / vscale
///
/// M is the largest S of a row in 128 keys of its list, taken as they come (fewer where a window of keys or a list ends), m a running
/// maximum that may lie int8_lag octaves behind.
///
/// Contract   begin, in_floats and absorb as often as there are sets of keys, finish. Lists rise and name no block twice. Rows that see a key with a number
///            that is not finite, or whose scores might leave 16 bits, are marked by `in_floats`: the caller computes them in f32, finish
///            leaves them alone. What a row gets depends on nothing that it does not see, and not on the other tiles. Widths up to 256.
/// Cost       a quarter to a third of the f32 tile's time with VNNI.
/// Reference  hybrid/reference_int8.hpp.       Source  docs/mechanisms/int8.md

#include <fovea/kernel/sparse_int8_panels.hpp>
#include <fovea/kernel/sparse_tiles.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch>
class sparse_int8 {
  using T = detail::sparse_int8_tile<Arch>;
  using P = simd::pack<float, Arch>;
  using word = simd::words<Arch>;
  static constexpr isize W = T::W;
  static constexpr int F = simd::float_packs<Arch>;
  static constexpr float none = std::numeric_limits<float>::infinity();

 public:
  static constexpr isize rows = T::rows;

  static bool takes(isize d) { return detail::int8_width(d) <= detail::int8_most_width; }
  /// |q| |k| scale log2(e) up to which scores stay inside 16 bits, with log2 of a number of tokens (31 at most) on top.
  static double most_score(isize d) { return detail::int8_most_score(d) * (440.0 / 471.0); }
  /// Keys of a window: half a megabyte, so that the tiles find in L2 what one of them has read.
  static isize window(isize d, isize e) {
    const isize fit = (512 << 10) / (detail::int8_width(d) + detail::int8_width(e)) / T::keys * T::keys;
    return fit < T::keys ? T::keys : fit;
  }

  sparse_int8(arena& memory, isize tiles, isize d, isize e)
      : d_(d), e_(e), dp_(detail::int8_width(d)), ep_(detail::int8_width(e)), tiles_(tiles), window_(window(d, e)) {
    const isize all = tiles * T::rows;
    q_ = memory.take<std::uint8_t>(all * dp_), q_scale_ = memory.take<float>(all);
    o_ = memory.take<float>(all * ep_), m_ = memory.take<float>(all), l_ = memory.take<float>(all);
    length_ = memory.take<float>(all), left_ = memory.take<std::uint8_t>(all);
    at_ = memory.take<tile_rows>(tiles), cursor_ = memory.take<isize>(tiles);
    s_ = memory.take<std::int16_t>(T::keys * T::rows), p_ = memory.take<std::uint8_t>(T::keys * T::rows);
    wide_ = dp_ > ep_ ? dp_ : ep_;
    rows_of_ = memory.take<float>(W * wide_), bytes_ = memory.take<std::uint8_t>(W * dp_);
  }

  void begin(const tensor_ref& q, isize b, const tile_rows* tiles, isize count, double scale) noexcept {
    FOVEA_ASSERT(count <= tiles_);
    used_ = count, b_ = b, longest_ = 0;
    const float factor = static_cast<float>(scale) * 1.4426950408889634F;
    detail::row_extents<Arch> x;
    for (isize t = 0; t < count; ++t) {
      at_[t] = tiles[t];
      std::memset(o_ + t * T::rows * ep_, 0, static_cast<std::size_t>(T::rows * ep_) * sizeof(float));
      for (isize r = 0; r < T::rows; r += W) {
        for (isize l = 0; l < W; ++l) load(q, t, r + l, rows_of_ + l * wide_);
        detail::measure_rows<Arch>(rows_of_, wide_, dp_, x);
        for (isize l = 0; l < W; ++l) {
          const isize y = t * T::rows + r + l;
          const bool sound = x.length[l] < none;
          m_[y] = -none, l_[y] = 0, left_[y] = 0;
          length_[y] = x.length[l] * factor * factor, q_scale_[y] = x.most[l] * (factor * detail::int8_grid / 127.0F);
          if (!(length_[y] <= longest_)) longest_ = sound ? length_[y] : none;
          float* row = rows_of_ + l * wide_;
          if (!sound) std::memset(row, 0, static_cast<std::size_t>(dp_) * sizeof(float));
          detail::round_row<Arch, true>(row, dp_, P(x.factor[l]), bytes_ + l * dp_);
        }
        turn(q_ + t * T::rows * dp_ + r * 4);
      }
    }
  }

  /// Marks the rows that cannot take in these keys (the first `keys` of the head) in int8; true if there are some in this set.
  bool in_floats(const int8_head& head, isize keys, const block_list* lists, const block_cut& cut) noexcept {
    const auto limit = static_cast<float>(most_score(d_) * most_score(d_));  // lengths: squared
    float longest = 0;
    for (isize x = 0; x < head.blocks; ++x) longest = longest > head.longest[x] ? longest : head.longest[x];
    if (longest_ * longest <= limit) return false;  // no: for NaN, too
    bool any = false;
    for (isize t = 0; t < used_; ++t)
      for (isize r = 0; r < at_[t].count; ++r) {
        const isize y = t * T::rows + r, seen = cut.causal ? at_[t].first + r + cut.offset + 1 : keys;
        for (isize x = 0; x < lists[t].count && left_[y] == 0; ++x) {
          const isize first = lists[t].at[x] * cut.size;
          for (isize j = first; j < std::min(std::min(first + cut.size, seen), keys); ++j)
            if (!(length_[y] * head.length[j] <= limit)) left_[y] = 1;
        }
        any = any || left_[y] != 0;
      }
    return any;
  }
  /// A byte for each row of tile t: 1, it is left to the caller.
  const std::uint8_t* left(isize t) const noexcept { return left_ + t * T::rows; }
  const tile_rows& tile(isize t) const noexcept { return at_[t]; }

  /// lists [count of begin]: the blocks of each tile, of the first `keys` keys of the head.
  void absorb(const int8_head& head, isize keys, const block_list* lists, const block_cut& cut) noexcept {
    isize first = keys, last = 0;
    for (isize t = 0; t < used_; ++t) {
      cursor_[t] = 0;
      if (lists[t].count == 0) continue;
      first = std::min<isize>(first, lists[t].at[0] * cut.size);
      last = std::max<isize>(last, (lists[t].at[lists[t].count - 1] + isize{1}) * cut.size);
    }
    last = std::min(last, keys);
    for (isize j0 = first / window_ * window_; j0 < last; j0 += window_)
      for (isize t = 0; t < used_; ++t)
        if (lists[t].count > 0) absorb_window(head, lists[t], cut, t, j0, std::min(j0 + window_, last));
  }

  /// Writes out (and lse, where it is not null) of the rows that `begin` named and that are not left.
  void finish(const tensor_mut& out, const tensor_mut& lse) noexcept {
    constexpr isize L = P::size;
    const bool direct = out.type == dtype::f32;
    for (isize t = 0; t < used_; ++t)
      for (isize r = 0; r < at_[t].count; r += L) {
        float inverse[L];
        float* to[L];
        void* row[L];
        for (isize x = 0; x < L; ++x) {
          const isize y = t * T::rows + r + x, i = at_[t].first + r + x;
          inverse[x] = l_[y] > 0 ? 1.0F / l_[y] : l_[y] * 0.0F, to[x] = rows_of_ + x * wide_;
          const bool here = r + x < at_[t].count && left_[y] == 0;
          row[x] = here ? out.row(b_, at_[t].head, i) : nullptr;
          if (here && direct) to[x] = static_cast<float*>(row[x]);
          if (here && lse)
            *static_cast<float*>(lse.row(b_, at_[t].head, i)) =
                m_[y] * 0.69314718055994530942F + std::log(l_[y] / 255.0F);
        }
        simd::columns_to_rows<float, Arch>(o_ + t * T::rows * ep_ + r, T::rows, e_, inverse, to);
        for (isize x = 0; x < L && !direct; ++x)
          if (row[x] != nullptr) simd::store_row<Arch, float>(out.type, to[x], e_, row[x]);
      }
  }

 private:
  /// Row r of tile t, turned, with zeros up to dp; zeros if there is none.
  void load(const tensor_ref& q, isize t, isize r, float* to) noexcept {
    isize c = 0;
    if (r < at_[t].count) {
      const void* from = q.row(b_, at_[t].head, at_[t].first + r);
      simd::rotate_row<Arch>(simd::row_as<Arch, float>(q.type, from, d_, to), to, d_);
      c = d_;
    }
    for (; c < dp_; ++c) to[c] = 0;
  }
  /// W rows of bytes -> [dp / 4][rows][4] from one vector on.
  void turn(std::uint8_t* to) const noexcept {
    isize c = 0;
    if constexpr (P::size == W && W > 4)
      for (; c + 4 * W <= dp_; c += 4 * W) {
        P x[W];
        simd::load_turned<float, Arch>(
            [&](isize l) FOVEA_INLINE_LAMBDA { return reinterpret_cast<const float*>(bytes_ + l * dp_ + c); }, x);
        for (isize l = 0; l < W; ++l) x[l].store(reinterpret_cast<float*>(to + (c / 4 + l) * 4 * T::rows));
      }
    for (; c < dp_; c += 4)
      for (isize l = 0; l < W; ++l) std::memcpy(to + c * T::rows + 4 * l, bytes_ + l * dp_ + c, 4);
  }

  /// Keys of a list that follow each other, or nearly: blocks list.at[x, last), of which those in `keys` are taken in.
  struct stretch_of_list {
    const int8_head& head;
    const block_list& list;
    isize size, x, last;
    range keys;
    isize whole, shift;  // every row sees the keys before `whole`; row r sees key j if j <= shift + r
    isize next;          // where the next stretch begins
    isize known;         // every row may depend on the scales of the keys before it
  };

  /// Keys [base, end) of the blocks of a list, for tile t.
  void absorb_window(const int8_head& head, const block_list& list, const block_cut& cut, isize t, isize base,
                     isize end) noexcept {
    const tile_rows& at = at_[t];
    const isize seen = cut.causal ? std::min(end, at.first + at.count + cut.offset) : end;  // by any row
    const isize whole = cut.causal ? at.first + 1 + cut.offset : PTRDIFF_MAX;               // by every row
    const isize known = std::min(whole, (list.at[list.count - 1] + isize{1}) * cut.size);
    const isize gap = cut.size < 8 ? 8 : 0;  // of few keys: panels bridge short gaps, what lies there is hidden
    slots_ = 0;
    isize& x = cursor_[t];
    while (x < list.count && list.at[x] * cut.size < end) {
      isize last = x + 1;
      while (last < list.count && (list.at[last] - list.at[last - 1] - 1) * cut.size <= gap &&
             list.at[last] * cut.size < end)
        ++last;
      const range keys{list.at[x] * cut.size, (list.at[last - 1] + isize{1}) * cut.size};
      add({head, list, cut.size, x, last, meet(keys, {base, seen}), whole, at.first + cut.offset,
           last < list.count ? list.at[last] * cut.size : keys.first, known},
          t);
      x = keys.last > end ? last - 1 : last;
      if (keys.last > end) break;  // the rest of the block in the next window
    }
    flush(head, t);
  }

  void add(stretch_of_list from, isize t) noexcept {
    for (isize j = from.keys.first / 4 * 4; j < from.keys.last;) {
      if (slots_ == T::slots) flush(from.head, t);
      if (slots_ == 0)
        for (isize r = 0; r < 2 * T::rows; ++r) top_[r] = -32768;
      if (T::MR == 16 && j + 12 < from.keys.last && slots_ + 4 <= T::slots)
        panel<T::MR>(from, j, t), j += T::MR;
      else
        panel<4>(from, j, t), j += 4;
    }
  }
  /// Keys [j, j + M) into the next slots.
  template <int M>
  void panel(stretch_of_list& from, isize j, isize t) noexcept {
    constexpr std::uint32_t all = (1U << M) - 1;
    for (isize g = 0; g < M / 4; ++g)
      slot_[slots_ + g] = {static_cast<std::int32_t>(j / 4 + g), (j + 4 * g) / 16 * 16 + 16 <= from.known};
    const std::uint32_t listed = listed_of<M>(from, j);
    const bool masked = listed != all || j + M > from.whole;
    std::uint16_t lanes[M];
    for (isize i = 0; masked && i < M; ++i) {
      const isize hidden = j + i - from.shift;  // rows before this one do not see the key
      const std::uint32_t live = from.whole == PTRDIFF_MAX || hidden <= 0 ? 0xffffU
                                 : hidden >= T::rows                      ? 0
                                                                          : 0xffffU << hidden;
      lanes[i] = static_cast<std::uint16_t>((listed >> i & 1) != 0 ? live : 0);
    }
    const std::uint8_t* q = q_ + t * T::rows * dp_;
    const float* scale = q_scale_ + t * T::rows;
    std::int16_t* s = s_ + slots_ * 4 * T::rows;
    const std::int8_t* const next = from.head.k + (j + M < from.keys.last ? j + M : from.next / 4 * 4) * dp_;
    if (masked)
      detail::sparse_int8_scores<Arch, M, true, 0>(from.head, j, q, scale, lanes, next, s, top_);
    else if (M > 4 && dp_ == 64)
      detail::sparse_int8_scores<Arch, M, false, M == 4 ? 0 : 64>(from.head, j, q, scale, lanes, next, s, top_);
    else if (M > 4 && dp_ == 128)
      detail::sparse_int8_scores<Arch, M, false, M == 4 ? 0 : 128>(from.head, j, q, scale, lanes, next, s, top_);
    else
      detail::sparse_int8_scores<Arch, M, false, 0>(from.head, j, q, scale, lanes, next, s, top_);
    slots_ += M / 4;
  }
  /// Bit i: key j + i is one of the stretch.
  template <int M>
  static std::uint32_t listed_of(stretch_of_list& from, isize j) noexcept {
    const isize low = std::max(from.keys.first - j, isize{0}), high = std::min(from.keys.last - j, isize{M});
    const std::uint32_t inside = ((1U << high) - 1) & ~((1U << low) - 1);
    if (from.size >= 8) return inside;
    std::uint32_t bits = 0;
    for (; from.x < from.last; ++from.x) {
      const isize first = from.list.at[from.x] * from.size - j, end = first + from.size;
      if (first >= M) break;
      for (isize i = std::max(first, isize{0}); i < std::min(end, isize{M}); ++i) bits |= 1U << i;
      if (end > M) break;
    }
    return bits & inside;
  }

  /// The scores that are kept become weights, and (m, l, O) of tile t takes them in.
  void flush(const int8_head& head, isize t) noexcept {
    if (slots_ == 0) return;
    alignas(64) float beta[T::rows], sum[T::rows];
    for (isize r = 0; r < T::rows; r += W) {
      std::int16_t* top = top_ + 2 * r;
      word most = word::load(top);
      most = simd::max_i16(most, simd::swap_i16(most));
      most.store(top);
      detail::sparse_int8_weights<Arch>(head, slot_, slots_, r, s_ + 2 * r, top, p_ + 4 * r, sum + r);
      settle(t, r, simd::high_i16(most), beta + r);
      for (isize x = r; x < r + W; x += P::size) {
        float* l = l_ + t * T::rows + x;
        simd::fma(P::load(sum + x), P::load(beta + x), P::load(l)).store(l);
      }
    }
    for (isize c = 0; c < ep_; c += T::MR)
      detail::sparse_int8_values<Arch, T::MR>(slot_, slots_, head.v + 4 * c, ep_, p_, beta,
                                              o_ + (t * ep_ + c) * T::rows);
    slots_ = 0;
  }

  /// The running maximum of a vector takes in that of the slots (`level`, in steps) where it lies far above; beta is what they are multiplied by.
  void settle(isize t, isize lane, word level, float* beta) noexcept {
    const isize r = t * T::rows + lane;
    alignas(64) float alpha[W];
    P moved(0.0F), started(-none);
    tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
      const isize x = z * P::size;
      const P steps = simd::to_float(level, z);
      const P h = simd::select_greater(steps, P(-32767.5F), steps * P(1.0F / detail::int8_grid), P(-none));
      const P old = P::load(m_ + r + x), far = old + P(detail::int8_lag);
      const P next = simd::select_greater(h, far, h, old);
      const P shift = simd::select_greater(next, P(-3e38F), next, P(0.0F));
      simd::exp2(h - shift).store(beta + x), simd::exp2(old - shift).store(alpha + x);
      next.store(m_ + r + x);
      moved = simd::max(moved, simd::select_greater(h, far, P(1.0F), P(0.0F))), started = simd::max(started, old);
    });
    if (!(simd::highest(moved) > 0)) return;
    for (isize l = 0; l < W; ++l) l_[r + l] *= alpha[l];
    if (!(simd::highest(started) > -none)) return;
    float* o = o_ + t * T::rows * ep_ + lane;
    for (isize c = 0; c < ep_; ++c, o += T::rows)
      for (isize x = 0; x < W; x += P::size) (P::load(o + x) * P::load(alpha + x)).store(o + x);
  }

  isize d_, e_, dp_, ep_, tiles_, window_, wide_, used_ = 0, b_ = 0, slots_ = 0;
  float longest_ = 0;
  alignas(64) std::int16_t top_[2 * T::rows];
  detail::int8_slot_keys slot_[T::slots];
  std::uint8_t *q_, *left_, *p_, *bytes_;
  float *q_scale_, *o_, *m_, *l_, *length_, *rows_of_;
  std::int16_t* s_;
  tile_rows* at_;
  isize* cursor_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
