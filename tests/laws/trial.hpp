// SPDX-License-Identifier: MIT
#pragma once
/// @file  What the laws are written with: shapes to try, inputs, checked calls, and `broken`, thrown where a law does not hold.

#include <algorithm>
#include <numeric>

#include "laws/laws.hpp"

namespace laws {

using test::layout;

struct broken : std::runtime_error {
  using std::runtime_error::runtime_error;
};
template <class... Args>
inline void demand(bool holds, const Args&... args) {
  if (!holds) throw broken(fovea::detail::sentence(args...));
}

struct trial {
  shape s;
  layout l;
  dtype out;
  std::string text() const {
    return fovea::detail::sentence("B, H, G, n, m, d, e = ", s.B, ", ", s.H, ", ", s.G, ", ", s.n, ", ", s.m, ", ", s.d,
                                   ", ", s.e, ", ", fovea::name_of(s.type), " -> ", fovea::name_of(out), ", ",
                                   test::name_of(l), ": ");
  }
};

constexpr shape shapes[] = {
    // B, H, G, n, m, d, e
    {1, 1, 1, 1, 1, 1, 1},       {1, 1, 1, 2, 2, 17, 17},     {2, 3, 1, 17, 17, 40, 24},   {1, 9, 3, 33, 33, 64, 64},
    {1, 2, 2, 130, 130, 80, 96}, {2, 1, 1, 17, 33, 128, 128}, {1, 2, 1, 33, 17, 64, 40},   {1, 4, 2, 1, 130, 256, 64},
    {2, 2, 2, 2, 130, 96, 17},   {1, 1, 1, 130, 33, 17, 64},  {1, 3, 3, 33, 130, 40, 256}, {2, 6, 2, 130, 130, 24, 24},
    {1, 2, 2, 33, 33, 128, 80},  {3, 2, 1, 130, 130, 17, 1},  {1, 1, 1, 33, 33, 256, 256}, {1, 1, 1, 0, 17, 64, 64},
    {1, 2, 1, 17, 0, 64, 64},    {1, 1, 1, 33, 33, 96, 96},
};
constexpr dtype types[] = {dtype::f32, dtype::bf16, dtype::f64, dtype::f16};

/// Calls f(trial) for the accepted shapes that `wanted` picks, every `stride`-th of them from `start`; at least one must be left.
template <class Wanted, class F>
std::string over_shapes(const subject& subject, std::size_t start, std::size_t stride, Wanted&& wanted, F&& f) {
  std::size_t accepted = 0, tried = 0, seen = 0;
  for (const shape& s : shapes) accepted += wanted(s) && subject.accepts(s) ? 1 : 0;
  if (accepted < 3 * stride) stride = 1;
  for (std::size_t x = 0; x < std::size(shapes); ++x) {
    shape s = shapes[x];
    s.type = types[(x + start) % 4];
    if (!wanted(s) || !subject.accepts(s)) continue;
    if ((seen++ + start) % stride != 0) continue;
    trial t{s, test::layouts[(x / 2 + start) % 4], s.type};
    if (fovea::size_of(s.type) == 2 && x % 3 == 0) t.out = dtype::f32;
    ++tried;
    try {
      f(t);
    } catch (const std::exception& e) {
      return t.text() + e.what();
    }
  }
  return tried > 0 ? std::string() : "no shape was tried: this law would hold for anything";
}
inline bool any_shape(const shape&) { return true; }
inline bool whole_sequence(const shape& s) { return s.n == s.m && s.n > 0; }

inline inputs make_inputs(const subject& subject, const trial& t, std::uint64_t seed, double deviation = 1.0) {
  test::random r(seed + static_cast<std::uint64_t>(t.s.n * 1000 + t.s.d));
  inputs x;
  x.q = test::normal(r, t.s.type, t.s.B, t.s.H, t.s.n, t.s.d, t.l, deviation);
  x.k = test::normal(r, t.s.type, t.s.B, t.s.G, t.s.m, t.s.d, t.l, deviation);
  x.v = test::normal(r, t.s.type, t.s.B, t.s.G, t.s.m, t.s.e, t.l);
  subject.adjust(r, x);
  return x;
}

struct result {
  tensor out, lse;
};
/// NaN-filled outputs for x.
inline result outputs(const subject& subject, const inputs& x, dtype type, layout l) {
  result y;
  y.out = test::unwritten(type, x.q.batch(), x.q.heads(), x.q.length(), x.v.width(), l);
  if (subject.promises.lse)
    y.lse = test::unwritten(x.q.type() == dtype::f64 ? dtype::f64 : dtype::f32, x.q.batch(), x.q.heads(), x.q.length(),
                            1, l);
  return y;
}
inline call_options options(const inputs& x, result& y) {
  call_options o;
  if (y.lse.size() > 0) o.lse = y.lse;
  o.gates = x.gates();
  return o;
}
inline void demand_guards(const inputs& x, const result& y) {
  demand(y.out.guards_intact(), "memory beside out was written");
  demand(y.lse.size() == 0 || y.lse.guards_intact(), "memory beside lse was written");
  demand(x.q.guards_intact() && x.k.guards_intact() && x.v.guards_intact(), "memory beside an input was written");
}
inline result call(const subject& subject, const instance& m, exec_ref exec, const inputs& x, const trial& t) {
  result y = outputs(subject, x, t.out, t.l);
  m.prefill(exec, x, y.out, options(x, y));
  demand_guards(x, y);
  return y;
}
inline result call(const subject& subject, const instance& m, exec_ref exec, const inputs& x, const trial& t,
                   state& s) {
  result y = outputs(subject, x, t.out, t.l);
  m.prefill(exec, x, y.out, s, options(x, y));
  demand_guards(x, y);
  return y;
}
inline result reference(const subject& subject, const instance& m, const inputs& x) {
  result want;
  want.out = test::unwritten(dtype::f64, x.q.batch(), x.q.heads(), x.q.length(), x.v.width());
  if (subject.promises.lse) want.lse = test::unwritten(dtype::f64, x.q.batch(), x.q.heads(), x.q.length(), 1);
  tensor_mut lse;
  if (want.lse.size() > 0) lse = want.lse;
  m.reference(x, want.out, lse);
  return want;
}

/// `strain`: how much larger than 1 the logits are.
inline void demand_close(const subject& subject, const result& got, const result& want, const trial& t,
                         double strain = 1.0) {
  const dtype acc = t.s.type == dtype::f64 ? dtype::f64 : dtype::f32;
  const auto close = test::compare(got.out.values(), want.out.values(),
                                   {.c = subject.promises.c * strain, .acc = acc, .stored = got.out.type()});
  demand(close.ok, "out: ", close.text);
  if (got.lse.size() == 0) return;
  const auto sums =
      test::compare(got.lse.values(), want.lse.values(),
                    {.c = subject.promises.c * strain, .acc = acc, .stored = got.lse.type(), .scale = 4.0 * strain});
  demand(sums.ok, "lse: ", sums.text);
}
inline void demand_same(const result& a, const result& b, const char* what) {
  const std::string out = test::bits_differ(a.out, b.out),
                    lse = a.lse.size() > 0 ? test::bits_differ(a.lse, b.lse) : "";
  demand(out.empty(), what, ": out differs at ", out);
  demand(lse.empty(), what, ": lse differs at ", lse);
}
/// The rows of several calls, one after the other.
struct joined {
  result all;
  isize at = 0;
  void add(const result& part) {
    for (const auto& [to, from] : {std::pair{&all.out, &part.out}, std::pair{&all.lse, &part.lse}})
      for (isize b = 0; b < from->batch(); ++b)
        for (isize h = 0; h < from->heads(); ++h)
          for (isize i = 0; i < from->length(); ++i)
            for (isize c = 0; c < from->width(); ++c) to->set(b, h, at + i, c, from->get(b, h, i, c));
    at += part.out.length();
  }
};

}  // namespace laws
