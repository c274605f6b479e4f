// SPDX-License-Identifier: MIT
#pragma once
/// @file  A few query rows against int8 rows of one KV head, computed in integers: decoding over an int8 KV store.
///
///   s_j = (q8 . k8_j) * q_scale * k_scale_j                      s32 sums; K as u8 (+ 128), q as s8 with a scale a row
///   e_j = 2^(s_j - m),  l += e_j                                 f32, m the running maximum
///   p_j = round(255 e_j v_scale_j / top + t_j)                   u8; top = the row's maximum of e_j v_scale_j over the block of 64 keys
///   o  += (top / 255) * sum_j p_j v8_j                           s32 sums within the block
///
/// The scales of V join the weights before they are rounded: what is small in V takes no part of the 255 steps. t_j in (-1/2, 1/2) is
/// the golden-ratio sequence: thousands of small weights keep their sum. The denominator comes from the unrounded e_j, so that the
/// log-sum-exp is exact up to the scores, and a key whose value is all zeros still counts.
///
/// Contract   as kernel/decode.hpp; keys are int8 with a scale a row, plain or packed (core/rows.hpp), in one stretch, pages or a ring.
///            A NaN scale (a row that held NaN or infinity) reaches the rows that see its key and no others.
/// Cost       packed: one pass over the bytes, 1 instruction for 64 products with VNNI; plain rows: 8 byte shuffles more for 4 rows of
///            64 bytes of V, and a transposing reduction for each 16 dot products.      Numerics   docs/mechanisms/int8.md.

#include <cstring>
#include <limits>

#include <fovea/kernel/code_block.hpp>
#include <fovea/kernel/online_softmax.hpp>
#include <fovea/kernel/row_requests.hpp>
#include <fovea/simd/reduce.hpp>
#include <fovea/simd/word_ops.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch>
class decode_int8 {
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  static constexpr isize W = word::size, B = 4 * W, PW = P::size;  // lanes, bytes, floats of a register
  static constexpr int parts = simd::float_packs<Arch>;            // packs of float that a register makes
  static constexpr isize keys = code_block::keys;
  static constexpr isize early = 32;                                // keys that are asked for while weights are made
  static constexpr isize sum_rows = Arch::registers >= 32 ? 4 : 2;  // rows that share the reads of values

 public:
  static constexpr isize most_rows = 8;

  decode_int8(arena& memory, isize d, isize e) : d_(d), e_(e), dp_(ceil_div(d, B) * B), ep_(ceil_div(e, B) * B) {
    q_ = memory.take<std::int8_t>(most_rows * dp_);
    o_ = memory.take<float>(most_rows * ep_);
    row_ = memory.take<float>(d);
  }

  /// Loads and rounds the rows; scale and log2(e) join their scales.
  void begin(const query_rows& rows, double scale) noexcept {
    rows_ = rows;
    count_ = rows.last - rows.first;
    for (isize r = 0; r < count_; ++r) {
      const float* q = load_query<Arch, float>(rows, head(r), query(r), d_, row_);
      P high(0.0F), low(0.0F), odd(0.0F);  // odd is NaN as soon as an element is NaN or infinite
      for (isize c = 0; c < d_; c += PW) {
        const P x = simd::load_n<P>(q + c, d_ - c);
        high = simd::max(x, high), low = simd::min(x, low), odd = simd::fma(x, P(0.0F), odd);
      }
      const float most = simd::highest(simd::max(high, P(0.0F) - low)), bad = simd::reduce_add(odd);
      const P unit(most > 0x1p-100F && bad == 0.0F ? 127.0F / most : 0.0F);
      std::int8_t* const to = q_ + r * dp_;
      std::uint8_t bytes[W];
      word sums = word::splat(0);
      for (isize c = 0; c < dp_; c += W) {
        P x[parts];
        tile::unroll<parts>([&](auto i) FOVEA_INLINE_LAMBDA {
          const isize at = c + i * PW;
          x[i] = at < d_ && bad == 0.0F ? simd::load_n<P>(q + at, d_ - at) * unit : P(0.0F);
        });
        const word y = simd::to_nearest<Arch>(x);
        simd::store_low_bytes(y, bytes);
        std::memcpy(to + c, bytes, W);
        sums = simd::add_i32(sums, y);
      }
      std::int32_t lanes[W], sum = 0;
      sums.store(lanes);
      for (isize l = 0; l < W; ++l) sum += lanes[l];
      start_[r] = -128 * sum;  // K comes as k + 128
      q_scale_[r] = static_cast<float>(static_cast<double>(most) / 127.0 * scale * 1.4426950408889634074) + bad;
    }
  }

  /// (m, l, o) of the rows over keys [j0, j1) of the set; m, l [rows], o [rows][e] are overwritten.
  void run(const key_set<float>& set, isize j0, isize j1, float* m, float* l, float* o) noexcept {
    for (isize r = 0; r < count_; ++r) m[r] = -std::numeric_limits<float>::infinity(), l[r] = 0, poisoned_[r] = 0;
    for (isize c = 0; c < count_ * ep_; ++c) o_[c] = 0;
    range seen = set.visible == nullptr ? range{j0, j1} : range{j1, j0};
    for (isize r = 0; set.visible != nullptr && r < count_; ++r) {
      const range x = meet(set.visible->keys(site(set, r), query(r), query(r) + 1), {j0, j1});
      if (!x.empty()) seen = {x.first < seen.first ? x.first : seen.first, x.last > seen.last ? x.last : seen.last};
    }
    far_ = set.count * (set.k.row_bytes + set.v.row_bytes) >
           (1 << 17);  // less is in the L2 cache, whatever other heads read
    if (set.k.form == row_form::plain)
      all_blocks<false>(set, seen, m, l);
    else
      all_blocks<true>(set, seen, m, l);
    for (isize r = 0; r < count_; ++r)
      for (isize c = 0; c < e_; ++c) o[r * e_ + c] = o_[r * ep_ + place(c, set.k.form)] + poisoned_[r];
  }

 private:
  isize head(isize r) const noexcept { return rows_.first_head + (rows_.first + r) / rows_.q.length; }
  isize query(isize r) const noexcept { return (rows_.first + r) % rows_.q.length; }
  mask_site site(const key_set<float>& set, isize r) const noexcept {
    mask_site at = set.site;
    at.h = head(r);
    return at;
  }
  /// Plain rows leave the columns of a register's bytes quarter by quarter (simd::zip4): [i][z][y] for column 16 z + 4 i + y.
  static isize place(isize c, row_form form) noexcept {
    if (form != row_form::plain) return c;
    const isize x = c % B;
    return c - x + x % 16 / 4 * W + x / 16 * 4 + x % 4;
  }

  template <bool Packed>
  void all_blocks(const key_set<float>& set, range seen, float* m, float* l) noexcept {
    if (seen.empty()) return;
    code_block two[2];
    two[0].find<Packed>(set.k, set.v, seen.first, seen.last);
    for (isize x = 0;; x ^= 1) {
      const code_block& now = two[x];
      const isize next = now.first + now.count;
      if (next < seen.last) two[x ^ 1].find<Packed>(set.k, set.v, next, seen.last);
      if (far_) {  // the rows that will be asked for with the next block
        const isize end = next + keys < seen.last ? next + keys : seen.last;
        detail::touch_pages(set.v, next, end);
        detail::touch_pages(set.k, end, end + keys < seen.last ? end + keys : seen.last);
      }
      one_block<Packed>(set, now, next < seen.last ? &two[x ^ 1] : nullptr, m, l);
      if (next >= seen.last) return;
    }
  }

  template <bool Packed>
  void one_block(const key_set<float>& set, const code_block& b, const code_block* next, float* m, float* l) noexcept {
    std::uint64_t seen[most_rows];  // bit x: the row sees lane x
    const std::uint64_t every = ~std::uint64_t{0} >> (64 - b.count);
    bool any = false;
    for (isize r = 0; r < count_; ++r) {
      seen[r] = every;
      if (set.visible != nullptr) seen[r] = visible(set, b, r, every);
      any = any || seen[r] != 0;
      seen[r] <<= b.lead;
    }
    if (!any) return;
    scales_.load(set.k, set.v, b);
    const bool ahead = far_;
    for_groups<4>([&](auto R, isize r) {
      if constexpr (Packed)
        packed_scores<R>(b, r, r == 0 && ahead);
      else
        plain_scores<R>(b, r, r == 0 && ahead);
    });
    // Each step for all rows: what one waits for, the next one covers.
    for (isize r = 0; r < count_; ++r) finish_scores(set, b, r, seen[r], m[r]);
    const isize steps = 2 * count_ * keys / PW;
    early_ = steps < early ? steps : early;
    if (!ahead || next == nullptr || next->count < early) early_ = 0;
    for (isize r = 0; r < count_; ++r) exponentials(r, early_ > 0 ? next : nullptr, l[r]);
    for (isize r = 0; r < count_; ++r) round_weights(s_[r], steps_[r], p_[r]);
    for_groups<sum_rows>([&](auto R, isize r) {
      if constexpr (Packed)
        packed_values<R>(b, r, r == 0 && ahead ? next : nullptr);
      else
        plain_values<R>(b, r, r == 0 && ahead ? next : nullptr);
    });
  }
  std::uint64_t visible(const key_set<float>& set, const code_block& b, isize r, std::uint64_t every) const noexcept {
    const isize j1 = b.first + b.count;
    const tile_kind kind = set.visible->tile(site(set, r), query(r), query(r) + 1, b.first, j1);
    if (kind != tile_kind::partial) return kind == tile_kind::full ? every : 0;
    std::uint64_t bit[keys], seen = 0;
    set.visible->lanes(site(set, r), query(r), 1, b.first, j1, bit);
    for (isize x = 0; x < b.count; ++x) seen |= (bit[x] & 1U) << x;
    return seen;
  }

  /// f(constant<R>, r) for rows r ... r + R - 1 that share the reads: by `Most`, then fewer.
  template <int Most, class F>
  void for_groups(F&& f) const {
    isize r = 0;
    if constexpr (Most >= 4 && W >= 4)
      for (; r + 4 <= count_; r += 4) f(tile::constant<4>{}, r);
    for (; r + 2 <= count_; r += 2) f(tile::constant<2>{}, r);
    for (; r < count_; ++r) f(tile::constant<1>{}, r);
  }

  /// s_[r + z][lane] = q8 . k8, 16 keys at a time: their bytes lie side by side, four channels in a register of 16 lanes.
  template <int R>
  FOVEA_NOINLINE void packed_scores(const code_block& b, isize r, bool ahead) noexcept {
    constexpr int N = static_cast<int>(packed_rows / W);           // registers of 16 keys
    constexpr int U = R * N >= 8 || Arch::registers < 32 ? 1 : 2;  // chains of additions
    const isize steps = ceil_div(d_, 4), asked = !ahead ? 0 : d_ < e_ ? d_ / 4 : e_ / 4;
    const std::int8_t* const q = q_ + r * dp_;
    for (isize t = 0; t * packed_rows < b.lead + b.count; ++t) {
      word acc[R][N][U];
      tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
        tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA {
          tile::unroll<U>([&](auto u) FOVEA_INLINE_LAMBDA { acc[z][i][u] = word::splat(u == 0 ? start_[r + z] : 0); });
        });
      });
      const std::byte* k = b.k[t];
      const auto step = [&](isize c, auto u) FOVEA_INLINE_LAMBDA {
        tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA {
          const word x = word::load(k + c * 64 + i * B);
          tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
            acc[z][i][u] = simd::dot4(acc[z][i][u], x, simd::splat4<Arch>(q + z * dp_ + 4 * c));
          });
        });
      };
      isize c = 0;
      for (; c + U <= asked; c += U) {
        simd::prefetch(b.v[4 * t] + c * 64, U * 64);  // the tile's values
        tile::unroll<U>([&](auto u) FOVEA_INLINE_LAMBDA { step(c + u, u); });
      }
      for (; c + U <= steps; c += U) tile::unroll<U>([&](auto u) FOVEA_INLINE_LAMBDA { step(c + u, u); });
      for (; c < steps; ++c) step(c, tile::constant<0>{});
      tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
        tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA {
          word sum = acc[z][i][0];
          if constexpr (U == 2) sum = simd::add_i32(sum, acc[z][i][1]);
          store_sums(sum, s_[r + z] + t * packed_rows + i * W);
        });
      });
    }
  }
  static FOVEA_INLINE void store_sums(word x, float* to) noexcept {
    tile::unroll<parts>([&](auto i) FOVEA_INLINE_LAMBDA { simd::to_float(x, i).store(to + i * PW); });
  }

  /// The same for plain rows: W / R rows times R queries are W sums of lanes, added up together.
  template <int R>
  FOVEA_NOINLINE void plain_scores(const code_block& b, isize r, bool ahead) noexcept {
    constexpr int per = static_cast<int>(W) / R;
    const isize whole = d_ / B * B, asked = !ahead ? 0 : d_ < e_ ? whole : e_ / B * B;
    const std::int8_t* const q = q_ + r * dp_;
    const word flip = simd::splat_i8<Arch>(128);
    std::int32_t start[W];
    for (isize l = 0; l < W; ++l) start[l] = start_[r + l / per];
    const word starts = word::load(start);
    for (isize x = 0; x < b.count; x += per) {
      word acc[W];
      tile::unroll<static_cast<int>(W)>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i] = word::splat(0); });
      const std::byte* k[per];
      tile::unroll<per>([&](auto y) FOVEA_INLINE_LAMBDA { k[y] = b.k[x + y]; });
      const auto step = [&](isize c, auto edge) FOVEA_INLINE_LAMBDA {
        word u[per];
        tile::unroll<per>([&](auto y) FOVEA_INLINE_LAMBDA {
          u[y] = simd::xor_bits(edge ? load_edge(k[y] + c, d_ - c) : word::load(k[y] + c), flip);
        });
        tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
          const word v = word::load(q + z * dp_ + c);
          tile::unroll<per>([&](auto y)
                                FOVEA_INLINE_LAMBDA { acc[z * per + y] = simd::dot4(acc[z * per + y], u[y], v); });
        });
      };
      isize c = 0;
      for (; c < asked; c += B) {
        tile::unroll<per>([&](auto y) FOVEA_INLINE_LAMBDA { simd::prefetch(b.v[x + y] + c, B); });
        step(c, std::false_type{});
      }
      for (; c < whole; c += B) step(c, std::false_type{});
      if (c < d_) step(c, std::true_type{});
      alignas(64) float lanes[W];
      store_sums(simd::add_i32(simd::sum_each(acc), starts), lanes);
      for (isize z = 0; z < R; ++z) std::memcpy(s_[r + z] + x, lanes + z * per, per * sizeof(float));
    }
  }
  static FOVEA_INLINE word load_edge(const std::byte* p, isize count) noexcept {
    std::byte bytes[B] = {};
    std::memcpy(bytes, p, static_cast<std::size_t>(count));
    return word::load(bytes);
  }

  /// Scales, score modification and mask of one row's scores; the running maximum.
  void finish_scores(const key_set<float>& set, const code_block& b, isize r, std::uint64_t seen, float& m) noexcept {
    constexpr float none = -std::numeric_limits<float>::infinity();
    float* const s = s_[r];
    const P unit(q_scale_[r]);
    for (isize x = 0; x < keys; x += PW) (P::load(s + x) * (P::load(scales_.k + x) * unit)).store(s + x);
    if (set.bias != nullptr)
      for (isize x = 0; x < b.count; ++x) s[b.lead + x] += set.bias[b.first + x] * 1.44269504F;
    if (set.modify != nullptr)
      set.modify->template apply<float>(site(set, r), query(r), 1, b.first, b.first + b.count, s + b.lead, 1);
    for (isize x = 0; seen != ~std::uint64_t{0} && x < keys; x += PW)
      simd::select(static_cast<simd::lane_bits>(seen >> x), P::load(s + x), P(none)).store(s + x);
    P top(none);
    for (isize x = 0; x < keys; x += PW) top = simd::max(top, P::load(s + x));
    const float highest = simd::highest(top), next = m > highest ? m : highest;
    shift_[r] = next > -3e38F ? next : 0.0F;
    alpha_[r] = m - shift_[r];
    m = next;
    if ((scales_.bad_values & seen) != 0) poisoned_[r] = std::numeric_limits<float>::quiet_NaN();
  }
  /// Exponentials of one row, their sum, and what their largest product with a scale of V is.
  void exponentials(isize r, const code_block* next, float& l) noexcept {
    float* const s = s_[r];
    const P shift(shift_[r]);
    P sum(0.0F), most(0.0F);
    for (isize x = 0; x < keys; x += PW) {
      // The next block's first keys: memory would have nothing to do otherwise.
      if (const isize y = 2 * (r * keys + x) / PW; next != nullptr && y < early)
        simd::prefetch(next->key(y, d_), d_), simd::prefetch(next->key(y + 1, d_), d_);
      const P e = simd::exp2(P::load(s + x) - shift), p = e * P::load(scales_.v + x);
      p.store(s + x);
      sum = sum + e, most = simd::max(p, most);
    }
    alpha_[r] = simd::first(simd::exp2(P(alpha_[r])));
    l = l * alpha_[r] + simd::reduce_add(sum);
    const float largest = simd::highest(most);
    const bool some = largest > 1e-35F;
    gain_[r] = some ? largest * scales_.v_top / 255.0F : 0.0F, steps_[r] = some ? 255.0F / largest : 0.0F;
  }
  /// The golden-ratio sequence, from -1/2 to 1/2; under 1/2 in size by a margin, so that 255 stays 255 and 0 stays 0.
  struct dither {
    alignas(64) float at[keys];
    constexpr dither() : at() {
      std::uint32_t x = 0x80000000U;
      for (float& y : at) y = static_cast<float>(x >> 24) / 258.0F - 0.4942F, x += 0x9e3779b9U;
    }
  };
  static constexpr dither dithers{};
  static void round_weights(const float* e, float factor, std::uint8_t* to) noexcept {
    for (isize x = 0; x < keys; x += W) {
      P p[parts];
      tile::unroll<parts>([&](auto i) FOVEA_INLINE_LAMBDA {
        p[i] = simd::fma(P::load(e + x + i * PW), P(factor), P::load(dithers.at + x + i * PW));
      });
      simd::store_low_bytes(simd::to_nearest<Arch>(p), to + x);
    }
  }

  /// o_ = o_ alpha + gain * sum_x p[x] V[x], columns [c, c + N W) as they lie in registers.
  template <int R, int N>
  FOVEA_INLINE void add_sums(const word (&acc)[R][N], isize r, isize c) noexcept {
    tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
      const P alpha(alpha_[r + z]), gain(gain_[r + z]);
      tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA {
        tile::unroll<parts>([&](auto x) FOVEA_INLINE_LAMBDA {
          float* const o = o_ + (r + z) * ep_ + c + i * W + x * PW;
          simd::fma(simd::to_float(acc[z][i], x), gain, P::load(o) * alpha).store(o);
        });
      });
    });
  }

  template <int R>
  void packed_values(const code_block& b, isize r, const code_block* next) noexcept {
    isize c = 0;
    for (; c + 4 * W <= e_; c += 4 * W) packed_columns<R, 4, false>(b, r, c, next);
    for (; c + W <= e_; c += W) packed_columns<R, 1, false>(b, r, c, next);
    if (c < e_) packed_columns<R, 1, true>(b, r, c, next);
  }
  template <int R, int N, bool Edge>
  FOVEA_NOINLINE void packed_columns(const code_block& b, isize r, isize c, const code_block* next) noexcept {
    word acc[R][N];
    tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
      tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA { acc[z][i] = word::splat(0); });
    });
    const isize ahead = next != nullptr && c < d_ ? ceil_div(next->lead + next->count, packed_rows) * 4 : 0;
    const isize groups = ceil_div(b.lead + b.count, 4);
    const auto step = [&](isize x, auto ask) FOVEA_INLINE_LAMBDA {
      const std::byte *const v = b.v[x] + 4 * c, *const k = ask ? next->k[x / 4] + x % 4 * 4 * d_ + 4 * c : nullptr;
      word p[R];
      tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA { p[z] = simd::splat4<Arch>(p_[r + z] + 4 * x); });
      tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA {
        if (ask) simd::prefetch(k + i * B, B);  // one line at a time: a burst would fill the core's few line buffers
        const word y = Edge ? load_edge(v, 4 * (e_ - c)) : word::load(v + i * B);
        tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA { acc[z][i] = simd::dot4(acc[z][i], p[z], y); });
      });
    };
    isize x = 0;
    for (; 4 * x < early_ && x < groups; ++x) step(x, std::false_type{});
    for (; x < ahead && x < groups; ++x) step(x, std::true_type{});
    for (; x < groups; ++x) step(x, std::false_type{});
    add_sums<R, N>(acc, r, c);
  }

  template <int R>
  void plain_values(const code_block& b, isize r, const code_block* next) noexcept {
    isize c = 0;
    for (; c + B <= e_; c += B) plain_columns<R, false>(b, r, c, next);
    if (c < e_) plain_columns<R, true>(b, r, c, next);
  }
  /// Four rows at a time, their bytes side by side.
  template <int R, bool Edge>
  FOVEA_NOINLINE void plain_columns(const code_block& b, isize r, isize c, const code_block* next) noexcept {
    word acc[R][4];
    tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
      tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA { acc[z][i] = word::splat(0); });
    });
    const isize ahead = next != nullptr && c < d_ ? next->count : 0;
    const auto step = [&](isize x, auto ask) FOVEA_INLINE_LAMBDA {
      word y[4];
      tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
        if (ask) simd::prefetch(next->k[x + i] + c, B);
        const std::byte* const v = b.v[x + i] + c;
        y[i] = Edge ? load_edge(v, e_ - c) : word::load(v);
      });
      simd::zip4(y);
      tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
        const word p = simd::splat4<Arch>(p_[r + z] + x);
        tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA { acc[z][i] = simd::dot4(acc[z][i], p, y[i]); });
      });
    };
    isize x = 0;
    for (; x < early_ && x < b.count; x += 4) step(x, std::false_type{});
    for (; x + 4 <= ahead && x < b.count; x += 4) step(x, std::true_type{});
    for (; x < b.count; x += 4) step(x, std::false_type{});
    add_sums<R, 4>(acc, r, c);
  }

  isize d_, e_, dp_, ep_, count_ = 0, early_ = 0;
  bool far_ = false;
  query_rows rows_;
  std::int8_t* q_;  // [most_rows][dp_]
  float *o_, *row_;
  code_scales<Arch> scales_;
  std::int32_t start_[most_rows];
  float q_scale_[most_rows], alpha_[most_rows], gain_[most_rows], shift_[most_rows], steps_[most_rows],
      poisoned_[most_rows];
  alignas(64) float s_[most_rows][keys];
  alignas(64) std::uint8_t p_[most_rows][keys];
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
