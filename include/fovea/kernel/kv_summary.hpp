// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a growing KV cache remembers of its whole blocks for a selection: codes, means, spread, range, kept keys. Of one KV head.
///
/// The contents are those of kernel/block_summary.hpp, in fewer bytes: codes in panels as decoding reads them, nothing of the block that is
/// still filling (it is always computed), no norms, means in `pool_type`, and copies of the kept keys, so that they lie together.
///
/// Contract   settle() takes blocks when they are whole and stretches when they are over, from the rows of the cache as it holds them; it
///            does not matter how tokens came. A cache that was truncated is settled again from the stretch where it ends.
/// Numerics   means are summed in Acc and stored in `pool_type`, 16 bits where the cache has 16.
/// Cost       O(d + e) a token. Bytes a token, 8-bit codes, d = e = 64, blocks of 16, 1/64 kept, f16: 64 + 4 + 16 + 4; 4-bit codes: 32 less.

#include <fovea/core/rows.hpp>
#include <fovea/kernel/code_panels.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// What a cache keeps beside summary_needs' contents.
struct kv_needs : summary_needs {
  bool gate = false;     ///< scores of mean keys: in Acc, whole blocks
  bool pools = false;    ///< pooled tokens
  bool copies = false;   ///< kept keys and values beside each other
  isize selections = 0;  ///< that are kept from step to step
  dtype pool_type = dtype::f32, kept_type = dtype::f32;
};

/// Row j of a source of any form, as Acc.
template <class Arch, class Acc>
const Acc* load_any_row(const row_source& from, isize j, isize width, Acc* scratch) noexcept {
  if (from.form != row_form::plain) return simd::load_packed_row<Arch, Acc>(from, j, width, scratch), scratch;
  const stretch s = from.at(j);
  if (from.type != dtype::i8) return simd::row_as<Arch, Acc>(from.type, s.data, width, scratch);
  simd::load_scaled_row<Arch, Acc>(s.data, s.scales, from.scale_row, width, scratch);
  return scratch;
}

template <class Acc>
struct kv_summary {
  isize block_k = 1, d = 0, e = 0, tokens = 0;
  kv_needs needs;
  code_layout codes;
  std::uint8_t* code = nullptr;
  Acc* step = nullptr;                             ///< [tokens, and a panel]
  Acc *gate = nullptr, *spread = nullptr;          ///< [blocks x d]: means, sums of squared deviations
  Acc *low = nullptr, *high = nullptr;             ///< [blocks x d]
  std::byte *pool_k = nullptr, *pool_v = nullptr;  ///< [blocks * parts x d], [.. x e] of pool_type
  std::int32_t* members = nullptr;                 ///< [blocks * parts]
  std::int32_t* small = nullptr;                   ///< [stretches x kept]: tokens, the smallest |v| first
  std::byte *kept_k = nullptr, *kept_v = nullptr;  ///< [stretches * kept x d], [.. x e] of kept_type

  std::uint8_t* odd_values = nullptr;  ///< not 0: some value was not finite
  std::uint8_t* fates = nullptr;       ///< [selections x blocks] of the last selection

  kv_summary() = default;
  kv_summary(arena& memory, const kv_needs& wanted, isize room, isize block, isize width, isize value_width)
      : block_k(block), d(width), e(value_width), tokens(room), needs(wanted), codes(width, wanted.levels) {
    const isize blocks = ceil_div(tokens, block), pools = needs.pools ? blocks * needs.parts : 0;
    const isize kept = needs.kept > 0 ? tokens / needs.stretch * needs.kept : 0;
    const auto size = [](dtype t) { return static_cast<isize>(size_of(t)); };
    const auto some = [&](bool wanted_so, isize count) {
      return wanted_so && count > 0 ? memory.take<Acc>(count) : nullptr;
    };
    if (needs.levels > 0) code = memory.take<std::uint8_t>(codes.bytes(tokens));
    step = some(needs.levels > 0, ceil_div(tokens, code_layout::keys) * code_layout::keys);
    gate = some(needs.gate, blocks * d), spread = some(needs.spread, blocks * d);
    low = some(needs.range, blocks * d), high = some(needs.range, blocks * d);
    pool_k = memory.take<std::byte>(shared_means() ? 0 : pools * d * size(needs.pool_type));
    pool_v = memory.take<std::byte>(pools * e * size(needs.pool_type));
    if (shared_means()) pool_k = reinterpret_cast<std::byte*>(gate);
    members = memory.take<std::int32_t>(pools);
    odd_values = memory.take<std::uint8_t>(1);
    fates = memory.take<std::uint8_t>(needs.selections * blocks);
    small = memory.take<std::int32_t>(kept);
    kept_k = memory.take<std::byte>(needs.copies ? kept * d * size(needs.kept_type) : 0);
    kept_v = memory.take<std::byte>(needs.copies ? kept * e * size(needs.kept_type) : 0);
  }
  /// One array of mean keys serves the scores and the pooling.
  bool shared_means() const {
    return needs.gate && needs.pools && needs.parts == 1 && !needs.sampled && needs.pool_type == dtype_of<Acc>;
  }
  bool odd() const { return *odd_values != 0; }
  row_source pooled(const std::byte* rows, isize width) const { return dense(rows, needs.pool_type, width); }
  row_source kept(const std::byte* rows, isize width) const { return dense(rows, needs.kept_type, width); }

 private:
  static row_source dense(const std::byte* rows, dtype type, isize width) {
    row_source r;
    r.data = rows, r.type = type, r.row_bytes = width * static_cast<isize>(size_of(type));
    return r;
  }
};

namespace detail {

template <class Arch, class Acc>
struct kv_settling {
  const kv_summary<Acc>& s;
  const row_source &k, &v;
  Acc *row, *mean;  // scratch: max(d, e, kept) each

  void block(isize J) const noexcept {
    for (isize t = J * s.block_k; t < (J + 1) * s.block_k; ++t) {
      const Acc* value = load_any_row<Arch, Acc>(v, t, s.e, row);
      Acc odd = 0;
      for (isize c = 0; c < s.e; ++c) odd += value[c] * Acc(0);
      if (!(odd == 0)) *s.odd_values = 1;
    }
    for (isize t = J * s.block_k; t < (J + 1) * s.block_k; ++t) {
      if (s.code == nullptr && s.low == nullptr) break;
      const Acc* key = load_any_row<Arch, Acc>(k, t, s.d, row);
      if (s.code != nullptr) {
        auto* const code = reinterpret_cast<std::int8_t*>(mean);
        s.step[t] = kernel::round_row<Arch>(key, s.d, s.needs.levels, code);
        s.codes.put(s.code, t, code);
      }
      if (s.low == nullptr) continue;
      if (t % s.block_k == 0) copy(key, s.d, s.low + J * s.d), copy(key, s.d, s.high + J * s.d);
      fold_range<Arch>(key, s.d, s.low + J * s.d, s.high + J * s.d);
    }
    means(J, nullptr);
  }
  /// The keys of stretch x with the smallest values; they leave the means of their blocks.
  void stretch_of(isize x) const noexcept {
    const isize first = x * s.needs.stretch, kept = s.needs.kept;
    std::int32_t* const list = s.small + x * kept;
    for (isize held = 0, t = first; t < first + s.needs.stretch; ++t) {
      const Acc norm = norm_of(t);
      isize at = held;
      for (; at > 0 && norm < mean[at - 1]; --at)
        if (at < kept) mean[at] = mean[at - 1], list[at] = list[at - 1];
      if (at < kept) mean[at] = norm, list[at] = static_cast<std::int32_t>(t), held += held < kept ? 1 : 0;
    }
    const auto size_k = s.d * static_cast<isize>(size_of(s.needs.kept_type)),
               size_v = s.e * static_cast<isize>(size_of(s.needs.kept_type));
    for (isize y = x * kept; s.needs.copies && y < (x + 1) * kept; ++y) {
      const isize t = s.small[y];
      simd::store_row<Arch, Acc>(s.needs.kept_type, load_any_row<Arch, Acc>(k, t, s.d, row), s.d,
                                 s.kept_k + y * size_k);
      simd::store_row<Arch, Acc>(s.needs.kept_type, load_any_row<Arch, Acc>(v, t, s.e, row), s.e,
                                 s.kept_v + y * size_v);
    }
    for (isize J = first / s.block_k; J < (first + s.needs.stretch) / s.block_k; ++J)
      for (isize y = 0; y < kept; ++y)
        if (list[y] / s.block_k == J) {
          means(J, list);
          break;
        }
  }

 private:
  Acc norm_of(isize t) const noexcept {
    const Acc* value = load_any_row<Arch, Acc>(v, t, s.e, row);
    return kernel::norm_above<Arch, Acc>(value, s.e);
  }
  /// Means of block J without the keys of `list` (null: with all; where no other key is left: with all, and members 0).
  void means(isize J, const std::int32_t* list) const noexcept {
    const isize part = s.block_k / s.needs.parts, j0 = J * s.block_k;
    const auto left = [&](isize t) {
      for (isize x = 0; list != nullptr && x < s.needs.kept; ++x)
        if (list[x] == t) return false;
      return true;
    };
    if (s.gate != nullptr || s.spread != nullptr) {
      mean_of(k, s.d, j0, j0 + s.block_k, left, s.spread == nullptr ? nullptr : s.spread + J * s.d);
      if (s.gate != nullptr) copy(mean, s.d, s.gate + J * s.d);
    }
    if (!s.needs.pools) return;
    const auto size = static_cast<isize>(size_of(s.needs.pool_type));
    for (isize x = 0, at = J * s.needs.parts; x < s.needs.parts; ++x, ++at) {
      const isize a = j0 + x * part;
      if (s.needs.sampled) {
        s.members[at] = static_cast<std::int32_t>(sample(at, a, a + part, left));
        continue;
      }
      if (!s.shared_means()) {
        mean_of(k, s.d, a, a + part, left, nullptr);
        simd::store_row<Arch, Acc>(s.needs.pool_type, mean, s.d, s.pool_k + at * s.d * size);
      }
      s.members[at] = static_cast<std::int32_t>(mean_of(v, s.e, a, a + part, left, nullptr));
      simd::store_row<Arch, Acc>(s.needs.pool_type, mean, s.e, s.pool_v + at * s.e * size);
    }
  }
  /// Pooled token `at`: one of the rows [a, b) that are left, zeros where none is; returns how many are left.
  template <class F>
  isize sample(isize at, isize a, isize b, F&& left) const noexcept {
    isize count = 0;
    for (isize t = a; t < b; ++t) count += left(t) ? 1 : 0;
    for (isize t = a, rank = count > 0 ? sampled_member(s.needs.seed, at, count) : b - a; t < b && rank >= 0; ++t)
      if (left(t) && rank-- == 0) a = t;
    const auto put = [&](const row_source& from, isize width, std::byte* rows) {
      const Acc* row_of = load_any_row<Arch, Acc>(from, a, width, row);
      for (isize c = 0; c < width; ++c) mean[c] = count > 0 ? row_of[c] : Acc(0);
      simd::store_row<Arch, Acc>(s.needs.pool_type, mean, width,
                                 rows + at * width * static_cast<isize>(size_of(s.needs.pool_type)));
    };
    put(k, s.d, s.pool_k), put(v, s.e, s.pool_v);
    return count;
  }
  /// mean = that of rows [a, b) that are left, or of all where none is; returns how many are left.
  template <class F>
  isize mean_of(const row_source& from, isize width, isize a, isize b, F&& left, Acc* deviation) const noexcept {
    isize count = 0;
    for (isize t = a; t < b; ++t) count += left(t) ? 1 : 0;
    for (isize t = a, seen = 0; t < b; ++t)
      if (count == 0 || left(t))
        fold_token<Arch>(load_any_row<Arch, Acc>(from, t, width, row), width, seen++, mean, deviation);
    return count;
  }
};

}  // namespace detail

/// Scratch of settle, in elements of Acc.
inline isize settle_scratch(const kv_needs& needs, isize d, isize e) {
  const isize wide = d > e ? d : e;
  return 2 * (ceil_div(wide > needs.kept ? wide : needs.kept, 16) * 16);
}

/// Takes in the blocks and stretches that end in (done, tokens]; `done`: what an earlier call has settled, as far as it is still true.
template <class Arch, class Acc>
FOVEA_NOINLINE void settle(const kv_summary<Acc>& s, isize done, isize tokens, const row_source& k, const row_source& v,
                           Acc* scratch) noexcept {
  const isize half = settle_scratch(s.needs, s.d, s.e) / 2;
  const detail::kv_settling<Arch, Acc> all{s, k, v, scratch, scratch + half};
  for (isize J = done / s.block_k; (J + 1) * s.block_k <= tokens; ++J) {
    all.block(J);
    if (s.needs.kept > 0 && (J + 1) * s.block_k % s.needs.stretch == 0)
      all.stretch_of(((J + 1) * s.block_k - 1) / s.needs.stretch);
  }
}

/// What `unfolded` needs.
template <class Acc>
struct kv_rows {
  std::int8_t* code = nullptr;  // [tokens x d], 4 bytes to spare
  Acc *mean_k = nullptr, *mean_v = nullptr;

  kv_rows() = default;
  kv_rows(arena& memory, const kv_needs& needs, isize tokens, isize block, isize d, isize e) {
    const isize pools = needs.pools && needs.levels > 0 ? ceil_div(tokens, block) * needs.parts : 0;
    if (needs.levels > 0) code = memory.take<std::int8_t>(tokens * d + 4);
    mean_k = memory.take<Acc>(pools * d), mean_v = memory.take<Acc>(pools * e);
  }
};

/// The same contents as a block_summary of `tokens` keys, for loops over many rows; blocks that are not whole hold zeros or anything finite.
template <class Arch, class Acc>
FOVEA_NOINLINE block_summary<Acc> unfolded(const kv_summary<Acc>& s, isize tokens, const kv_rows<Acc>& to) noexcept {
  block_summary<Acc> x;
  x.block_k = s.block_k, x.d = s.d, x.e = s.e, x.levels = s.needs.levels;
  x.parts = s.needs.parts, x.stretch = s.needs.stretch, x.kept = s.needs.kept;
  x.mean_k = s.gate, x.spread = s.spread, x.low = s.low, x.high = s.high, x.small = s.small, x.members = s.members;
  const isize whole = tokens / s.block_k, pools = whole * s.needs.parts;
  if (s.needs.levels > 0) {
    for (isize t = 0; t < whole * s.block_k; ++t) s.codes.get(s.code, t, to.code + t * s.d);
    for (isize t = whole * s.block_k * s.d; t < tokens * s.d + 4; ++t) to.code[t] = 0;
    x.code = to.code, x.step = s.step;
  }
  if (!s.needs.pools) return x;
  Acc *k = reinterpret_cast<Acc*>(s.pool_k), *v = reinterpret_cast<Acc*>(s.pool_v);
  if (s.needs.pool_type != dtype_of<Acc>) {
    simd::load_row<Arch, Acc>(s.needs.pool_type, s.pool_k, pools * s.d, to.mean_k);
    simd::load_row<Arch, Acc>(s.needs.pool_type, s.pool_v, pools * s.e, to.mean_v);
    k = to.mean_k, v = to.mean_v;
    const isize all = ceil_div(tokens, s.block_k) * s.needs.parts;
    for (isize c = pools * s.d; c < all * s.d; ++c) k[c] = Acc(0);
    for (isize c = pools * s.e; c < all * s.e; ++c) v[c] = Acc(0);
  }
  if (s.needs.parts > 1 || s.needs.sampled)
    x.part_k = k, x.part_v = v;
  else
    x.mean_k = k, x.mean_v = v;
  return x;
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
