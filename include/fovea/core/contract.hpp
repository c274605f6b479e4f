// SPDX-License-Identifier: MIT
#pragma once
/// @file  The one error channel: `contract_error`, thrown by the public interface before anything is written.
///
/// Contract   every message names the argument, the value it had and what was wanted.
/// Errors     builds with -fno-exceptions call FOVEA_ABORT(message) instead (core/config.hpp).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>

#include <fovea/core/view.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct contract_error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

[[noreturn]] inline void fail(const std::string& message) {
#if defined(FOVEA_HAS_EXCEPTIONS)
  throw contract_error("fovea: " + message);
#else
  FOVEA_ABORT(message.c_str());
  std::abort();
#endif
}

namespace detail {
/// All arguments in one string, by operator<<.
template <class... Args>
std::string sentence(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}
}  // namespace detail

/// require(x > 0, "scale is ", x, "; it must be positive")
template <class... Args>
void require(bool condition, const Args&... args) {
  if (!condition) [[unlikely]]
    fail(detail::sentence(args...));
}

inline void require_finite(const char* name, double x) {
  require(std::isfinite(x), name, " is ", x, "; it must be a finite number");
}

namespace detail {

/// The sizes of a view for a sentence. Text is made only when the sentence is: a call that is in order pays for none.
struct described {
  isize batch, heads, length, width;
  dtype type;
  friend std::ostream& operator<<(std::ostream& out, const described& t) {
    return out << '[' << t.batch << ", " << t.heads << ", " << t.length << ", " << t.width << "] " << name_of(t.type);
  }
};
template <class Void>
described describe(const erased_view<Void>& t) {
  return {t.batch, t.heads, t.length, t.width, t.type};
}

/// Elements of an output share no memory: each stride spans all that the smaller ones reach.
inline bool elements_apart(const tensor_mut& t) {
  struct axis {
    isize count, stride;
  } axes[] = {{t.batch, t.batch_stride}, {t.heads, t.head_stride}, {t.length, t.row_stride}};
  std::sort(std::begin(axes), std::end(axes), [](const axis& a, const axis& b) { return a.stride < b.stride; });
  isize reach = t.width;
  for (const axis& a : axes) {
    if (a.count <= 1) continue;
    if (a.stride < reach) return false;
    reach += (a.count - 1) * a.stride;
  }
  return true;
}

template <class Void>
void check_tensor(const char* name, const erased_view<Void>& t) {
  require(t.batch >= 0 && t.heads >= 0 && t.length >= 0 && t.width >= 0, name, " is ", describe(t),
          "; sizes must not be negative");
  require(t.type != dtype::i8, name, " is i8; int8 rows stand in KV stores, with their scales");
  const bool empty = t.batch == 0 || t.heads == 0 || t.length == 0 || t.width == 0;
  require(t.data != nullptr || empty, name, " is null; wanted memory for ", describe(t));
  require(t.length <= 1 || t.row_stride >= t.width, name, " has a row stride of ", t.row_stride,
          " elements; rows of width ", t.width, " must not overlap");
  require((t.batch <= 1 || t.batch_stride >= 0) && (t.heads <= 1 || t.head_stride >= 0), name,
          " has batch and head strides of ", t.batch_stride, ", ", t.head_stride, "; strides must not be negative");
  if constexpr (!std::is_const_v<Void>)
    require(empty || elements_apart(t), name, " has strides of ", t.batch_stride, ", ", t.head_stride, ", ",
            t.row_stride, " elements for ", describe(t), "; elements of an output must not share memory");
}

struct byte_range {
  std::uintptr_t first = 0, last = 0;  // [first, last)
};
/// The smallest byte range that holds every element (no stride is negative, by check_tensor).
template <class Void>
byte_range extent(const erased_view<Void>& t) {
  if (t.data == nullptr || t.batch <= 0 || t.heads <= 0 || t.length <= 0 || t.width <= 0) return {};
  const auto base = reinterpret_cast<std::uintptr_t>(t.data);
  const isize span =
      (t.batch - 1) * t.batch_stride + (t.heads - 1) * t.head_stride + (t.length - 1) * t.row_stride + t.width;
  return {base, base + static_cast<std::uintptr_t>(span) * size_of(t.type)};
}

template <class A, class B>
void check_apart(const char* a_name, const erased_view<A>& a, const char* b_name, const erased_view<B>& b) {
  const auto x = extent(a), y = extent(b);
  require(x.first == x.last || y.first == y.last || x.last <= y.first || y.last <= x.first, a_name, " overlaps ",
          b_name, " in memory; outputs need memory of their own");
}

/// Shapes, nulls, element types and aliasing of q, k, v, out and lse: the part of the contract that all mechanisms share.
inline void check_problem(const problem& p) {
  require(!p.gates.any(), "gates (decay, beta, erase, write) were given; this mechanism has none");
  check_tensor("q", p.q), check_tensor("k", p.k), check_tensor("v", p.v), check_tensor("out", p.out);
  require(p.k.batch == p.q.batch && p.v.batch == p.q.batch && p.out.batch == p.q.batch,
          "the batch sizes of q, k, v, out are ", p.q.batch, ", ", p.k.batch, ", ", p.v.batch, ", ", p.out.batch,
          "; they must be equal");
  require(p.k.heads == p.v.heads, "k has ", p.k.heads, " heads and v has ", p.v.heads, "; they must be equal");
  require(p.k.heads > 0 ? p.q.heads % p.k.heads == 0 : p.q.heads == 0, "q has ", p.q.heads, " heads and k has ",
          p.k.heads, "; the query heads must be a multiple of the KV heads");
  require(p.k.width == p.q.width, "q is ", p.q.width, " wide and k is ", p.k.width, "; they must be equal");
  require(p.k.length == p.v.length, "k holds ", p.k.length, " keys and v holds ", p.v.length,
          " values; they must be equal");
  require(p.q.width > 0 && p.v.width > 0, "q is ", p.q.width, " and v is ", p.v.width,
          " wide; widths must be positive");
  require(p.out.heads == p.q.heads && p.out.length == p.q.length && p.out.width == p.v.width, "out is ",
          describe(p.out), "; wanted [", p.q.batch, ", ", p.q.heads, ", ", p.q.length, ", ", p.v.width, "]");
  require(p.k.type == p.q.type && p.v.type == p.q.type, "q, k, v are stored as ", name_of(p.q.type), ", ",
          name_of(p.k.type), ", ", name_of(p.v.type), "; they must be of one type");
  require((p.out.type == dtype::f64) == (p.q.type == dtype::f64), "out is ", name_of(p.out.type), " and q is ",
          name_of(p.q.type), "; f64 goes with f64 only");
  check_apart("out", p.out, "q", p.q), check_apart("out", p.out, "k", p.k), check_apart("out", p.out, "v", p.v);
  if (p.lse) {
    check_tensor("lse", p.lse);
    require(p.lse.batch == p.q.batch && p.lse.heads == p.q.heads && p.lse.length == p.q.length && p.lse.width == 1,
            "lse is ", describe(p.lse), "; wanted [", p.q.batch, ", ", p.q.heads, ", ", p.q.length, ", 1]");
    require(p.lse.type == (p.q.type == dtype::f64 ? dtype::f64 : dtype::f32), "lse is ", name_of(p.lse.type),
            "; it is f32, or f64 when q is f64");
    check_apart("lse", p.lse, "q", p.q), check_apart("lse", p.lse, "k", p.k), check_apart("lse", p.lse, "v", p.v);
    check_apart("lse", p.lse, "out", p.out);
  }
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
