// SPDX-License-Identifier: MIT
/// @file  The program of docs/mechanisms/kv_stores.md, and the int8 errors that the page gives, on real keys and values.

#include "cache/model.hpp"

#if __has_include(<nlohmann/json.hpp>)
#include <fovea/interop/safetensors.hpp>
#endif

TEST_CASE("the document's program runs") {
  constexpr fovea::isize H = 8, G = 2, d = 64;
  test::random r(1);
  const test::tensor K = test::normal(r, fovea::dtype::f32, 1, G, 108, d),
                     V = test::normal(r, fovea::dtype::f32, 1, G, 108, d),
                     Q = test::normal(r, fovea::dtype::f32, 1, H, 8, d);
  test::tensor O = test::unwritten(fovea::dtype::f32, 1, H, 8, d);
  const fovea::tensor_ref k = K, v = V, q = Q;
  const fovea::tensor_mut out = O;

  // clang-format off
  fovea::paged_pool pool({.heads = G, .d = d, .e = d, .type = fovea::dtype::bf16}, 16, 256);   // 256 pages of 16 tokens
  fovea::page_table prompt;
  pool.append(prompt, k.slice(0, 100), v.slice(0, 100));                      // k, v [1, G, n, d]
  fovea::page_table a = pool.fork(prompt), b = pool.fork(prompt);             // two sequences on the same pages
  pool.append(a, k.slice(100, 1), v.slice(100, 1));                           // the last page was shared: a gets its own
  pool.append(b, k.slice(101, 7), v.slice(101, 7));                           // seven draft tokens

  const fovea::softmax_attention exact{.mask = fovea::causal{}};
  const std::vector<fovea::kv_sequence> kv{pool.view(a), pool.view(b)};
  const std::vector<std::int32_t> rows{0, 1, 8};                              // one row of a, seven of b: q [1, H, 8, d]
  fovea::prefill(fovea::serial, exact, q, kv, out, {.cu_q = rows});
  pool.truncate(b, 103);                                                      // three drafts were right

  fovea::ring_store ring({.heads = G, .d = d, .e = d, .type = fovea::dtype::i8}, {.window = 1024, .first = 4, .chunk = 128});
  const fovea::softmax_attention streaming{.mask = fovea::window{.width = 1024, .first = 4}};
  fovea::prefill(fovea::serial, streaming, q, k.slice(0, 8), v.slice(0, 8), out, ring);        // append and attend
  // clang-format on

  CHECK(pool.free_pages() == 256 - 9);
  CHECK(ring.tokens() == 8);
  for (double x : O.values().data) CHECK(std::isfinite(x));
}

#if __has_include(<nlohmann/json.hpp>)
TEST_CASE("the document's int8 errors hold on real keys and values") {
  using namespace fovea;
  struct line {
    const char* file;
    dtype type;
    scale_per scale;
    double rms, worst;                      // of the largest |out| of the head, with room of a tenth
    bool rotated = false, in_int8 = false;  // in_int8: every 37th token decodes in integers
  };
  const line lines[] = {{"smollm2_layer00", dtype::i8, scale_per::row, 0.0091, 0.0056},
                        {"smollm2_layer00", dtype::i8, scale_per::group, 0.0071, 0.0034},
                        {"smollm2_layer00", dtype::i8, scale_per::row, 0.0091, 0.0034, true},
                        {"smollm2_layer00", dtype::i8, scale_per::row, 0.0089, 0.0035, true, true},
                        {"smollm2_layer00", dtype::i8, scale_per::row, 0.0092, 0.0033, false, true},
                        {"smollm2_layer00", dtype::bf16, scale_per::row, 0.0008, 0.0018},
                        {"smollm2_layer14", dtype::i8, scale_per::row, 0.018, 0.029},
                        {"smollm2_layer14", dtype::i8, scale_per::group, 0.013, 0.021},
                        {"smollm2_layer14", dtype::i8, scale_per::row, 0.0110, 0.0172, true},
                        {"smollm2_layer14", dtype::i8, scale_per::row, 0.0151, 0.0179, true, true},
                        {"smollm2_layer14", dtype::i8, scale_per::row, 0.0287, 0.0316, false, true},
                        {"smollm2_layer14", dtype::bf16, scale_per::row, 0.0041, 0.0056},
                        {"smollm2_layer29", dtype::i8, scale_per::row, 0.013, 0.025},
                        {"smollm2_layer29", dtype::i8, scale_per::group, 0.0105, 0.017},
                        {"smollm2_layer29", dtype::i8, scale_per::row, 0.0084, 0.0130, true},
                        {"smollm2_layer29", dtype::i8, scale_per::row, 0.0122, 0.0149, true, true},
                        {"smollm2_layer29", dtype::i8, scale_per::row, 0.0188, 0.0261, false, true},
                        {"smollm2_layer29", dtype::bf16, scale_per::row, 0.0043, 0.005},
                        {"minilm_layer2", dtype::i8, scale_per::row, 0.0078, 0.0122},
                        {"minilm_layer2", dtype::i8, scale_per::group, 0.0078, 0.0122},
                        {"minilm_layer2", dtype::i8, scale_per::row, 0.0076, 0.0131, true},
                        {"minilm_layer2", dtype::i8, scale_per::row, 0.0111, 0.0130, true, true},
                        {"minilm_layer2", dtype::i8, scale_per::row, 0.0104, 0.0124, false, true},
                        {"minilm_layer2", dtype::bf16, scale_per::row, 0.0027, 0.0059}};
  for (const line& x : lines) {
    const auto f = read_safetensors(std::string(FOVEA_DATA_DIR) + "/" + x.file + ".safetensors");
    const auto view_of = [&](const char* name) {
      const fovea::array& t = f.tensors.at(name);
      const isize heads = t.dim(-3), n = t.dim(-2), w = t.dim(-1);
      return tensor_ref(t.data(), dtype::f16, 1, heads, n, w, heads * n * w, n * w, w);
    };
    const tensor_ref q = view_of("q"), k = view_of("k"), v = view_of("v");
    const kv_shape shape{
        .heads = k.heads, .d = k.width, .e = v.width, .type = x.type, .scale = x.scale, .rotated = x.rotated};
    contiguous_store store(shape, k.length);
    store.append(k, v);
    const softmax_attention m =
        std::string(x.file) == "minilm_layer2" ? softmax_attention{} : softmax_attention{.mask = causal{}};
    test::tensor want(dtype::f32, 1, q.heads, q.length, v.width), got(dtype::f32, 1, q.heads, q.length, v.width);
    prefill(serial, m, q, k, v, want);
    kv_sequence kv = store.view();
    prefill(serial, m, q, {&kv, 1}, got);
    if (x.in_int8) {
      softmax_attention integers = m;
      integers.arithmetic = precision::int8;
      got = want;
      for (isize i = 0; i < q.length; i += 37) {
        kv.length = m.mask.is_none() ? k.length : i + 1;
        step(serial, integers, q.slice(i, 1), {&kv, 1}, got.ref().slice(i, 1));
      }
    }
    const auto a = want.values().data, b = got.values().data;
    double sum = 0, gap = 0, top = 0, worst = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (x.in_int8 && static_cast<isize>(i) / v.width % q.length % 37 != 0) continue;
      sum += a[i] * a[i], gap += (a[i] - b[i]) * (a[i] - b[i]);
      top = std::fmax(top, std::fabs(a[i])), worst = std::fmax(worst, std::fabs(a[i] - b[i]));
    }
    const double rms = std::sqrt(gap / sum);
    INFO(x.file << ", " << fovea::name_of(x.type) << (x.scale == scale_per::row ? " rows" : " groups")
                << (x.rotated ? " rotated" : "") << (x.in_int8 ? " in int8" : "") << ": rms " << rms << ", worst "
                << worst / top);
    CHECK(rms <= 1.1 * x.rms);
    CHECK(worst / top <= 1.1 * x.worst);
    CHECK(rms >= 0.5 * x.rms);  // the page is not too modest either
  }
}
#endif
