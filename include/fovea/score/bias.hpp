// SPDX-License-Identifier: MIT
#pragma once
/// @file  Biases out of a table: one number a pair (additive_bias), or one a distance (relative_bias; T5's buckets expanded).
///
///   additive_bias   s + table[b * batch_stride + h * head_stride + i * row_stride + j * key_stride]
///   relative_bias   s + table[h * (left + right + 1) + left + clamp(j - p, -left, right)],   p the row's position
///   t5_distances    the table of a relative_bias from T5's weights: bucket of a distance, then the weight of bucket and head
///
/// Contract   tables are the caller's; -inf hides a key. Extents, where given, are checked against the call.
/// Cost       additive: one read of the table; rows of keys are turned into columns a register block at a time. relative: one
///            look-up for each distance in a tile, not for each pair.
/// Source     Raffel et al., T5, arXiv 1910.10683; the bucket formula of the Mesh TensorFlow and Hugging Face code, in float as there.

#include <cmath>
#include <vector>

#include <fovea/mask/causal.hpp>
#include <fovea/score/derivative.hpp>
#include <fovea/score/lanes.hpp>
#include <fovea/simd/transpose.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline constexpr isize bias_columns = 16;  ///< keys that are turned at a time

/// to[y * W + l] = table[l * row_stride + y * key_stride] in units of log2, for l < rows <= W and y < columns; the other lanes 0.
template <class Acc>
FOVEA_NOINLINE void bias_block(const float* table, isize row_stride, isize key_stride, isize rows, isize columns,
                               Acc* to) {
  using V = score_pack<Acc>;
  if constexpr (std::is_same_v<Acc, float>)
    if (key_stride == 1) {
      for (isize y = 0; y < columns; y += V::size) {
        V x[V::size];
        for (isize l = 0; l < V::size; ++l)
          x[l] = l < rows ? simd::load_n<V>(table + l * row_stride + y, columns - y) * V(nats_to_log2<Acc>) : V(Acc(0));
        simd::transpose(x);
        for (isize z = 0; z < V::size && y + z < columns; ++z) x[z].store(to + (y + z) * V::size);
      }
      return;
    }
  for (isize y = 0; y < columns; ++y)
    for (isize l = 0; l < V::size; ++l)
      to[y * V::size + l] =
          l < rows ? static_cast<Acc>(table[l * row_stride + y * key_stride]) * nats_to_log2<Acc> : Acc(0);
}

}  // namespace detail

struct additive_bias {
  const float* table = nullptr;
  isize batch_stride = 0, head_stride = 0, row_stride = 0, key_stride = 1;
  table_extent extent = {};

  void check(const mask_site& at) const {
    require(table != nullptr || at.n == 0 || at.m == 0, "additive_bias has a null table; wanted ", at.n, " x ", at.m);
    extent.check("bias", at);
  }
  template <class T>
  FOVEA_HD T operator()(const mask_site& at, isize i, isize j, T s) const {
    return s + static_cast<T>(table[slot(at, i, j)]);
  }
  static constexpr bool unit_slope = true;
  template <class T>
  FOVEA_HD T slope(const mask_site&, isize, isize, T) const {
    return T(1);
  }
  FOVEA_HD isize slot(const mask_site& at, isize i, isize j) const {
    return at.b * batch_stride + at.h * head_stride + i * row_stride + j * key_stride;
  }
  table_axis axis(const mask_site& at) const {
    return detail::axis_of_strides(at, batch_stride, head_stride, row_stride, key_stride);
  }
  template <class Acc>
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile, isize stride) const {
    using V = detail::score_pack<Acc>;
    const float* from = table + slot(at, i0, j0);
    alignas(64) Acc turned[V::size * detail::bias_columns];
    if (count == 1 && stride == 1) {  // keys along the lanes
      if constexpr (std::is_same_v<Acc, float>)
        if (key_stride == 1)
          return detail::each_register(j1 - j0, tile, [&](V x, isize y) FOVEA_INLINE_LAMBDA {
            return simd::fma(simd::load_n<V>(from + y, j1 - j0 - y), V(detail::nats_to_log2<Acc>), x);
          });
      for (isize y = 0; y < j1 - j0; y += V::size) {
        const isize keys = j1 - j0 - y < V::size ? j1 - j0 - y : V::size;
        detail::bias_block(from + y * key_stride, key_stride, 0, keys, 1, turned);
        detail::add_row(keys, turned, tile + y);
      }
    } else if (row_stride == 0) {  // one number a key
      for (isize y = 0; y < j1 - j0; ++y)
        detail::add_constant(count, static_cast<Acc>(from[y * key_stride]) * detail::nats_to_log2<Acc>,
                             tile + y * stride);
    } else {
      for (isize l = 0; l < count; l += V::size)
        for (isize y = 0; y < j1 - j0; y += detail::bias_columns) {
          const isize rows = count - l < V::size ? count - l : V::size,
                      keys = j1 - j0 - y < detail::bias_columns ? j1 - j0 - y : detail::bias_columns;
          detail::bias_block(from + l * row_stride + y * key_stride, row_stride, key_stride, rows, keys, turned);
          for (isize z = 0; z < keys; ++z) detail::add_row(rows, turned + z * V::size, tile + (y + z) * stride + l);
        }
    }
  }
};

struct relative_bias {
  const float* table =
      nullptr;  ///< [heads][left + right + 1], by distance j - p from -left to right; farther keys take the ends
  isize left = 0, right = 0;
  isize heads = 0;  ///< 1: shared by all heads; 0: not checked, one a head
  alignment_of_rows align = bottom_right;

  void check(const mask_site& at) const {
    align.check();
    require(table != nullptr, "relative_bias has a null table; wanted [", at.H, "][left + right + 1]");
    require(left >= 0 && right >= 0, "relative_bias left, right are ", left, ", ", right,
            "; they must not be negative");
    require(heads <= 1 || heads == at.H, "relative_bias has ", heads, " heads; wanted ", at.H, " or 1");
  }
  template <class T>
  FOVEA_HD T operator()(const mask_site& at, isize i, isize j, T s) const {
    return s + static_cast<T>(table[slot(at, i, j)]);
  }
  static constexpr bool unit_slope = true;
  template <class T>
  FOVEA_HD T slope(const mask_site&, isize, isize, T) const {
    return T(1);
  }
  FOVEA_HD isize slot(const mask_site& at, isize i, isize j) const {
    return row_of(at) + clamped(j - align.position(at, i));
  }
  table_axis axis(const mask_site&) const { return heads == 1 ? table_axis::none : table_axis::heads; }
  template <class Acc>
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile, isize stride) const {
    constexpr isize most = 64;  // keys, and rows, at a time
    const float* from = table + row_of(at);
    Acc values[2 * most];
    const auto look_up = [&](isize distance, isize step, isize number) {
      for (isize x = 0; x < number; ++x)
        values[x] = static_cast<Acc>(from[clamped(distance + step * x)]) * detail::nats_to_log2<Acc>;
    };
    for (isize y = 0; y < j1 - j0; y += most) {
      const isize keys = j1 - j0 - y < most ? j1 - j0 - y : most;
      if (count == 1 && stride == 1) {
        look_up(j0 + y - align.position(at, i0), 1, keys);
        detail::add_row(keys, values, tile + y);
        continue;
      }
      for (isize l = 0; l < count; l += most) {  // values[x]: the distance of row l to the last key, less x
        const isize rows = count - l < most ? count - l : most;
        look_up(j0 + y + keys - 1 - align.position(at, i0 + l), -1, keys + rows - 1);
        for (isize z = 0; z < keys; ++z) detail::add_row(rows, values + (keys - 1 - z), tile + (y + z) * stride + l);
      }
    }
  }

 private:
  FOVEA_HD isize row_of(const mask_site& at) const { return heads == 1 ? 0 : at.h * (left + right + 1); }
  FOVEA_HD isize clamped(isize distance) const {
    return left + (distance < -left ? -left : distance > right ? right : distance);
  }
};

/// T5's bucket of a distance = key position - row position.
inline isize t5_bucket(isize distance, isize buckets, isize max_distance, bool bidirectional) {
  isize first = 0;
  if (bidirectional) {
    buckets /= 2;
    if (distance > 0) first = buckets;
  }
  const isize away = bidirectional ? (distance < 0 ? -distance : distance) : (distance < 0 ? -distance : 0);
  const isize exact = buckets / 2;
  if (away < exact) return first + away;
  const float share = std::log(static_cast<float>(away) / static_cast<float>(exact)) /
                      static_cast<float>(std::log(static_cast<double>(max_distance) / static_cast<double>(exact)));
  const isize far = exact + static_cast<isize>(share * static_cast<float>(buckets - exact));
  return first + (far < buckets ? far : buckets - 1);
}

/// The table of relative_bias{table, max_distance, bidirectional ? max_distance : 0, heads} from weights [buckets][heads] (the layout of
/// T5's relative_attention_bias.weight) or, `heads_first`, [heads][buckets].
inline std::vector<float> t5_distances(const float* weights, isize heads, isize buckets, isize max_distance,
                                       bool bidirectional, bool heads_first = false) {
  const isize exact = (bidirectional ? buckets / 2 : buckets) / 2;
  require(weights != nullptr && heads >= 1, "t5_distances has ", weights == nullptr ? "null" : "given", " weights of ",
          heads, " heads; wanted [buckets][heads]");
  require(exact >= 1 && max_distance > exact, "t5 buckets, max_distance are ", buckets, ", ", max_distance,
          "; wanted at least ", bidirectional ? 4 : 2, " buckets, and a max_distance above ", exact);
  const isize right = bidirectional ? max_distance : 0, width = max_distance + right + 1;
  std::vector<float> table(static_cast<std::size_t>(heads * width));
  for (isize h = 0; h < heads; ++h)
    for (isize distance = -max_distance; distance <= right; ++distance) {
      const isize bucket = t5_bucket(distance, buckets, max_distance, bidirectional);
      table[static_cast<std::size_t>(h * width + max_distance + distance)] =
          weights[heads_first ? h * buckets + bucket : bucket * heads + h];
    }
  return table;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
