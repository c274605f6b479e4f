// SPDX-License-Identifier: MIT
#pragma once
/// @file  The simplest KV store: vectors of rows in double, with which every store is compared.
///
/// A model takes the numbers that the store has written (after it has seen that they are near enough to those appended), so that
/// whatever moves rows must leave them as they are, bit by bit, and attention over them can be computed in double.

#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include <fovea/cache/paged_pool.hpp>
#include <fovea/softmax.hpp>
#include <fovea/softmax/reference.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace cache_test {

using namespace fovea;
using test::tensor;

/// The Walsh-Hadamard rotation from its definition: element (i, j) is (-1)^(bits that i and j share) / sqrt(b).
inline std::vector<double> rotated(const std::vector<double>& x) {
  const std::size_t n = x.size(), b = n & (~n + 1);
  std::vector<double> y(n);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < b; ++j)
      y[i] += (std::popcount(i % b & j) % 2 == 0 ? 1 : -1) * x[i / b * b + j] / std::sqrt(static_cast<double>(b));
  return y;
}

/// Row j of a head, as a reader sees it: codes are unpacked and keys turned back.
inline std::vector<double> read_row(const row_source& rows, isize j, isize width) {
  const slot_place at = rows.place(j);
  std::vector<double> x(static_cast<std::size_t>(width));
  std::vector<std::int8_t> codes(x.size());
  if (rows.type == dtype::i8) load_codes(rows.form, at.data, rows.row_bytes, at.slot, width, codes.data());
  for (isize c = 0; c < width; ++c) {
    const auto i = static_cast<std::size_t>(c);
    if (rows.type == dtype::i8)
      x[i] = codes[i] *
             static_cast<double>(at.scales[at.slot * rows.scale_row + (rows.scale_row == 1 ? 0 : c / scale_group)]);
    else
      x[i] = load_as_double(rows.type, at.data + at.slot * rows.row_bytes, c);
  }
  return rows.rotated ? rotated(x) : x;
}

struct model {
  kv_shape s;
  std::vector<std::vector<double>> k, v;  // [token][heads * d], [token][heads * e]

  isize tokens() const { return static_cast<isize>(k.size()); }
  void truncate(isize count) { k.resize(static_cast<std::size_t>(count)), v.resize(static_cast<std::size_t>(count)); }
  void erase(isize first, isize count) {
    for (auto* x : {&k, &v}) x->erase(x->begin() + first, x->begin() + first + count);
  }
};

inline isize token_of(const kv_sequence& x, isize row) { return row < x.kept ? row : row + x.dropped; }

/// "" or the first row of the store that is not the model's.
inline std::string differs(const kv_sequence& x, const model& m) {
  if (x.tokens() != m.tokens())
    return fovea::detail::sentence("the store has ", x.tokens(), " tokens and the model ", m.tokens());
  const auto same = [](const std::vector<double>& a, const double* b) {
    for (std::size_t c = 0; c < a.size(); ++c)
      if (!(a[c] == b[c] || (std::isnan(a[c]) && std::isnan(b[c])))) return false;
    return true;
  };
  for (isize j = 0; j < x.length; ++j)
    for (isize g = 0; g < x.heads; ++g) {
      const auto t = static_cast<std::size_t>(token_of(x, j));
      if (!same(read_row(x.keys(g), j, x.d), m.k[t].data() + g * x.d))
        return fovea::detail::sentence("key of token ", t, ", head ", g);
      if (!same(read_row(x.values(g), j, x.e), m.v[t].data() + g * x.e))
        return fovea::detail::sentence("value of token ", t, ", head ", g);
    }
  return {};
}

/// How far a number may be from what was written: an int8 step, or a rounding of what a rope or a conversion gave. Behind a rotation
/// the steps of a block come together: sqrt(b) of them at most.
inline double allowed(const kv_shape& s, const std::vector<double>& row, isize c, bool turned, bool key = false) {
  if (key && s.rotated) {
    const std::size_t block = row.size() & (~row.size() + 1);
    kv_shape plain = s;
    plain.rotated = false;
    double most = 0;
    for (isize x = 0; x < static_cast<isize>(row.size()); ++x)
      most = std::fmax(most, allowed(plain, rotated(row), x, true));
    return most * std::sqrt(static_cast<double>(block));
  }
  if (s.type == dtype::i8) {
    const isize run = s.scale == scale_per::row ? static_cast<isize>(row.size()) : scale_group, first = c / run * run;
    double most = 0;
    for (isize x = first; x < first + run && x < static_cast<isize>(row.size()); ++x)
      most = std::fmax(most, std::fabs(row[static_cast<std::size_t>(x)]));
    return most / 254 * 1.0001 + (turned ? most * 1e-6 : 0);
  }
  const double eps = test::eps(s.type), size = std::fabs(row[static_cast<std::size_t>(c)]);
  return eps * size * 1.01 + (turned ? 4e-7 * 8 : 0) + (s.type == dtype::f16 ? 0x1p-25 : 0x1p-134);
}

/// Numbers as appended, turned in double where there is a rope; then what the store has, if that is near enough.
inline void take(std::vector<double>& to, const kv_shape& s, const row_source& rows, isize row, isize g, isize width,
                 std::vector<double> want, const rope* turn, isize position) {
  if (turn != nullptr) rotate(*turn, position, want.data());
  const auto got = read_row(rows, row, width);
  for (isize c = 0; c < width; ++c) {
    const auto x = static_cast<std::size_t>(c);
    INFO("head " << g << ", column " << c << ", " << fovea::name_of(s.type) << ": " << got[x] << " for " << want[x]);
    if (!(std::fabs(got[x] - want[x]) <= allowed(s, want, c, turn != nullptr, rows.rotated))) CHECK(got[x] == want[x]);
    to.push_back(got[x]);
  }
}

/// The model appends what the store holds behind its own tokens, and compares it with k and v.
inline void append_like(model& m, const kv_sequence& x, const tensor& k, const tensor& v, const key_positions& at) {
  const isize before = m.tokens();
  m.k.resize(static_cast<std::size_t>(before + k.length())), m.v.resize(m.k.size());
  for (isize i = 0; i < k.length(); ++i) {
    const isize token = before + i, row = token < x.kept ? token : token - x.dropped;
    auto &mk = m.k[static_cast<std::size_t>(token)], &mv = m.v[static_cast<std::size_t>(token)];
    if (row >= 0 && row < x.length && token_of(x, row) == token)
      for (isize g = 0; g < m.s.heads; ++g) {
        std::vector<double> a, b;
        for (isize c = 0; c < m.s.d; ++c) a.push_back(k.get(0, g, i, c));
        for (isize c = 0; c < m.s.e; ++c) b.push_back(v.get(0, g, i, c));
        take(mk, m.s, x.keys(g), row, g, m.s.d, a, at.turn, at.of(i));
        take(mv, m.s, x.values(g), row, g, m.s.e, b, nullptr, 0);
      }
    else  // dropped at once
      mk.resize(static_cast<std::size_t>(m.s.heads * m.s.d)), mv.resize(static_cast<std::size_t>(m.s.heads * m.s.e));
  }
}

/// A shift with a rope: keys behind `keep` are those of the model, turned back by `count`.
inline void turn_back_like(model& m, const kv_sequence& x, isize keep, const rope& turn, isize count) {
  for (isize j = 0; j < x.length; ++j) {
    const isize token = token_of(x, j);
    if (token < keep) continue;
    auto& row = m.k[static_cast<std::size_t>(token)];
    const auto old = row;
    row.clear();
    for (isize g = 0; g < x.heads; ++g) {
      std::vector<double> want(old.begin() + g * x.d, old.begin() + (g + 1) * x.d);
      rotate_back(turn, count, want.data());
      const auto got = read_row(x.keys(g), j, x.d);
      for (isize c = 0; c < x.d; ++c) {
        const auto i = static_cast<std::size_t>(c);
        if (!(std::fabs(got[i] - want[i]) <= allowed(m.s, want, c, true, true))) CHECK(got[i] == want[i]);
        row.push_back(got[i]);
      }
    }
  }
}

/// Attention of the last n tokens of a model, in double.
struct wanted {
  tensor out, lse;
};
inline wanted twin(const softmax_attention& a, const model& m, const tensor& q) {
  tensor k(dtype::f64, 1, m.s.heads, m.tokens(), m.s.d), v(dtype::f64, 1, m.s.heads, m.tokens(), m.s.e);
  for (isize j = 0; j < m.tokens(); ++j)
    for (isize g = 0; g < m.s.heads; ++g) {
      for (isize c = 0; c < m.s.d; ++c)
        k.set(0, g, j, c, m.k[static_cast<std::size_t>(j)][static_cast<std::size_t>(g * m.s.d + c)]);
      for (isize c = 0; c < m.s.e; ++c)
        v.set(0, g, j, c, m.v[static_cast<std::size_t>(j)][static_cast<std::size_t>(g * m.s.e + c)]);
    }
  wanted w{test::unwritten(dtype::f64, 1, q.heads(), q.length(), m.s.e),
           test::unwritten(dtype::f64, 1, q.heads(), q.length(), 1)};
  fovea::reference::prefill(a, {q, k, v, w.out, w.lse, {}});
  return w;
}

inline tensor random_rows(test::random& r, dtype type, isize heads, isize n, isize width) {
  return test::normal(r, type, 1, heads, n, width, test::layouts[r.integer(0, 3)]);
}

/// What may be brought to a store: its type for f64, any other float type for the others.
inline dtype input_type(test::random& r, const kv_shape& s) {
  constexpr dtype types[] = {dtype::f32, dtype::bf16, dtype::f16};
  return s.type == dtype::f64 ? dtype::f64 : types[r.integer(0, 2)];
}

/// Packed and rotated only where a store may be.
inline kv_shape as_allowed(kv_shape s) {
  s.rotated = s.rotated && s.type == dtype::i8;
  if (s.type != dtype::i8 || s.scale != scale_per::row) s.form = kv_form::rows;
  return s;
}
inline kv_shape random_kv_shape(test::random& r) {
  constexpr dtype types[] = {dtype::f32, dtype::f64, dtype::bf16, dtype::f16, dtype::i8, dtype::i8};
  kv_shape s;
  s.heads = r.integer(1, 3), s.d = 2 * r.integer(1, 24), s.e = r.integer(1, 48);
  s.type = types[r.integer(0, 5)], s.scale = r.coin() ? scale_per::row : scale_per::group;
  s.form = r.coin() ? kv_form::packed : kv_form::rows, s.rotated = r.coin();
  return as_allowed(s);
}
/// A page that rows of this form can have.
inline isize page_for(const kv_shape& s, isize page) {
  return s.form == kv_form::packed ? ceil_div(page, packed_rows) * packed_rows : page;
}

/// The last n tokens attend over the store, and over the model in double.
inline void attends(const softmax_attention& a, const kv_sequence& x, const model& m, isize n, test::random& r) {
  const dtype type = input_type(r, m.s);
  const tensor q = random_rows(r, type, m.s.heads * r.integer(1, 3), n, m.s.d);
  const dtype lse_type = type == dtype::f64 ? dtype::f64 : dtype::f32;
  tensor out = test::unwritten(type, 1, q.heads(), n, m.s.e), lse = test::unwritten(lse_type, 1, q.heads(), n, 1);
  fovea::prefill(serial, a, q, {&x, 1}, out, {.lse = lse});
  const wanted want = twin(a, m, q);
  const dtype acc = type == dtype::f64 ? dtype::f64 : dtype::f32;
  CHECK_CLOSE(out.values(), want.out.values(), {.c = 128, .acc = acc, .stored = type});
  CHECK_CLOSE(lse.values(), want.lse.values(), {.c = 128, .acc = acc, .scale = 4});
}

}  // namespace cache_test
