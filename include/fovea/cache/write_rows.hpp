// SPDX-License-Identifier: MIT
#pragma once
/// @file  Rows on their way into a KV store: copied, converted, turned (RoPE) and quantised by one function, and read back.
///
///   int8      x -> round(x / scale), scale = max |x| / 127 over the row, or over each 32 elements of it
///
/// Contract   any float type goes into any store type; same type and no rope is a copy of the bits. A NaN or infinity in an int8 row (or
///            group of 32) makes its scale NaN: every element of that row or group reads as NaN, so that whoever reads it sees it.
/// Numerics   |x - stored| <= max |x| / 254 per row or group; magnitudes below 2^-119 are stored as 0.
/// Cost       one pass over a row (two for int8). No allocation: `row_writer` works in the caller's scratch.

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include <fovea/core/kv_layout.hpp>
#include <fovea/position/rope.hpp>
#include <fovea/simd/convert.hpp>
#include <fovea/simd/rotate_row.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// Where new keys are turned to before they are stored: token i to positions[i], or to first + i where that is null.
struct key_positions {
  const rope* turn = nullptr;  ///< null: stored as they come
  isize first = 0;
  const std::int32_t* positions = nullptr;
  isize of(isize i) const { return positions != nullptr ? positions[i] : first + i; }
};

namespace detail {

/// Turns a row that was turned at position p as if it had been turned at p - count: the angles of all scalings grow in
/// proportion to the position. YaRN's magnitude, which is in the row already, is taken out of the table.
template <class T>
void shift_position(const rope& r, isize count, T* row) noexcept {
  const isize half = r.width / 2, at = count * half, step = r.pair == rope::pairing::neox ? 1 : 2,
              apart = r.pair == rope::pairing::neox ? half : 1;
  const bool wide = sizeof(T) == sizeof(double) && r.cos_f64 != nullptr;
  for (isize i = 0; i < half; ++i) {
    double c = wide ? r.cos_f64[at + i] : static_cast<double>(r.cos[at + i]),
           s = wide ? r.sin_f64[at + i] : static_cast<double>(r.sin[at + i]);
    const double size = std::sqrt(c * c + s * s);
    c /= size, s /= size;
    T &x = row[i * step], &y = row[i * step + apart];
    const double a = static_cast<double>(x), b = static_cast<double>(y);
    x = static_cast<T>(a * c + b * s);
    y = static_cast<T>(b * c - a * s);
  }
}

/// n numbers -> int8 and their scale. Never inlined: a row has the same bits wherever it was written from.
template <class Acc>
FOVEA_NOINLINE void quantise(const Acc* x, isize n, std::int8_t* out, float* scale) noexcept {
  Acc most = 0, sum = 0;
  for (isize c = 0; c < n; ++c) {
    const Acc size = x[c] < 0 ? -x[c] : x[c];
    most = size > most ? size : most;
    sum += size * Acc(0);  // NaN as soon as an element is NaN or infinite
  }
  const bool bad = !(sum == Acc(0)) || most > static_cast<Acc>(std::numeric_limits<float>::max());
  *scale = bad ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(most) / 127.0F;
  if (bad || most < static_cast<Acc>(0x1p-119)) {
    if (!bad) *scale = 0.0F;
    std::memset(out, 0, static_cast<std::size_t>(n));
    return;
  }
  const float inverse = 127.0F / static_cast<float>(most);
  constexpr float magic = 0x1.8p23F;  // its last bits are the integer, rounded to nearest even
  for (isize c = 0; c < n; ++c) {
    const float t = static_cast<float>(x[c]) * inverse + magic;
    out[c] = static_cast<std::int8_t>(std::bit_cast<std::int32_t>(t) - std::bit_cast<std::int32_t>(magic));
  }
}

/// Plain: the codes' own place. Packed: `codes` [width] on their way to or from it.
inline std::int8_t* codes_of(const kv_layout::place& at, std::int8_t* codes) {
  return at.form == row_form::plain ? reinterpret_cast<std::int8_t*>(at.data) : codes;
}
/// `codes` [width] is used by packed rows only.
template <class Acc>
void store_row_at(const kv_shape& s, const Acc* row, isize width, const kv_layout::place& to,
                  std::int8_t* codes) noexcept {
  if (s.type != dtype::i8) return simd::store_row<simd::native, Acc>(s.type, row, width, to.data);
  std::int8_t* const out = codes_of(to, codes);
  const isize run = s.scale == scale_per::row ? width : scale_group;
  for (isize c = 0, x = 0; c < width; c += run, ++x)
    quantise(row + c, width - c < run ? width - c : run, out + c, to.scales + x);
  if (to.form != row_form::plain) store_codes(to.form, to.data, to.bytes, to.slot, width, out);
}
template <class Acc>
void load_row_at(const kv_shape& s, const kv_layout::place& from, isize width, Acc* row, std::int8_t* codes) noexcept {
  if (s.type != dtype::i8) return simd::load_row<simd::native, Acc>(s.type, from.data, width, row);
  if (from.form != row_form::plain) load_codes(from.form, from.data, from.bytes, from.slot, width, codes);
  simd::load_scaled_row<simd::native, Acc>(codes_of(from, codes), from.scales, from.scale_count, width, row);
}

/// A packed row from one slot to another.
inline void move_codes(const kv_layout::place& from, isize width, const kv_layout::place& to) noexcept {
  if (to.form == row_form::packed_keys)
    for (isize c = 0; c < width; c += 4)
      std::memcpy(to.data + packed_key_at(to.slot, c, to.bytes), from.data + packed_key_at(from.slot, c, from.bytes),
                  4);
  else
    for (isize c = 0; c < width; ++c)
      to.data[packed_value_at(to.slot, c, to.bytes)] = from.data[packed_value_at(from.slot, c, from.bytes)];
}

/// Writes rows of one width. `scratch` holds that many doubles.
class row_writer {
 public:
  row_writer(const kv_shape& s, double* scratch) : shape_(s), scratch_(scratch) {}

  /// `rotated`: a key of a store of rotated keys.
  void write(dtype type, const void* row, isize width, const rope* turn, isize position, const kv_layout::place& to,
             bool rotated = false) const noexcept {
    if (type == shape_.type && turn == nullptr)
      std::memcpy(to.data, row, static_cast<std::size_t>(to.bytes));
    else if (type == dtype::f64 || shape_.type == dtype::f64)
      write_as(scratch_, type, row, width, turn, position, to, rotated);
    else
      write_as(reinterpret_cast<float*>(scratch_), type, row, width, turn, position, to, rotated);
  }
  /// A row of the store moves to another place; its key is turned by `turn_back` positions towards 0 (0: not at all).
  void move(const kv_layout::place& from, isize width, const rope* turn, isize turn_back,
            const kv_layout::place& to) const noexcept {
    if (turn == nullptr || turn_back == 0) {
      if (from.data == to.data && from.slot == to.slot) return;
      if (to.form == row_form::plain)
        std::memmove(to.data, from.data, static_cast<std::size_t>(to.bytes));
      else
        move_codes(from, width, to);
      for (isize x = 0; x < to.scale_count; ++x) to.scales[x] = from.scales[x];
    } else if (shape_.type == dtype::f64) {
      move_as(scratch_, from, width, *turn, turn_back, to);
    } else {
      move_as(reinterpret_cast<float*>(scratch_), from, width, *turn, turn_back, to);
    }
  }

 private:
  /// Behind `width` floats; int8 stores have no doubles.
  std::int8_t* codes(isize width) const { return reinterpret_cast<std::int8_t*>(scratch_) + 4 * width; }
  static void turn_over([[maybe_unused]] double* x, [[maybe_unused]] isize width) noexcept {}
  static void turn_over(float* x, isize width) noexcept { simd::rotate_row<simd::native>(x, width); }

  template <class Acc>
  void write_as(Acc* x, dtype type, const void* row, isize width, const rope* turn, isize position,
                const kv_layout::place& to, bool rotated) const noexcept {
    simd::load_row<simd::native, Acc>(type, row, width, x);
    if (turn != nullptr) rotate(*turn, position, x);
    if (rotated) turn_over(x, width);
    store_row_at(shape_, x, width, to, codes(width));
  }
  template <class Acc>
  void move_as(Acc* x, const kv_layout::place& from, isize width, const rope& turn, isize turn_back,
               const kv_layout::place& to) const noexcept {
    load_row_at(shape_, from, width, x, codes(width));
    if (shape_.rotated) turn_over(x, width);  // its own inverse
    shift_position(turn, turn_back, x);
    if (shape_.rotated) turn_over(x, width);
    store_row_at(shape_, x, width, to, codes(width));
  }

  kv_shape shape_;
  double* scratch_;
};

/// Tokens [first, first + count) of item b of k and v, KV heads [0, heads), into the places that `block_of(token, row)` names: it returns
/// the block and sets the row. `head` of the block is where KV head 0 goes.
template <class BlockOf>
void write_tokens(const kv_layout& layout, const row_writer& writer, const tensor_ref& k, const tensor_ref& v, isize b,
                  isize heads, isize head, isize first, isize count, const key_positions& at,
                  BlockOf&& block_of) noexcept {
  const kv_shape& s = layout.shape();
  for (isize g = 0; g < heads; ++g)
    for (isize i = first; i < first + count; ++i) {
      isize row = 0;
      std::byte* const block = block_of(i, row);
      writer.write(k.type, k.row(b, g, i), s.d, at.turn, at.of(i), layout.key(block, head + g, row), s.rotated);
      if (!s.values_in_keys) writer.write(v.type, v.row(b, g, i), s.e, nullptr, 0, layout.value(block, head + g, row));
    }
}

inline void check_kv_shape(const char* what, const kv_shape& s) {
  require(s.heads >= 1 && s.d >= 1 && s.e >= 1, what, ": heads, d, e are ", s.heads, ", ", s.d, ", ", s.e,
          "; they must be at least 1");
  require(s.type <= dtype::i8, what, ": the type of its rows is not one of f32, f64, bf16, f16, i8");
  require(!s.values_in_keys || s.e <= s.d, what, ": values are ", s.e, " wide and keys ", s.d,
          "; values that lie in the keys are not wider");
  require(s.form == kv_form::rows || (s.type == dtype::i8 && s.scale == scale_per::row && !s.values_in_keys), what,
          ": packed rows are int8 with a scale a row, and their values are not in their keys");
  require(!s.rotated || (s.type == dtype::i8 && !s.values_in_keys), what,
          ": rotated keys are int8, and their values are not in them");
}

/// What may be appended to a store of this shape: [1, heads, n, d] and [1, heads, n, e] of float types.
inline void check_append(const char* what, const kv_shape& s, const tensor_ref& k, const tensor_ref& v,
                         const key_positions& at) {
  check_tensor("k", k);
  require(k.batch == 1 && k.heads == s.heads && k.width == s.d, "k is ", describe(k), "; the ", what, " wants [1, ",
          s.heads, ", n, ", s.d, "]");
  if (!s.values_in_keys) {
    check_tensor("v", v);
    require(v.batch == 1 && v.heads == s.heads && v.width == s.e && v.length == k.length, "v is ", describe(v),
            "; the ", what, " wants [1, ", s.heads, ", ", k.length, ", ", s.e, "]");
  }
  require((k.type == dtype::f64) == (s.type == dtype::f64) && (s.values_in_keys || v.type == k.type), "k is ",
          name_of(k.type), ", v is ", name_of(v.type), " and the ", what, " stores ", name_of(s.type),
          "; k and v are of one type, and f64 goes with f64 only");
  require(at.turn == nullptr || !s.values_in_keys, "the ", what,
          " has its values in its keys: turn the keys before they are appended, the values would turn with them");
  if (at.turn == nullptr || k.length == 0) return;
  isize low = at.of(0), high = low;
  for (isize i = 0; i < k.length; ++i) {
    low = at.of(i) < low ? at.of(i) : low;
    high = at.of(i) > high ? at.of(i) : high;
  }
  require(low >= 0, "a key's position is ", low, "; positions must not be negative");
  at.turn->check(s.d, high);
}

/// What a context shift by `count` after the first `keep` of `tokens` needs.
inline void check_shift(const char* what, const kv_shape& s, isize tokens, isize count, isize keep, const rope* turn) {
  require(count >= 0 && keep >= 0 && count <= tokens - keep, "shift drops ", count, " tokens after the first ", keep,
          "; the ", what, " holds ", tokens);
  require(turn == nullptr || !s.values_in_keys, "the ", what,
          " has its values in its keys: turning the keys would turn the values");
  if (turn != nullptr) turn->check(s.d, count);
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
