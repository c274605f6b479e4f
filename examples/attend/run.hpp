// SPDX-License-Identifier: MIT
#pragma once
/// @file  What `attend` does between reading and writing: arrays to views, one prefill or a prefill and steps, views to arrays.

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <fovea/any_attention.hpp>
#include <fovea/softmax/stores.hpp>

namespace attend {

using fovea::array;
using fovea::arrays;
using fovea::element;
using fovea::isize;
using fovea::require;

/// The inputs of one call, apart from the mechanism's own weights.
struct question {
  array q, k, v;
  bool batched = true;        ///< false: q, k, v came as [H, n, d]
  arrays others;              ///< weights; what comes with each call moves to `call`
  arrays call;                ///< g, beta, b, w, S0, z0, positions
  std::optional<array> dout;  ///< do, which asks for gradients
  array table,
      lengths;  ///< paged keys and values: k [pages, G, page, d], v [pages, G, page, e], pages of each item, its tokens
  bool paged() const { return table.size() > 0; }
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

/// k_pages, v_pages, table [B, pages] and lengths [B] in place of k and v.
inline question take_pages(question ask, arrays tensors) {
  const auto take = [&](const char* name, isize rank) {
    const auto at = tensors.find(name);
    require(at != tensors.end(), "tensor ", name, " is missing; paged calls have k_pages, v_pages, table and lengths");
    array a = at->second;
    require(a.rank() == rank, name, " is ", a.describe(), "; wanted ",
            rank == 4   ? "[pages, G, page, width]"
            : rank == 2 ? "[B, pages of an item]"
                        : "[B]");
    tensors.erase(at);
    return a;
  };
  require(!tensors.contains("k") && !tensors.contains("v"), "k or v was given besides pages; wanted one of them");
  ask.k = take("k_pages", 4), ask.v = take("v_pages", 4), ask.table = take("table", 2),
  ask.lengths = take("lengths", 1);
  const isize B = ask.q.rank() == 4 ? ask.q.dim(0) : 1, pages = ask.k.dim(0), page = ask.k.dim(2);
  require(ask.table.size() > 0 && ask.table.dim(0) == B && ask.lengths.size() == B, "table is ", ask.table.describe(),
          " and lengths ", ask.lengths.describe(), "; wanted a row and a number for each of ", B, " items");
  require(ask.v.dim(0) == pages && ask.v.dim(1) == ask.k.dim(1) && ask.v.dim(2) == page && page >= 1, "k_pages is ",
          ask.k.describe(), " and v_pages ", ask.v.describe(), "; wanted the same pages, heads and tokens");
  for (isize b = 0; b < B; ++b) {
    const double tokens = ask.lengths.at(b);
    require(tokens >= 0 && tokens <= static_cast<double>(ask.table.dim(1) * page), "lengths[", b, "] is ", tokens,
            "; the table has room for ", ask.table.dim(1) * page);
    for (isize x = 0; static_cast<double>(x * page) < tokens; ++x)
      require(ask.table.at(b * ask.table.dim(1) + x) >= 0 &&
                  ask.table.at(b * ask.table.dim(1) + x) < static_cast<double>(pages),
              "table[", b, ", ", x, "] is ", ask.table.at(b * ask.table.dim(1) + x), "; there are ", pages, " pages");
  }
  ask.others = std::move(tensors);
  return ask;
}

inline question take_inputs(arrays tensors) {
  question ask;
  if (auto node = tensors.extract("do")) ask.dout = node.mapped();
  const auto take = [&](const char* name) {
    const auto at = tensors.find(name);
    require(at != tensors.end(), "tensor ", name, " is missing; wanted q, k and v");
    array a = at->second;
    require(a.rank() == 4 || a.rank() == 3, name, " is ", a.describe(), "; wanted [B, H, n, d] or [H, n, d]");
    (void)storage_of(name, a);
    tensors.erase(at);
    return a;
  };
  ask.q = take("q");
  ask.batched = ask.q.rank() == 4;
  if (tensors.contains("k_pages") || tensors.contains("v_pages")) return take_pages(std::move(ask), std::move(tensors));
  ask.k = take("k"), ask.v = take("v");
  require(ask.k.rank() == ask.q.rank() && ask.v.rank() == ask.q.rank(), "q, k, v have ", ask.q.rank(), ", ",
          ask.k.rank(), ", ", ask.v.rank(), " dimensions; wanted the same number");
  ask.others = std::move(tensors);
  return ask;
}

/// rope_width and rope_positions that the tensors tell, where RoPE is asked for without them.
inline fovea::configuration with_sizes(fovea::configuration config, const question& ask) {
  if (!config.values.contains("rope_theta")) return config;
  double positions = static_cast<double>(ask.paged() ? ask.table.dim(1) * ask.k.dim(2) : ask.k.dim(-2));
  if (const auto given = ask.others.find("positions"); given != ask.others.end())
    for (isize i = 0; i < given->second.size(); ++i) positions = std::max(positions, given->second.at(i) + 1);
  config.values.emplace("rope_width", static_cast<double>(ask.q.dim(-1)));
  config.values.emplace("rope_positions", std::max(positions, 1.0));
  return config;
}

/// The mechanism; what it takes with each call moves from `others` to `call`.
inline fovea::any_attention make(const fovea::configuration& config, question& ask) {
  auto mechanism = fovea::any_attention::make(with_sizes(config, ask), ask.others);
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

/// The tensor positions, [B, n] or [n], as [B, n] numbers for tokens [first, first + count); empty if there is none.
inline std::vector<std::int32_t> positions_of(const question& ask, isize first, isize count) {
  std::vector<std::int32_t> out;
  const auto at = ask.call.find("positions");
  if (at == ask.call.end()) return out;
  const array& p = at->second;
  const isize B = ask.q.rank() == 4 ? ask.q.dim(0) : 1, n = ask.q.dim(-2);
  require(p.rank() >= 1 && p.rank() <= 2 && !fovea::is_float(p.type()) && p.dim(-1) == n &&
              (p.rank() == 1 || p.dim(0) == B),
          "positions is ", p.describe(), "; wanted whole numbers, [", B, ", ", n, "] or [", n, "]");
  for (isize b = 0; b < B; ++b)
    for (isize i = first; i < first + count; ++i) {
      const double x = p.at((p.rank() == 1 ? 0 : b * n) + i);
      require(x >= 0 && x < 2147483648.0, "positions holds ", x, "; wanted 0 to 2^31");
      out.push_back(static_cast<std::int32_t>(x));
    }
  return out;
}

/// o, lse where the mechanism has one, and skipped where it skips, for `rows` queries. f64 goes with f64; all other storage gives f32.
struct answer {
  array o, lse, skipped;
  bool has_lse, skips;

  answer(const fovea::any_attention& a, const question& ask, isize rows)
      : has_lse(a.has_lse()), skips(a.takes_skipped()) {
    const element type = ask.q.type() == element::f64 ? element::f64 : element::f32;
    // Recurrent models may have more value heads than query heads: then the output has theirs.
    const isize heads = std::max(ask.q.dim(-3), a.name() == std::string("linear") ? ask.v.dim(-3) : 0);
    std::vector<isize> dims = {ask.q.rank() == 4 ? ask.q.dim(0) : 1, heads, rows, ask.v.dim(-1)};
    o = array(type, dims);
    dims[3] = 1;
    lse = array(type, dims), skipped = array(element::f32, dims);
  }
  fovea::tensor_mut out() { return view_to(o); }
  fovea::tensor_mut out_lse() { return has_lse ? view_to(lse) : fovea::tensor_mut{}; }
  fovea::tensor_mut out_skipped() { return skips ? view_to(skipped) : fovea::tensor_mut{}; }

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
    if (skips) put("skipped", skipped, false);
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

/// One call over paged keys and values.
template <class Exec>
arrays prefill_pages(const Exec& exec, const fovea::any_attention& a, const question& ask) {
  const auto* m = a.as<fovea::softmax_attention>();
  require(m != nullptr, "k_pages was given; pages are offered by softmax, and this is ", a.name());
  const fovea::tensor_ref q = view_of("q", ask.q), k = view_of("k_pages", ask.k), v = view_of("v_pages", ask.v);
  require(k.type == v.type, "k_pages is ", ask.k.describe(), " and v_pages ", ask.v.describe(), "; wanted one type");
  const fovea::kv_shape sizes{.heads = k.heads, .d = k.width, .e = v.width, .type = k.type};
  const isize page = k.length, row = ask.table.dim(1);
  std::vector<std::int32_t> table;
  for (isize x = 0; x < ask.table.size(); ++x) table.push_back(static_cast<std::int32_t>(ask.table.at(x)));
  std::vector<fovea::kv_sequence> kv;
  for (isize b = 0; b < q.batch; ++b)
    kv.push_back(fovea::paged_sequence(sizes, fovea::row_memory::heads_first(k.data, sizes, page, k.width),
                                       fovea::row_memory::heads_first(v.data, sizes, page, v.width), page,
                                       {table.data() + b * row, static_cast<std::size_t>(row)},
                                       static_cast<isize>(ask.lengths.at(b))));
  const std::vector<std::int32_t> positions = positions_of(ask, 0, q.length);
  answer y(a, ask, q.length);
  fovea::prefill(exec, *m, q, kv, y.out(), {.lse = y.out_lse(), .positions = positions, .skipped = y.out_skipped()});
  return y.take(ask, q.length);
}

/// One call over all tokens. S0 and z0, and the outputs S and z, need a state: then q and k are the same tokens.
template <class Exec>
arrays prefill(const Exec& exec, const fovea::any_attention& a, const question& ask) {
  if (ask.paged()) return prefill_pages(exec, a, ask);
  const fovea::tensor_ref q = view_of("q", ask.q), k = view_of("k", ask.k), v = view_of("v", ask.v);
  const fovea::gates gates = gates_of(ask);
  const bool initial = ask.call.contains("S0") || ask.call.contains("z0");
  require(!initial || a.streaming(), "S0 or z0 was given; this ", a.name(), " has no state (it is not causal)");
  answer y(a, ask, q.length);
  const std::vector<std::int32_t> positions = positions_of(ask, 0, q.length);
  if (!initial) fovea::prefill(exec, a, q, k, v, y.out(), {y.out_lse(), gates, {}, positions, y.out_skipped()});
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
  require(!ask.paged(), asked, "pages hold all tokens already");
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
  require(n == m || !ask.call.contains("positions"), "--decode with positions takes as many queries as keys");
  fovea::state s = begin(a, ask, m);
  if (n < m) ask.q = pad_queries(ask.q, m);
  const fovea::tensor_ref q = view_of("q", ask.q), k = view_of("k", ask.k), v = view_of("v", ask.v);
  answer y(a, ask, m);
  const fovea::tensor_mut out = y.out(), lse = y.out_lse(), skipped = y.out_skipped();
  const auto part = [&](isize at, isize count) {
    const auto rows = cut(a, ask, at - (m - n), count, at + count);
    const std::vector<std::int32_t> positions = positions_of(ask, at, count);
    fovea::prefill(exec, rows, q.slice(at, count), k.slice(at, count), v.slice(at, count), out.slice(at, count), s,
                   {lse ? lse.slice(at, count) : lse,
                    slice(gates, at, count),
                    {},
                    positions,
                    skipped ? skipped.slice(at, count) : skipped});
  };
  if (first > 0) part(0, first);
  for (isize t = first; t < m; ++t) part(t, 1);
  arrays answers = y.take(ask, n);
  put_state(a, s, ask, answers);
  return answers;
}

}  // namespace attend
