// SPDX-License-Identifier: MIT
#pragma once
/// @file  Strided views [B, H, n, d] of the caller's memory; the last dimension is contiguous, all strides count elements.
///
///   element (b, h, i, c) = data[b * batch_stride + h * head_stride + i * row_stride + c]
///
/// Contract   a view never owns. `view<T>` is what callers make; `tensor_ref` and `tensor_mut` carry the element type at run
///            time, so that mechanisms are compiled once. A stride of 0 broadcasts (masks, biases); outputs must not overlap.

#include <type_traits>

#include <fovea/core/types.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <class T>
struct view {
  T* data = nullptr;
  isize batch = 0, heads = 0, length = 0, width = 0;
  isize batch_stride = 0, head_stride = 0, row_stride = 0;

  FOVEA_HD T* row(isize b, isize h, isize i) const {
    return data + b * batch_stride + h * head_stride + i * row_stride;
  }
  FOVEA_HD T& operator()(isize b, isize h, isize i, isize c) const { return row(b, h, i)[c]; }

  /// Rows [first, first + count) of every head.
  view slice(isize first, isize count) const {
    view v = *this;
    v.data = data == nullptr ? nullptr : data + first * row_stride;
    v.length = count;
    return v;
  }
  operator view<const T>() const  // NOLINT(google-explicit-constructor): adding const is always safe
      requires(!std::is_const_v<T>) {
    return {data, batch, heads, length, width, batch_stride, head_stride, row_stride};
  }
};

/// Dense [B, H, n, d].
template <class T>
constexpr view<T> bhnd(T* data, isize batch, isize heads, isize length, isize width) {
  return {data, batch, heads, length, width, heads * length * width, length * width, width};
}
/// Dense [B, n, H, d], the layout of engines that keep the heads of a token together.
template <class T>
constexpr view<T> bnhd(T* data, isize batch, isize length, isize heads, isize width) {
  return {data, batch, heads, length, width, length * heads * width, width, heads * width};
}

/// A view whose element type is known at run time. `Void` is `const void` (inputs) or `void` (outputs).
template <class Void>
struct erased_view {
  Void* data = nullptr;
  dtype type = dtype::f32;
  isize batch = 0, heads = 0, length = 0, width = 0;
  isize batch_stride = 0, head_stride = 0, row_stride = 0;

  erased_view() = default;
  erased_view(Void* p, dtype t, isize b, isize h, isize n, isize d, isize sb, isize sh, isize sn)
      : data(p), type(t), batch(b), heads(h), length(n), width(d), batch_stride(sb), head_stride(sh), row_stride(sn) {}
  template <storage_type T>
    requires(std::is_const_v<Void> || !std::is_const_v<T>)
  erased_view(const view<T>& v)  // NOLINT(google-explicit-constructor)
      : erased_view(v.data, dtype_of<T>, v.batch, v.heads, v.length, v.width, v.batch_stride, v.head_stride,
                    v.row_stride) {}
  template <class V>
    requires(std::is_const_v<Void>&& std::is_same_v<V, void>)
  erased_view(const erased_view<V>& v)  // NOLINT(google-explicit-constructor): adding const is always safe
      : erased_view(v.data, v.type, v.batch, v.heads, v.length, v.width, v.batch_stride, v.head_stride, v.row_stride) {}

  explicit operator bool() const { return data != nullptr; }
  isize offset(isize b, isize h, isize i) const { return b * batch_stride + h * head_stride + i * row_stride; }
  Void* row(isize b, isize h, isize i) const {
    using byte = std::conditional_t<std::is_const_v<Void>, const unsigned char, unsigned char>;
    return static_cast<byte*>(data) + offset(b, h, i) * static_cast<isize>(size_of(type));
  }
  erased_view slice(isize first, isize count) const {
    erased_view v = *this;
    if (data != nullptr && batch > 0 && heads > 0) v.data = row(0, 0, first);
    v.length = count;
    return v;
  }
  /// Batch item b alone, heads [h, h + count).
  erased_view part(isize b, isize h, isize count) const {
    erased_view v = *this;
    if (data != nullptr) v.data = row(b, h, 0);
    v.batch = 1;
    v.heads = count;
    return v;
  }
  double get(isize b, isize h, isize i, isize c) const { return load_as_double(type, data, offset(b, h, i) + c); }
  void set(isize b, isize h, isize i, isize c, double x) const requires(!std::is_const_v<Void>) {
    store_from_double(type, data, offset(b, h, i) + c, x);
  }
};

using tensor_ref = erased_view<const void>;
using tensor_mut = erased_view<void>;

/// Sizes of one attention problem, in the vocabulary of the documentation.
struct shape {
  isize B = 1, H = 1, G = 1, n = 0, m = 0, d = 0, e = 0;
  dtype type = dtype::f32;  ///< storage of q, k, v
  isize group() const { return G > 0 ? H / G : 0; }
};

/// Per-token gates of the recurrent rules (linear_attention says which it takes); null where there is none.
struct gates {
  tensor_ref log_decay = {};  ///< g [B, G, n, 1] (scalar) or [B, G, n, d] (a key channel), natural log, <= 0
  tensor_ref beta = {};       ///< write strength [B, G, n, 1]
  tensor_ref erase = {};      ///< b [B, G, n, d]
  tensor_ref write = {};      ///< w [B, G, n, e]
  bool any() const { return log_decay || beta || erase || write; }
};

/// What one call attends over. `lse` [B, H, n, 1] is optional (null: not wanted); its element type is f32, or f64 for f64 storage.
struct problem {
  tensor_ref q, k, v;
  tensor_mut out, lse;
  fovea::gates gates;
  const std::int32_t* positions = nullptr;  ///< [B, n] RoPE positions of the new tokens; null: bottom-right
  tensor_mut skipped = {};  ///< [B, H, n, 1] f32: the share of each row's mass that was skipped; optional
  fovea::shape shape() const { return {q.batch, q.heads, v.heads, q.length, k.length, q.width, v.width, q.type}; }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
