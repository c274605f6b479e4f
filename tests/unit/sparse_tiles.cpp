// SPDX-License-Identifier: MIT
/// @file  kernel/sparse_tiles.hpp against plain loops in double: lists of blocks, edges, biases, rounds, storage types, NaN.

#include <cmath>
#include <fovea/kernel/sparse_tiles.hpp>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;
using loop = kernel::sparse_tiles<simd::native, float>;
using loop64 = kernel::sparse_tiles<simd::native, double>;

constexpr double none = -std::numeric_limits<double>::infinity();

/// A set of keys, its lists for each tile, and what they leave for each row.
struct trial {
  isize n, m, d, e, block, offset;
  bool causal;
  dtype type;
  test::random r;
  tensor q, k, v, out, lse;
  std::vector<kernel::tile_rows> tiles;
  std::vector<std::vector<std::int32_t>> lists;

  trial(isize rows, isize queries, isize keys, isize width, isize values, isize size, bool is_causal, double share,
        dtype t = dtype::f32, std::uint64_t seed = 1)
      : n(queries),
        m(keys),
        d(width),
        e(values),
        block(size),
        offset(keys - queries),
        causal(is_causal),
        type(t),
        r(seed) {
    q = test::normal(r, type, 1, 1, n, d), k = test::normal(r, type, 1, 1, m, d), v = test::normal(r, type, 1, 1, m, e);
    out = test::unwritten(type, 1, 1, n, e);
    lse = test::unwritten(type == dtype::f64 ? type : dtype::f32, 1, 1, n, 1);
    for (isize i = 0; i < n; i += rows) {
      tiles.push_back({0, i, std::min(rows, n - i)});
      lists.emplace_back();
      for (isize J = 0; J * block < m; ++J)
        if (r.coin(share)) lists.back().push_back(static_cast<std::int32_t>(J));
    }
  }

  /// In `rounds`: block J of a list comes in round J % rounds.
  template <class Loop, class Acc>
  void run(isize rounds, const std::vector<Acc>& bias = {}, const score* modify = nullptr) {
    const isize count = static_cast<isize>(tiles.size());
    const isize height = tiles.front().count > Loop::rows ? Loop::wide_rows : Loop::rows;
    arena measure;
    Loop(measure, count, d, e, height);
    const buffer memory(measure.bytes());
    arena own(memory.span());
    Loop at(own, count, d, e, height);
    const tensor_ref Q = q, K = k, V = v;
    kernel::key_set<Acc> set;
    set.k = rows_of(K, 0, 0), set.v = rows_of(V, 0, 0), set.count = m, set.site = {0, 0, n, m, 1, 1};
    set.bias = bias.empty() ? nullptr : bias.data(), set.modify = modify;
    at.begin(Q, 0, tiles.data(), count, 0.3);
    for (isize x = 0; x < rounds; ++x) {
      std::vector<std::vector<std::int32_t>> part(lists.size());
      std::vector<kernel::block_list> views;
      for (std::size_t t = 0; t < lists.size(); ++t) {
        for (const std::int32_t J : lists[t])
          if (J % rounds == x) part[t].push_back(J);
        views.push_back({part[t].data(), static_cast<isize>(part[t].size())});
      }
      at.absorb(set, views.data(), {block, causal, offset});
    }
    std::vector<Acc> squares(static_cast<std::size_t>(height));
    lengths.clear();
    for (isize t = 0; t < count; ++t) {
      at.squared_lengths(t, squares.data());
      for (isize l = 0; l < tiles[static_cast<std::size_t>(t)].count; ++l)
        lengths.push_back(static_cast<double>(squares[static_cast<std::size_t>(l)]));
    }
    at.finish(out, lse);
  }

  /// Largest error of out, of lse and of the squared lengths.
  template <class Acc>
  double error(const std::vector<Acc>& bias = {}, bool cap = false) const {
    double worst = 0;
    for (std::size_t t = 0; t < tiles.size(); ++t)
      for (isize i = tiles[t].first; i < tiles[t].first + tiles[t].count; ++i) {
        double sum = 0, square = 0;
        std::vector<double> o(static_cast<std::size_t>(e), 0.0);
        for (const std::int32_t J : lists[t])
          for (isize j = J * block; j < std::min((J + 1) * block, m) && (!causal || j <= i + offset); ++j) {
            double s = 0;
            for (isize c = 0; c < d; ++c) s += 0.3 * q.get(0, 0, i, c) * k.get(0, 0, j, c);
            if (!bias.empty()) s += static_cast<double>(bias[static_cast<std::size_t>(j)]);
            const double p = std::exp(cap ? 2 * std::tanh(s / 2) : s);
            sum += p;
            for (isize c = 0; c < e; ++c) o[static_cast<std::size_t>(c)] += p * v.get(0, 0, j, c);
          }
        for (isize c = 0; c < e; ++c) {
          const double want = sum > 0 ? o[static_cast<std::size_t>(c)] / sum : 0, got = out.get(0, 0, i, c);
          square += want * want;
          worst = std::isfinite(got) ? std::max(worst, std::fabs(got - want)) : 1e30;
        }
        const double got = lse.get(0, 0, i, 0), want = sum > 0 ? std::log(sum) : none;
        if (got != want) worst = std::isfinite(got) ? std::max(worst, std::fabs(got - want)) : 1e30;
        const double length = lengths[static_cast<std::size_t>(i)];
        worst = std::isfinite(length) ? std::max(worst, std::fabs(length - square) / (1 + square)) : 1e30;
      }
    return worst;
  }
  std::vector<double> lengths;
};

}  // namespace

TEST_CASE("sparse tiles: lists of blocks are attention to their keys") {
  for (const bool causal : {false, true})
    for (const isize block : {isize{1}, isize{8}, isize{16}, isize{23}, isize{64}, isize{700}})
      for (const double share : {0.1, 0.6, 1.0}) {
        trial x(loop::rows, 70, 1500, 24, 40, block, causal, share, dtype::f32, static_cast<std::uint64_t>(block));
        x.run<loop, float>(1);
        CHECK(x.error<float>() < 2e-5);
        x.run<loop, float>(3);
        CHECK(x.error<float>() < 2e-5);
        trial wide(loop::wide_rows, 70, 1500, 24, 40, block, causal, share, dtype::f32,
                   static_cast<std::uint64_t>(block));
        wide.run<loop, float>(2);
        CHECK(wide.error<float>() < 2e-5);
      }
  for (const isize d : {isize{1}, isize{3}, isize{17}, isize{64}, isize{130}})
    for (const isize e : {isize{1}, isize{5}, isize{64}, isize{80}}) {
      for (const isize rows : {std::min<isize>(7, loop::rows), loop::wide_rows}) {
        trial x(rows, 40, 90, d, e, 16, true, 0.5);
        x.run<loop, float>(1);
        CHECK(x.error<float>() < 1e-4);
      }
    }
}

TEST_CASE("sparse tiles: stored types, doubles, rows that see nothing") {
  for (const dtype type : {dtype::f16, dtype::bf16}) {
    trial x(loop::rows, 50, 300, 32, 32, 16, true, 0.4, type);
    x.run<loop, float>(2);
    CHECK(x.error<float>() < (type == dtype::f16 ? 2e-3 : 2e-2));
  }
  trial wide(loop64::rows, 50, 300, 32, 24, 16, true, 0.4, dtype::f64);
  wide.run<loop64, double>(2);
  CHECK(wide.error<double>() < 1e-13);
  trial before(loop::rows, 60, 40, 16, 16, 8, true, 1.0);  // the first 20 rows come before every key
  before.run<loop, float>(1);
  CHECK(before.error<float>() < 2e-5);
  CHECK(before.lse.get(0, 0, 19, 0) == none);
  trial nothing(loop::rows, 20, 100, 16, 16, 8, false, 0.0);
  nothing.run<loop, float>(1);
  CHECK(nothing.error<float>() == 0);
}

TEST_CASE("sparse tiles: biases and score modifications") {
  trial x(loop::rows, 40, 200, 16, 16, 8, false, 0.5);
  std::vector<float> bias(200);
  for (float& b : bias) b = static_cast<float>(x.r.normal());
  x.run<loop, float>(2, bias);
  CHECK(x.error<float>(bias) < 2e-5);
  const score cap = softcap{2.0};
  trial y(loop::rows, 40, 200, 16, 16, 8, true, 0.5);
  y.run<loop, float>(1, {}, &cap);
  CHECK(y.error<float>(std::vector<float>{}, true) < 2e-5);
}

TEST_CASE("sparse tiles: what a row does not see cannot reach it") {
  for (const isize rows : {loop::rows, loop::wide_rows}) {
    trial x(rows, 64, 64, 16, 16, 8, true, 0.7);
    for (isize c = 0; c < 16; ++c)
      x.k.set(0, 0, 37, c, std::numeric_limits<double>::quiet_NaN()),
          x.v.set(0, 0, 41, c, std::numeric_limits<double>::infinity());
    x.run<loop, float>(1);
    for (std::size_t t = 0; t < x.tiles.size(); ++t)
      for (isize i = x.tiles[t].first; i < x.tiles[t].first + x.tiles[t].count; ++i) {
        bool reached = false;
        for (const std::int32_t J : x.lists[t])
          reached = reached || (J == 37 / 8 && i >= 37) || (J == 41 / 8 && i >= 41);
        CHECK(std::isfinite(x.out.get(0, 0, i, 3)) == !reached);
      }
  }
}
