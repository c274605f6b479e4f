// SPDX-License-Identifier: MIT
/// @file  The softmax golden family: softmax_attention and its reference twin against PyTorch in float64.
///
/// Each case goes through the twin (f64), the f64 path and the f32 path in every layout. Cases with gradients are run forward.

#include <algorithm>
#include <optional>

#include <fovea/softmax.hpp>
#include <fovea/softmax/reference.hpp>

#include "support/catch.hpp"
#include "support/golden.hpp"

namespace {

using fovea::isize;
using test::dtype;

/// A case's mechanism and what it points to.
struct made {
  std::vector<std::uint8_t> mask;
  std::vector<float> bias, slopes, sinks;
  std::vector<std::int32_t> cu_q, cu_k;
  fovea::softmax_attention m;
};

/// Strides of a dense [b, h, i, j] table that broadcasts where a size is 1.
template <class Policy>
Policy table_of(const test::array& a, Policy p) {
  const isize keys = a.dims[3], rows = a.dims[2] * keys, heads = a.dims[1] * rows;
  p.batch_stride = a.dims[0] == 1 ? 0 : heads, p.head_stride = a.dims[1] == 1 ? 0 : rows,
  p.row_stride = a.dims[2] == 1 ? 0 : keys, p.key_stride = keys == 1 ? 0 : 1;
  return p;
}

template <class P>
fovea::mask with_table(const P& p, const std::optional<fovea::boolean_mask>& table) {
  return table ? fovea::mask(fovea::both{p, *table}) : fovea::mask(p);
}

fovea::mask mask_of(const golden::test_case& c, made& x) {
  std::optional<fovea::boolean_mask> table;
  if (c.has("mask")) {
    x.mask = c.list<std::uint8_t>("mask");
    table = table_of(c.at("mask"), fovea::boolean_mask{x.mask.data()});
  }
  const fovea::alignment_of_rows align = c.text("align", "none") == "top_left" ? fovea::top_left : fovea::bottom_right;
  if (c.has("cu") || c.has("cu_q")) {
    x.cu_q = c.list<std::int32_t>(c.has("cu") ? "cu" : "cu_q"),
    x.cu_k = c.list<std::int32_t>(c.has("cu") ? "cu" : "cu_k");
    return fovea::packed{x.cu_q.data(), x.cu_k.data(), static_cast<isize>(x.cu_q.size()) - 1, c.flag("causal")};
  }
  if (c.params.contains("left"))
    return with_table(fovea::two_sided{c.integer("left", 0), c.integer("right", 0), align}, table);
  if (c.params.contains("window"))
    return with_table(fovea::window{c.integer("window", 0), c.integer("first", 0), align}, table);
  if (c.flag("causal")) return with_table(fovea::causal{align}, table);
  return table ? fovea::mask(*table) : fovea::mask(fovea::no_mask{});
}

std::unique_ptr<made> make(const golden::test_case& c) {
  auto x = std::make_unique<made>();
  x->m.scale = c.number("scale", 0);
  x->m.mask = mask_of(c, *x);
  if (c.params.contains("softcap")) x->m.score = fovea::softcap{c.number("softcap", 0)};
  if (c.has("bias")) {
    x->bias = c.list<float>("bias");
    x->m.score = table_of(c.at("bias"), fovea::additive_bias{x->bias.data()});
  }
  if (c.has("slopes")) {
    x->slopes = c.list<float>("slopes");
    x->m.score = fovea::alibi{x->slopes.data()};
  }
  if (c.has("sinks")) {
    x->sinks = c.list<float>("sinks");
    x->m.sinks = x->sinks.data();
  }
  return x;
}

const char* const known[] = {"scale",
                             "align",
                             "causal",
                             "window",
                             "first",
                             "left",
                             "right",
                             "softcap",
                             "torch_gives_for_dead_rows",
                             "torch_bool_mask_dead_rows",
                             "torch_float_mask_dead_rows"};

double largest(const test::array& a) {
  double top = 0;
  for (double x : a.data)
    if (std::isfinite(x)) top = std::max(top, std::fabs(x));
  return top;
}

struct answer {
  test::tensor out, lse;
};
answer room(const golden::test_case& c, dtype type, test::layout l) {
  const auto& o = c.at("o").dims;
  return {test::unwritten(type, o[0], o[1], o[2], o[3], l), test::unwritten(type, o[0], o[1], o[2], 1, l)};
}

}  // namespace

TEST_CASE("golden softmax: every case through the twin, f64 and f32, in every layout") {
  for (const golden::test_case& c : golden::family("softmax")) {
    CAPTURE(c.name);
    for (const auto& [key, unused] : c.params.items()) {
      CAPTURE(key);
      REQUIRE(std::find(std::begin(known), std::end(known), key) != std::end(known));
      (void)unused;
    }
    const auto x = make(c);
    const test::array& want = c.at("o");
    test::array want_lse = c.at("lse");
    want_lse.dims.push_back(1);
    const double strain = 1 + largest(want_lse);  // the error of a score is relative to the score
    {
      answer twin = room(c, dtype::f64, test::layout::bhnd);
      const test::tensor q = c.tensor("q", dtype::f64), k = c.tensor("k", dtype::f64), v = c.tensor("v", dtype::f64);
      fovea::reference::prefill(x->m, {q, k, v, twin.out, twin.lse, {}});
      INFO("reference twin");
      CHECK_CLOSE(twin.out.values(), want, {.c = 16 * strain, .acc = dtype::f64});
      CHECK_CLOSE(twin.lse.values(), want_lse, {.c = 16, .acc = dtype::f64});
    }
    for (const dtype type : {dtype::f64, dtype::f32})
      for (const test::layout l : test::layouts) {
        const test::tensor q = c.tensor("q", type, l), k = c.tensor("k", type, l), v = c.tensor("v", type, l);
        answer got = room(c, type, l);
        fovea::prefill(fovea::serial, x->m, q, k, v, got.out, {.lse = got.lse, .gates = {}});
        CAPTURE(fovea::name_of(type), test::name_of(l));
        CHECK_CLOSE(got.out.values(), want, {.c = 16 * strain, .acc = type});
        CHECK_CLOSE(got.lse.values(), want_lse, {.c = 16, .acc = type});
        CHECK(got.out.guards_intact());
        CHECK(got.lse.guards_intact());
      }
  }
}

TEST_CASE("golden softmax: 16-bit storage gives what the twin makes of the rounded inputs") {
  for (const golden::test_case& c : golden::family("softmax")) {
    CAPTURE(c.name);
    const auto x = make(c);
    for (const dtype type : {dtype::bf16, dtype::f16}) {
      const test::tensor q = c.tensor("q", type), k = c.tensor("k", type), v = c.tensor("v", type);
      answer want = room(c, dtype::f64, test::layout::bhnd), got = room(c, type, test::layout::strided);
      got.lse = room(c, dtype::f32, test::layout::bhnd).lse;
      fovea::reference::prefill(x->m, {q, k, v, want.out, want.lse, {}});
      fovea::prefill(fovea::serial, x->m, q, k, v, got.out, {.lse = got.lse, .gates = {}});
      CAPTURE(fovea::name_of(type));
      CHECK_CLOSE(got.out.values(), want.out.values(), {.c = 16 * (1 + largest(want.lse.values())), .stored = type});
      CHECK_CLOSE(got.lse.values(), want.lse.values(), {.c = 16});
    }
  }
}

TEST_CASE("golden softmax: split keys, each part against its golden part, merged against the whole") {
  const golden::test_case& c = golden::find("softmax", "split_kv");
  const auto x = make(c);
  const auto cuts = c.list<isize>("cuts");
  const test::array& part_o = c.at("part_o");
  const test::array& part_lse = c.at("part_lse");
  for (const dtype type : {dtype::f64, dtype::f32}) {
    const test::tensor q = c.tensor("q", type), k = c.tensor("k", type), v = c.tensor("v", type);
    const std::size_t rows = static_cast<std::size_t>(q.batch() * q.heads() * q.length()),
                      e = static_cast<std::size_t>(v.width());
    std::vector<double> o(rows * e, 0.0), lse(rows, -HUGE_VAL);
    for (std::size_t p = 0; p + 1 < cuts.size(); ++p) {
      CAPTURE(p, fovea::name_of(type));
      const isize first = cuts[p], count = cuts[p + 1] - first;
      const test::tensor kp = test::rows_of(k, first, count), vp = test::rows_of(v, first, count);
      answer got = room(c, type, test::layout::bhnd);
      fovea::prefill(fovea::serial, x->m, q, kp, vp, got.out, {.lse = got.lse, .gates = {}});
      const auto at = [&](const test::array& a, std::size_t size) {
        const auto from = a.data.begin() + static_cast<isize>(p * size);
        return std::vector<double>(from, from + static_cast<isize>(size));
      };
      CHECK_CLOSE(got.out.values(), {c.at("o").dims, at(part_o, rows * e)}, {.c = 64, .acc = type});
      const test::array got_o = got.out.values(), got_lse = got.lse.values();
      CHECK_CLOSE({{static_cast<isize>(rows)}, got_lse.data}, {{static_cast<isize>(rows)}, at(part_lse, rows)},
                  {.c = 16, .acc = type});
      for (std::size_t r = 0; r < rows; ++r)
        fovea::merge_normalised(o.data() + r * e, lse[r], got_o.data.data() + r * e, got_lse.data[r],
                                static_cast<isize>(e));
    }
    CHECK_CLOSE({c.at("o").dims, o}, c.at("o"), {.c = 64, .acc = type});
    CHECK_CLOSE({c.at("lse").dims, lse}, c.at("lse"), {.c = 16, .acc = type});
  }
}
