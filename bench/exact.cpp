// SPDX-License-Identifier: MIT
// Names: decode/<store>/<type>[_<rows>][_<arithmetic>]/D<d>/N<keys>/H<h>/G<g>[/n<queries>][/T<threads>], prefill/softmax/<type>/<variant>/... as in bench.cpp.
#include "exact.hpp"

#include <fovea/cache/contiguous_store.hpp>
#include <fovea/cache/paged_pool.hpp>
#include <fovea/softmax.hpp>
#include <memory>
#include <string>

#include "measure.hpp"

namespace bench {
namespace {

using fovea::dtype;

struct decode_case {
  fovea::kv_shape rows;
  isize keys = 32768, H = 8, n = 1, page = 0;  ///< page 0: one stretch
  int threads = 1;
  fovea::precision arithmetic = fovea::precision::f32;

  std::string name() const {
    const auto number = [](const char* what, isize x) { return std::string(what) + std::to_string(x); };
    std::string s = "decode/" + (page > 0 ? number("pages_of_", page) : std::string("contiguous")) + "/";
    s += fovea::name_of(rows.type);
    if (rows.form == fovea::kv_form::packed)
      s += "_packed";
    else if (rows.type == dtype::i8)
      s += rows.scale == fovea::scale_per::row ? "_by_row" : "_by_group";
    if (arithmetic == fovea::precision::int8) s += "_int8";
    s += number("/D", rows.d) + (rows.e != rows.d ? number("e", rows.e) : "") + number("/N", keys) + number("/H", H) +
         number("/G", rows.heads);
    if (n > 1) s += number("/n", n);
    return threads > 1 ? s + number("/T", threads) : s;
  }
};

/// A store of either kind with `keys` random tokens; pages are handed out in a scattered order, as in an engine that has run for a while.
struct filled_store {
  std::unique_ptr<fovea::contiguous_store> block;
  std::unique_ptr<fovea::paged_pool> pool;
  fovea::page_table table, other;

  explicit filled_store(const decode_case& c) {
    const isize piece = 64;
    if (c.page > 0)
      pool = std::make_unique<fovea::paged_pool>(c.rows, c.page, 2 * (c.keys / c.page + 2));
    else
      block = std::make_unique<fovea::contiguous_store>(c.rows, c.keys);
    const dtype from = c.rows.type == dtype::f64 ? dtype::f64 : dtype::f32;
    const tensors t({1, c.rows.heads, c.rows.heads, piece, piece, c.rows.d, c.rows.e, from});
    for (isize at = 0; at < c.keys; at += piece) {
      const isize count = std::min(piece, c.keys - at);
      if (block) block->append(t.K().slice(0, count), t.V().slice(0, count));
      if (!pool) continue;
      pool->append(table, t.K().slice(0, count), t.V().slice(0, count));
      pool->append(other, t.K().slice(0, count), t.V().slice(0, count));  // takes every other stretch of pages
    }
  }
  fovea::kv_sequence view() const { return pool ? pool->view(table) : block->view(); }
  std::size_t bytes() const { return block ? block->bytes() : table.pages.size() * pool->page_bytes(); }
};

/// Time of f32 arithmetic over plain rows of the same numbers, over the time of `a` over its store; alternating, the median.
double over_f32(decode_case c, const fovea::softmax_attention& a, const tensors& t,
                std::span<const fovea::kv_sequence> kv) {
  c.rows.form = fovea::kv_form::rows;
  const filled_store plain(c);
  const fovea::kv_sequence rows[] = {plain.view()};
  fovea::softmax_attention f32 = a;
  f32.arithmetic = fovea::precision::f32;
  fovea::buffer memory(fovea::workspace_size(f32, t.Q(), rows, 1) + fovea::workspace_size(a, t.Q(), kv, 1) + 64);
  const int calls = static_cast<int>(std::max<isize>(1, (isize{1} << 21) / (c.keys * c.H)));
  const auto time = [&](const fovea::softmax_attention& m, std::span<const fovea::kv_sequence> x) {
    const double start = machine::now();
    for (int i = 0; i < calls; ++i) fovea::prefill(fovea::serial, m, t.Q(), x, t.O(), {.workspace = memory.span()});
    return machine::now() - start;
  };
  std::vector<double> found;
  for (int i = 0; i < 15; ++i) {
    const double before = time(f32, rows), own = time(a, kv);
    found.push_back(before / own);
  }
  return median(found);
}

void decode(benchmark::State& b, const decode_case& c, fovea::exec_ref exec) {
  const filled_store store(c);
  const fovea::kv_sequence kv[] = {store.view()};
  const dtype type = c.rows.type == dtype::i8 ? dtype::f32 : c.rows.type;
  const tensors t({1, c.H, c.rows.heads, c.n, c.n, c.rows.d, c.rows.e, type});
  const fovea::softmax_attention a{.mask = fovea::causal{}, .arithmetic = c.arithmetic};
  fovea::buffer memory(fovea::workspace_size(a, t.Q(), kv, c.threads) + 64);
  // The rate of reading as much memory; the store's own where it is one block.
  const std::size_t bytes = store.bytes();
  const fovea::buffer other(store.block ? 0 : bytes);
  const void* read = store.block ? static_cast<const void*>(kv[0].k.data) : other.data();
  if (!store.block) std::fill_n(other.data(), bytes, std::byte{1});
  b.counters["of_stream"] = samples(
      b,
      [&] {
        fovea::prefill(exec, a, t.Q(), kv, t.O(), {.workspace = memory.span()});
        machine::use(*t.out.data());
      },
      [&] { return machine::stream_read(read, bytes); },
      [&](double seconds, double rate) { return static_cast<double>(bytes) / seconds / rate; });
  b.counters["store"] = static_cast<double>(bytes);
  if (c.arithmetic == fovea::precision::int8) b.counters["over_f32"] = over_f32(c, a, t, kv);
}

/// [B, n, H, d] in memory: the heads of a token side by side.
void strided(benchmark::State& b, const fovea::shape& s, bool is_causal) {
  const tensors t(s);
  fovea::softmax_attention a;
  if (is_causal) a.mask = fovea::causal{};
  fovea::buffer memory(a.workspace_size(s, 1) + 64);
  const auto turned = [](fovea::tensor_mut x) {
    x.row_stride = x.heads * x.width, x.head_stride = x.width;
    return x;
  };
  const double flops = 2.0 * static_cast<double>(s.H * s.n * s.m * (s.d + s.e)) * (is_causal ? 0.5 : 1);
  b.counters["of_peak"] = samples(
      b,
      [&] {
        fovea::prefill(fovea::serial, a, turned(t.Q()), turned(t.K()), turned(t.V()), turned(t.O()),
                       {.workspace = memory.span()});
        machine::use(*t.out.data());
      },
      [] { return machine::fma_peak(); }, [&](double seconds, double peak) { return flops / seconds / peak; });
}

std::vector<decode_case> decode_cases() {
  using fovea::scale_per;
  std::vector<decode_case> all;
  const auto shape = [](isize G, dtype t, scale_per by = scale_per::row, isize d = 128) {
    return fovea::kv_shape{G, d, d, t, by, false};
  };
  for (const isize H : {8, 32}) {
    for (const dtype t : {dtype::f32, dtype::bf16, dtype::f16, dtype::i8}) all.push_back({.rows = shape(8, t), .H = H});
    all.push_back({.rows = shape(8, dtype::i8, scale_per::group), .H = H});
    for (const isize page : {1, 16, 64}) all.push_back({.rows = shape(8, dtype::f32), .H = H, .page = page});
    all.push_back({.rows = shape(8, dtype::bf16), .H = H, .page = 16});
  }
  all.push_back({.rows = shape(2, dtype::f32), .H = 8});
  for (const isize d : {64, 80, 96, 256}) all.push_back({.rows = shape(8, dtype::f32, scale_per::row, d), .H = 8});
  all.push_back({.rows = shape(8, dtype::f32), .H = 128});
  all.push_back({.rows = shape(8, dtype::f32), .H = 32, .n = 8});  // drafts to verify
  for (const isize H : {16, 128})
    all.push_back({.rows = {1, 576, 512, dtype::f32, scale_per::row, true}, .keys = 8192, .H = H});
  for (const isize d : {64, 128}) {
    all.push_back({.rows = shape(1, dtype::f32, scale_per::row, d), .keys = 128, .H = 1});
    all.push_back({.rows = shape(1, dtype::f32, scale_per::row, d), .keys = 1024, .H = 4});
  }
  for (const fovea::kv_form form : {fovea::kv_form::rows, fovea::kv_form::packed}) {  // integers
    const auto codes = [&](isize G, isize d) {
      return fovea::kv_shape{.heads = G, .d = d, .e = d, .type = dtype::i8, .form = form, .rotated = true};
    };
    constexpr auto int8 = fovea::precision::int8;
    for (const isize H : {8, 32, 64}) all.push_back({.rows = codes(8, 128), .H = H, .arithmetic = int8});
    all.push_back({.rows = codes(32, 128), .H = 128, .arithmetic = int8});
    all.push_back({.rows = codes(8, 64), .H = 32, .arithmetic = int8});
    for (const isize page : {16, 64}) all.push_back({.rows = codes(8, 128), .H = 32, .page = page, .arithmetic = int8});
    for (const isize G : {1, 8}) all.push_back({.rows = codes(G, 128), .keys = 1024, .H = 4 * G, .arithmetic = int8});
  }
  all.push_back({.rows = shape(1, dtype::f32), .keys = 131072, .H = 1});
  all.push_back({.rows = shape(1, dtype::f32), .keys = 131072, .H = 1, .threads = 2});
  return all;
}

}  // namespace

void register_exact() {
  static const fovea::threads two(2);
  for (const decode_case& c : decode_cases())
    benchmark::RegisterBenchmark(c.name().c_str(), [c](benchmark::State& b) {
      decode(b, c, c.threads > 1 ? fovea::exec_ref(two) : fovea::exec_ref(fovea::serial));
    })->Unit(benchmark::kMicrosecond);
  for (const bool is_causal : {false, true})
    benchmark::RegisterBenchmark(is_causal ? "prefill/softmax/f32/strided_causal/D128/N2048/H32/G32"
                                           : "prefill/softmax/f32/strided_full/D128/N2048/H32/G32",
                                 [is_causal](benchmark::State& b) {
                                   strided(b, {1, 32, 32, 2048, 2048, 128, 128, dtype::f32}, is_causal);
                                 })
        ->Unit(benchmark::kMicrosecond);
}

}  // namespace bench
