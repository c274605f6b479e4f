// SPDX-License-Identifier: MIT
#pragma once
/// @file  What `attend` does between reading and writing: arrays to views, one prefill or a prefill and steps, views to arrays.

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <fovea/any_attention.hpp>

namespace attend {

using fovea::array;
using fovea::arrays;
using fovea::element;
using fovea::isize;
using fovea::require;

/// The inputs of one call, apart from the mechanism's own weights.
struct question {
  array q, k, v;
  bool batched = true;  ///< false: q, k, v came as [H, n, d]
  arrays others;        ///< weights; what comes with each call moves to `call`
  arrays call;          ///< g, beta, b, w, S0, z0
};

inline fovea::dtype storage_of(const char* name, const array& a) {
  require(fovea::is_float(a.type()), name, " is stored as ", fovea::name_of(a.type()),
          "; wanted f32, f64, bf16 or f16");
  constexpr fovea::dtype types[] = {fovea::dtype::f32, fovea::dtype::f64, fovea::dtype::bf16, fovea::dtype::f16};
  return types[static_cast<int>(a.type())];
}

/// [B, H, n, d] of an array of rank 4, [1, H, n, d] of rank 3.
inline fovea::tensor_ref view_of(const char* name, const array& a) {
  const isize H = a.dim(-3), n = a.dim(-2), d = a.dim(-1);
  return {a.data(), storage_of(name, a), a.rank() == 4 ? a.dim(0) : 1, H, n, d, H * n * d, n * d, d};
}
/// A gate: of q's rank, or one less for one number a token.
inline fovea::tensor_ref gate_of(const char* name, const array& a, isize rank) {
  require(a.rank() == rank || a.rank() == rank - 1, name, " is ", a.describe(), "; wanted ", rank,
          " dimensions like q, or ", rank - 1, " for one number a token");
  if (a.rank() == rank) return view_of(name, a);
  const isize H = a.dim(-2), n = a.dim(-1);
  return {a.data(), storage_of(name, a), rank == 4 ? a.dim(0) : 1, H, n, 1, H * n, n, 1};
}
inline fovea::tensor_mut view_to(array& a) {
  const fovea::tensor_ref r = view_of("output", a);
  return {a.mutable_data(), r.type, r.batch, r.heads, r.length, r.width, r.batch_stride, r.head_stride, r.row_stride};
}

inline question take_inputs(arrays tensors) {
  question ask;
  require(!tensors.contains("do"), "tensor do asks for gradients; this version computes none");
  const auto take = [&](const char* name) {
    const auto at = tensors.find(name);
    require(at != tensors.end(), "tensor ", name, " is missing; wanted q, k and v");
    array a = at->second;
    require(a.rank() == 4 || a.rank() == 3, name, " is ", a.describe(), "; wanted [B, H, n, d] or [H, n, d]");
    (void)storage_of(name, a);
    tensors.erase(at);
    return a;
  };
  ask.q = take("q"), ask.k = take("k"), ask.v = take("v");
  ask.batched = ask.q.rank() == 4;
  require(ask.k.rank() == ask.q.rank() && ask.v.rank() == ask.q.rank(), "q, k, v have ", ask.q.rank(), ", ",
          ask.k.rank(), ", ", ask.v.rank(), " dimensions; wanted the same number");
  ask.others = std::move(tensors);
  return ask;
}

/// The mechanism; what it takes with each call moves from `others` to `call`.
inline fovea::any_attention make(const fovea::configuration& config, question& ask) {
  auto mechanism = fovea::any_attention::make(config, ask.others);
  for (const std::string& name : mechanism.call_inputs())
    if (auto node = ask.others.extract(name)) ask.call.insert(std::move(node));
  return mechanism;
}

inline fovea::gates gates_of(const question& ask) {
  const auto gate = [&](const char* name) {
    const auto at = ask.call.find(name);
    return at == ask.call.end() ? fovea::tensor_ref{} : gate_of(name, at->second, ask.q.rank());
  };
  return {gate("g"), gate("beta"), gate("b"), gate("w")};
}
inline fovea::gates slice(const fovea::gates& g, isize first, isize count) {
  const auto cut = [&](const fovea::tensor_ref& t) { return t ? t.slice(first, count) : t; };
  return {cut(g.log_decay), cut(g.beta), cut(g.erase), cut(g.write)};
}

/// o, and lse where the mechanism has one, for `rows` queries. f64 goes with f64; all other storage gives f32.
struct answer {
  array o, lse;
  bool has_lse;

  answer(const fovea::any_attention& a, const question& ask, isize rows) : has_lse(a.has_lse()) {
    const element type = ask.q.type() == element::f64 ? element::f64 : element::f32;
    // Recurrent models may have more value heads than query heads: then the output has theirs.
    const isize heads = std::max(ask.q.dim(-3), a.name() == std::string("linear") ? ask.v.dim(-3) : 0);
    std::vector<isize> dims = {ask.q.rank() == 4 ? ask.q.dim(0) : 1, heads, rows, ask.v.dim(-1)};
    o = array(type, dims);
    dims[3] = 1;
    lse = array(type, dims);
  }
  fovea::tensor_mut out() { return view_to(o); }
  fovea::tensor_mut out_lse() { return has_lse ? view_to(lse) : fovea::tensor_mut{}; }

  /// The last `count` rows under their names, in the shape of the inputs.
  arrays take(const question& ask, isize count) const {
    arrays out;
    const auto put = [&](const char* name, const array& from, bool keep_width) {
      const isize B = from.dim(0), H = from.dim(1), rows = from.dim(2), width = from.dim(3);
      std::vector<isize> dims;
      if (ask.batched) dims.push_back(B);
      dims.push_back(H), dims.push_back(count);
      if (keep_width) dims.push_back(width);
      array to(from.type(), dims);
      const std::size_t row = static_cast<std::size_t>(width) * fovea::size_of(from.type()),
                        n = static_cast<std::size_t>(count);
      for (isize x = 0; x < B * H && to.bytes() > 0; ++x)
        std::memcpy(static_cast<std::byte*>(to.mutable_data()) + static_cast<std::size_t>(x) * n * row,
                    static_cast<const std::byte*>(from.data()) + static_cast<std::size_t>((x + 1) * rows - count) * row,
                    n * row);
      out.emplace(name, std::move(to));
    };
    put("o", o, true);
    if (has_lse) put("lse", lse, false);
    return out;
  }
};

inline fovea::shape shape_of(const question& ask, isize tokens) {
  const fovea::tensor_ref q = view_of("q", ask.q), v = view_of("v", ask.v);
  return {q.batch, q.heads, v.heads, q.length, tokens, q.width, v.width, q.type};
}

/// A state with S0 and z0 in it, if they were given.
inline fovea::state begin(const fovea::any_attention& a, const question& ask, isize tokens) {
  fovea::state s = a.make_state(shape_of(ask, tokens));
  arrays initial;
  for (const char* name : {"S0", "z0"})
    if (const auto at = ask.call.find(name); at != ask.call.end()) initial.emplace(*at);
  if (!initial.empty()) a.load_state(s, initial);
  return s;
}
/// S and z, without the batch dimension that the inputs did not have.
inline void put_state(const fovea::any_attention& a, const fovea::state& s, const question& ask, arrays& out) {
  if (!a.stores_state()) return;
  for (const auto& [name, x] : a.store_state(s))
    out.emplace(name, ask.batched ? x : x.reshaped({x.dims().begin() + 1, x.dims().end()}));
}

/// One call over all tokens. S0 and z0, and the outputs S and z, need a state: then q and k are the same tokens.
template <class Exec>
arrays prefill(const Exec& exec, const fovea::any_attention& a, const question& ask) {
  const fovea::tensor_ref q = view_of("q", ask.q), k = view_of("k", ask.k), v = view_of("v", ask.v);
  const fovea::gates gates = gates_of(ask);
  const bool initial = ask.call.contains("S0") || ask.call.contains("z0");
  require(!initial || a.streaming(), "S0 or z0 was given; this ", a.name(), " has no state (it is not causal)");
  answer y(a, ask, q.length);
  if (!initial) fovea::prefill(exec, a, q, k, v, y.out(), {y.out_lse(), gates});
  arrays state;
  if (initial || (a.streaming() && a.stores_state() && q.length == k.length)) {
    answer with_state(a, ask, q.length);
    fovea::state s = begin(a, ask, k.length);
    fovea::prefill(exec, a, q, k, v, with_state.out(), s, {with_state.out_lse(), gates});
    put_state(a, s, ask, state);
    if (initial) y = std::move(with_state);
  }
  arrays out = y.take(ask, q.length);
  out.merge(state);
  return out;
}

/// q with zero rows before its own, `tokens` in all.
inline array pad_queries(const array& q, isize tokens) {
  std::vector<isize> dims = q.dims();
  dims[dims.size() - 2] = tokens;
  array padded(q.type(), dims);
  const fovea::tensor_ref from = view_of("q", q);
  const fovea::tensor_mut to = view_to(padded);
  for (isize b = 0; b < from.batch; ++b)
    for (isize h = 0; h < from.heads; ++h)
      for (isize i = 0; i < from.length; ++i)
        std::memcpy(to.row(b, h, tokens - from.length + i), from.row(b, h, i),
                    static_cast<std::size_t>(from.width) * fovea::size_of(q.type()));
  return padded;
}

/// Rows [first, first + rows) and keys [0, keys) of a table that broadcasts to [.., n, m]. Rows before the first are row 0.
inline array slice_table(const array& table, isize first, isize rows, isize keys) {
  const isize all_rows = table.dim(-2), all_keys = table.dim(-1);
  std::vector<isize> dims = table.dims();
  dims[dims.size() - 2] = all_rows == 1 ? 1 : rows;
  dims[dims.size() - 1] = all_keys == 1 ? 1 : keys;
  array out(table.type(), dims);
  const isize to_rows = out.dim(-2);
  const std::size_t size = fovea::size_of(table.type()), row = static_cast<std::size_t>(out.dim(-1)) * size;
  for (isize x = 0; row > 0 && to_rows > 0 && x < out.size() / (to_rows * out.dim(-1)); ++x)
    for (isize i = 0; i < to_rows; ++i) {
      const isize from = all_rows == 1 ? 0 : std::clamp<isize>(first + i, 0, all_rows - 1);
      std::memcpy(static_cast<std::byte*>(out.mutable_data()) + static_cast<std::size_t>(x * to_rows + i) * row,
                  static_cast<const std::byte*>(table.data()) +
                      static_cast<std::size_t>((x * all_rows + from) * all_keys) * size,
                  row);
    }
  return out;
}

/// The mechanism for the rows [first, first + rows) of the queries and the first `keys` keys: a table of rows and keys (mask,
/// bias) is cut to fit, and nothing else changes; a softmax state takes any mask.
inline fovea::any_attention cut(const fovea::any_attention& a, const question& ask, isize first, isize rows,
                                isize keys) {
  arrays weights = ask.others;
  bool changed = false;
  for (const char* name : {"mask", "bias"})
    if (const auto at = weights.find(name); at != weights.end()) {
      at->second = slice_table(at->second, first, rows, keys);
      changed = true;
    }
  return changed ? fovea::any_attention::make(a.config(), weights) : a;
}

inline void check_decode(const fovea::any_attention& a, const question& ask, isize first) {
  const isize n = ask.q.dim(-2), m = ask.k.dim(-2);
  if (!a.streaming()) (void)a.make_state(shape_of(ask, m));  // the mechanism's own sentence, where it has one
  const std::string asked = "--decode " + std::to_string(first) + ": ";
  require(a.streaming(), asked, "this ", a.name(), " keeps no state to decode with; wanted causal settings");
  require(first <= m, asked, "there are ", m, " tokens");
  require(n <= m, asked, "q has ", n, " tokens and k has ", m, "; wanted no more queries than keys");
}

/// The same rows by a prefill of `first` tokens and one step for each other token. Where there are fewer queries than keys,
/// the queries are the last ones: the tokens before them get a zero query, whose output is dropped.
template <class Exec>
arrays decode(const Exec& exec, const fovea::any_attention& a, question ask, isize first) {
  const isize n = ask.q.dim(-2), m = ask.k.dim(-2);
  check_decode(a, ask, first);
  {  // what prefill and step would refuse later is refused for the question as it was asked
    answer y(a, ask, n);
    a.check(fovea::problem{view_of("q", ask.q), view_of("k", ask.k), view_of("v", ask.v), y.out(), y.out_lse(),
                           gates_of(ask)});
  }
  const fovea::gates gates = gates_of(ask);
  fovea::state s = begin(a, ask, m);
  if (n < m) ask.q = pad_queries(ask.q, m);
  const fovea::tensor_ref q = view_of("q", ask.q), k = view_of("k", ask.k), v = view_of("v", ask.v);
  answer y(a, ask, m);
  const fovea::tensor_mut out = y.out(), lse = y.out_lse();
  const auto part = [&](isize at, isize count) {
    const auto rows = cut(a, ask, at - (m - n), count, at + count);
    fovea::prefill(exec, rows, q.slice(at, count), k.slice(at, count), v.slice(at, count), out.slice(at, count), s,
                   {lse ? lse.slice(at, count) : lse, slice(gates, at, count)});
  };
  if (first > 0) part(0, first);
  for (isize t = first; t < m; ++t) part(t, 1);
  arrays answers = y.take(ask, n);
  put_state(a, s, ask, answers);
  return answers;
}

}  // namespace attend
