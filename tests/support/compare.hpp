// SPDX-License-Identifier: MIT
#pragma once
/// @file  The one comparator of the repository.
///
///   |got - want| <= c * eps(acc) * scale + eps(stored) * |want|      every element
///   rms(got - want) <= (c * eps(acc) + eps(stored)) * rms(want)      all elements together
///
/// Contract   `want` is double and holds finite numbers and -inf only. `got` is finite wherever want is, and -inf exactly where
///            want is. Shapes are equal. `scale` is the largest finite |want| unless the caller gives the problem's own scale
///            (with which the second line uses max(rms(want), scale / 8)). Where want is all zeros and no scale is given, got must be too.
///            eps is the unit roundoff; eps(stored) is 0 for f32 and f64, whose rounding is part of c.

#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include <fovea/core/types.hpp>

namespace test {

using fovea::dtype;
using fovea::isize;

/// Numbers of any shape, row-major.
struct array {
  std::vector<isize> dims;
  std::vector<double> data;
};
inline isize product(const std::vector<isize>& dims) {
  isize p = 1;
  for (isize x : dims) p *= x;
  return p;
}

/// Unit roundoff: half the distance from 1 to the next number.
inline double eps(dtype t) {
  return t == dtype::f64 ? 0x1p-53 : t == dtype::f32 ? 0x1p-24 : t == dtype::f16 ? 0x1p-11 : 0x1p-8;
}

struct tolerance {
  double c = 16;              ///< how many roundings of the accumulator, of the size of `scale`
  dtype acc = dtype::f32;     ///< what the path computes in
  dtype stored = dtype::f32;  ///< what got was stored as
  double scale = 0;           ///< 0: the largest finite |want|
};

struct verdict {
  bool ok = false;
  std::string text;  ///< what is wrong and where; for a pass, the margins
  isize at = -1;     ///< the worst element, row-major
  double worst = 0;  ///< its error over its bound
  double rms = 0;    ///< the rms error over its bound
  explicit operator bool() const { return ok; }
};
inline std::ostream& operator<<(std::ostream& out, const verdict& v) { return out << v.text; }

namespace detail {
inline std::string position(const std::vector<isize>& dims, isize at) {
  std::vector<isize> index(dims.size());
  for (std::size_t i = dims.size(); i-- > 0; at /= dims[i]) index[i] = at % dims[i];
  std::ostringstream out;
  out << "[";
  for (std::size_t i = 0; i < index.size(); ++i) out << (i == 0 ? "" : ", ") << index[i];
  out << "]";
  return out.str();
}
inline std::string shape_text(const std::vector<isize>& dims) {
  std::ostringstream out;
  out << "[";
  for (std::size_t i = 0; i < dims.size(); ++i) out << (i == 0 ? "" : ", ") << dims[i];
  out << "]";
  return out.str();
}
inline double smallest_step(dtype t) { return t == dtype::f16 ? 0x1p-25 : t == dtype::bf16 ? 0x1p-134 : 0.0; }
inline double stored_eps(dtype t) { return t == dtype::f16 || t == dtype::bf16 ? eps(t) : 0.0; }
}  // namespace detail

inline verdict compare(const array& got, const array& want, const tolerance& t = {}) {
  verdict v;
  const auto reject = [&](isize at, const std::string& why) {
    std::ostringstream out;
    out.precision(17);
    out << why;
    if (at >= 0) {
      const auto i = static_cast<std::size_t>(at);
      out << " at " << detail::position(want.dims, at) << ": got " << got.data[i] << ", want " << want.data[i];
    }
    v.ok = false, v.at = at, v.text = out.str();
    return v;
  };
  if (got.dims != want.dims)
    return reject(-1, "shape " + detail::shape_text(got.dims) + ", want " + detail::shape_text(want.dims));
  if (static_cast<isize>(got.data.size()) != product(got.dims) || got.data.size() != want.data.size())
    return reject(-1, "the data does not fill the shape " + detail::shape_text(got.dims));

  const std::size_t count = want.data.size();
  double top = 0, sum_want = 0, sum_gap = 0;
  std::size_t finite = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const double g = got.data[i], w = want.data[i];
    const bool dead = w == -std::numeric_limits<double>::infinity();
    if (!dead && !std::isfinite(w)) return reject(static_cast<isize>(i), "the wanted value itself is not finite");
    if (dead != (g == -std::numeric_limits<double>::infinity()))
      return reject(static_cast<isize>(i), "-inf in the wrong place");
    if (dead) continue;
    if (!std::isfinite(g)) return reject(static_cast<isize>(i), std::isnan(g) ? "NaN" : "infinity");
    top = std::fmax(top, std::fabs(w));
    ++finite;
  }
  const double scale = t.scale > 0 ? t.scale : top, stored = detail::stored_eps(t.stored);
  for (std::size_t i = 0; i < count; ++i) {
    const double w = want.data[i];
    if (!std::isfinite(w)) continue;
    const double gap = std::fabs(got.data[i] - w);
    const double allowed = t.c * eps(t.acc) * scale + stored * std::fabs(w) + detail::smallest_step(t.stored);
    const double share = gap == 0 ? 0 : allowed > 0 ? gap / allowed : std::numeric_limits<double>::infinity();
    if (share > v.worst || v.at < 0) v.worst = share, v.at = static_cast<isize>(i);
    sum_want += w * w, sum_gap += gap * gap;
  }
  const double n = finite > 0 ? static_cast<double>(finite) : 1.0;
  const double rms_want = std::fmax(std::sqrt(sum_want / n), t.scale / 8), rms_gap = std::sqrt(sum_gap / n);
  const double rms_allowed = (t.c * eps(t.acc) + stored) * rms_want + detail::smallest_step(t.stored);
  v.rms = rms_gap == 0 ? 0 : rms_allowed > 0 ? rms_gap / rms_allowed : std::numeric_limits<double>::infinity();
  std::ostringstream margins;
  margins << " (worst error " << v.worst << " of its bound, rms " << v.rms << " of its bound, scale " << scale << ")";
  if (!(v.worst <= 1)) return reject(v.at, "too far" + margins.str());
  if (!(v.rms <= 1)) return reject(v.at, "rms too large" + margins.str());
  v.ok = true, v.text = "within" + margins.str();
  return v;
}

}  // namespace test

/// Fails with the verdict's sentence.
#define CHECK_CLOSE(...)                                         \
  do {                                                           \
    const ::test::verdict close_ = ::test::compare(__VA_ARGS__); \
    INFO(close_.text);                                           \
    CHECK(close_.ok);                                            \
  } while (false)
