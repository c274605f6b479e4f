// SPDX-License-Identifier: MIT
#pragma once
/// @file  A block of up to 64 int8 keys and values for decode_int8: where they lie, and their scales, one lane a key.
///
/// Contract   rows are plain or packed, in one stretch, pages or a ring (core/rows.hpp). Packed rows are read from the beginning of their
///            tile of 16: the block's keys fill lanes [lead, lead + count), and the other lanes have scales of 0.

#include <cstring>

#include <fovea/core/rows.hpp>
#include <fovea/core/workspace.hpp>
#include <fovea/simd/pack.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Can decode_int8 read it?
inline bool takes_codes(const row_source& s) { return s.type == dtype::i8 && s.scale_row == 1; }

struct code_block {
  static constexpr isize keys = 64;
  isize first = 0, count = 0, lead = 0;
  bool packed = false;
  const std::byte *k[keys], *v[keys];  // plain: rows, up to a multiple of 16; packed: k tiles of 16, v groups of 4

  /// The block that begins with key j and ends before `last`.
  template <bool Packed>
  void find(const row_source& ks, const row_source& vs, isize j, isize last) noexcept {
    const slot_place at = ks.place(j);
    first = j, lead = Packed ? at.slot % packed_rows : 0, packed = Packed;
    count = keys - lead < last - j ? keys - lead : last - j;
    if (Packed && ks.ring > 0 && at.count < count) count = at.count;  // seams need not lie between tiles
    if constexpr (Packed) {
      for (isize x = 0; x < lead + count; x += packed_rows) {
        const isize row = x == 0 ? j : j - lead + x;
        const slot_place a = ks.place(row), b = vs.place(row);
        const isize tile = a.slot / packed_rows * packed_rows;
        k[x / packed_rows] = a.data + tile * ks.row_bytes;
        for (isize y = 0; y < packed_rows; y += 4) v[(x + y) / 4] = b.data + (tile + y) * vs.row_bytes;
      }
    } else {
      find_rows(ks, k), find_rows(vs, v);
    }
  }

  /// Lane x: its row, or as many bytes of its tile; all lanes' together are the block's keys.
  const std::byte* key(isize x, isize d) const noexcept {
    return packed ? k[x / packed_rows] + x % packed_rows * d : k[x];
  }

 private:
  void find_rows(const row_source& from, const std::byte** to) const noexcept {
    for (isize x = 0; x < count;) {
      const stretch s = from.at(first + x);
      const isize end = s.count < count - x ? x + s.count : count;
      for (const std::byte* p = s.data; x < end; ++x, p += from.row_bytes) to[x] = p;
    }
    for (isize x = count; x < ceil_div(count, packed_rows) * packed_rows; ++x) to[x] = to[count - 1];  // not used
  }
};

/// The scales of a block's lanes; those of V relative to the largest of them, `v_top`.
template <class Arch>
struct code_scales {
  static constexpr isize keys = code_block::keys;
  alignas(64) float k[keys];
  alignas(64) float v[keys];
  float v_top;
  std::uint64_t bad_values;  // lanes whose value has no numbers (a scale that is NaN); their v is 0

  void load(const row_source& ks, const row_source& vs, const code_block& b) noexcept {
    using P = simd::pack<float, Arch>;
    copy(ks, b, k), copy(vs, b, v);
    P top(0.0F), odd(0.0F);
    for (isize x = 0; x < keys; x += P::size) {
      const P y = P::load(v + x);
      top = simd::max(y, top), odd = simd::fma(y, P(0.0F), odd);
    }
    bad_values = 0;
    v_top = simd::highest(top);
    if (!(simd::reduce_add(odd) == 0.0F)) {
      v_top = 0;
      for (isize x = 0; x < keys; ++x) {
        if (!(v[x] - v[x] == 0.0F)) bad_values |= std::uint64_t{1} << x, v[x] = 0;
        v_top = v[x] > v_top ? v[x] : v_top;
      }
    }
    const P less(v_top > 0 ? 1.0F / v_top : 0.0F);
    for (isize x = 0; x < keys; x += P::size) (P::load(v + x) * less).store(v + x);
  }

 private:
  static void copy(const row_source& from, const code_block& b, float* to) noexcept {
    for (isize x = 0; x < b.lead; ++x) to[x] = 0;
    for (isize x = 0; x < b.count;) {
      const slot_place p = from.place(b.first + x);
      const isize some = p.count < b.count - x ? p.count : b.count - x;
      std::memcpy(to + b.lead + x, p.scales + p.slot, static_cast<std::size_t>(some) * sizeof(float));
      x += some;
    }
    for (isize x = b.lead + b.count; x < keys; ++x) to[x] = 0;
  }
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
