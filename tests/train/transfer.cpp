// SPDX-License-Identifier: MIT
/// @file  Learning of feature maps: the gradient of the loss, the fall of the loss on real rows, resuming, stopping, threads, refusals.

#include <fovea/interop/safetensors.hpp>
#include <fovea/train.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

using namespace fovea;
using namespace fovea::train;

namespace {

transfer_head draw_head(test::random& r, isize R, isize n, isize d, isize e, bool causal) {
  transfer_head t;
  t.R = R, t.n = n, t.d = d, t.e = e, t.causal = causal, t.scale = 0.5F;
  const auto fill = [&](std::vector<float>& x, isize count) {
    x.resize(static_cast<std::size_t>(count));
    for (float& y : x) y = static_cast<float>(r.normal());
  };
  fill(t.q, R * n * d), fill(t.k, n * d), fill(t.v, n * e);
  t.o.resize(static_cast<std::size_t>(R * n * e)), t.lse.resize(static_cast<std::size_t>(R * n));
  const softmax_attention exact{.mask = causal ? mask(fovea::causal{}) : mask(no_mask{}), .scale = 0.5};
  prefill(serial, exact, bhnd<const float>(t.q.data(), 1, R, n, d), bhnd<const float>(t.k.data(), 1, 1, n, d),
          bhnd<const float>(t.v.data(), 1, 1, n, e), bhnd(t.o.data(), 1, R, n, e),
          {.lse = bhnd(t.lse.data(), 1, R, n, 1), .gates = {}});
  t.turn();
  return t;
}

/// Heads 0-2 of a middle layer, 320 tokens.
struct captured {
  isize n = 320, d = 64;
  std::vector<float> q, k, v;
  captured() {
    const auto file = read_safetensors(FOVEA_DATA_DIR "/smollm2_layer14.safetensors");
    const auto cut = [&](const char* name, isize heads) {
      const array& a = file.tensors.at(name);
      const std::vector<float> all = a.floats();
      std::vector<float> out;
      for (isize h = 0; h < heads; ++h) {
        const auto at = all.begin() + h * a.dim(-2) * d;
        out.insert(out.end(), at, at + n * d);
      }
      return out;
    };
    q = cut("q", 6), k = cut("k", 2), v = cut("v", 2);
  }
  calibration make(const calibration_options& o) const {
    return calibration(o, bhnd(q.data(), 1, 6, n, d), bhnd(k.data(), 1, 2, n, d), bhnd(v.data(), 1, 2, n, d), 0.125,
                       true);
  }
};
calibration_options small(map_kind map, isize window) {
  calibration_options o;
  o.map = map, o.steps = 30, o.rows = 16, o.look_every = 10, o.look_rows = 16;
  o.loss.window = window, o.loss.first = window > 0 ? 4 : 0;
  return o;
}
bool same(const arrays& a, const arrays& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [name, x] : a) {
    const auto at = b.find(name);
    if (at == b.end() || x.bytes() != at->second.bytes() || std::memcmp(x.data(), at->second.data(), x.bytes()) != 0)
      return false;
  }
  return true;
}
const auto silent = [](const calibration_progress&) { return true; };

}  // namespace

TEST_CASE("transfer loss: the gradient against central differences, every map, loss and window") {
  for (const map_kind kind : {map_kind::t2r, map_kind::hedgehog, map_kind::hedgehog_two, map_kind::dijiang})
    for (const isize window : {0, 5})
      for (const int loss : {0, 1, 2}) {
        test::random r(static_cast<std::uint64_t>(kind) * 10 + static_cast<std::uint64_t>(loss));
        const bool causal = window > 0 || loss != 1;
        const transfer_head data = draw_head(r, 2, 40, 4, 3, causal);
        const learned_map form(kind, 4, 2, 0, window > 0, 7);
        const transfer_loss how{loss == 0 ? 1.0 : 0.0, loss == 1 ? 1.0 : 0.0, loss == 2 ? 1.0 : 0.0, window,
                                window > 0 ? 2 : 0};
        attention_transfer transfer(data, form, how);
        std::vector<float> x = form.start(0), gradient;
        for (float& y : x) y += static_cast<float>(0.1 * r.normal());
        for (isize h = 0; kind == map_kind::t2r && h < 3; ++h)  // away from the kinks
          for (isize j = 0; j < 4; ++j) x[static_cast<std::size_t>(h * form.of_head() + 16 + j)] += 4.0F;
        const std::vector<isize> rows{8, 9, 17, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 39};
        const double at = transfer(x, rows, &gradient).loss;
        CAPTURE(name_of(kind), window, loss, at);
        double worst = 0, top = 0;
        for (std::size_t i = 0; i < x.size(); ++i) {
          const float kept = x[i], step = 4e-3F;
          x[i] = kept + step;
          const double up = transfer(x, rows, nullptr).loss;
          x[i] = kept - step;
          const double slope = (up - transfer(x, rows, nullptr).loss) / (2 * static_cast<double>(step));
          x[i] = kept;
          worst = std::max(worst, std::fabs(slope - static_cast<double>(gradient[i])));
          top = std::max(top, std::fabs(slope));
        }
        CHECK(top > 1e-3);
        CHECK(worst < 0.02 * top + 2e-4);  // f32 sums
      }
}

TEST_CASE(
    "calibration: the loss on held-out rows falls, for every map, and the weights make the map that was learned") {
  const captured data;
  for (const map_kind kind : {map_kind::t2r, map_kind::hedgehog, map_kind::hedgehog_two, map_kind::dijiang}) {
    CAPTURE(name_of(kind));
    calibration c = data.make(small(kind, kind == map_kind::hedgehog ? 64 : 0));
    double first = 0, best = 0;
    c.run(serial, [&](const calibration_progress& p) {
      if (p.step == p.steps || p.stopped) first += p.first, best += p.best;
      return true;
    });
    CHECK(c.finished());
    CHECK(best < (kind == map_kind::dijiang ? 0.98 : 0.9) * first);  // D and t cannot turn the directions
    for (const auto& [name, a] : c.weights())
      for (const float w : a.floats()) CHECK(std::isfinite(w));
  }
}

TEST_CASE("calibration: the rest starts at the weight that exact attention gives it") {
  test::random r(3);
  const transfer_head data = draw_head(r, 2, 200, 4, 3, true);
  const learned_map form(map_kind::hedgehog_two, 4, 2, 0, true, 7);
  attention_transfer transfer(data, form, {1.0, 0.0, 0.0, 8, 2});
  std::vector<isize> rows;
  for (isize i = 20; i < 200; i += 3) rows.push_back(i);
  std::vector<float> x = form.start(0);
  const double before = transfer(x, rows, nullptr).cross_entropy;
  transfer.match_rest(x, rows);
  const double matched = transfer(x, rows, nullptr).cross_entropy;
  CHECK(matched < 0.8 * before);
  for (const float off : {-1.0F, 1.0F})  // and no other level is better by much
    for (isize h = 0; h < 2; ++h) {
      auto y = x;
      y[static_cast<std::size_t>(form.log_weight_at(h))] += off;
      CHECK(transfer(y, rows, nullptr).cross_entropy > matched);
    }
}

TEST_CASE("calibration: threads and an interruption change no bit") {
  const captured data;
  const calibration_options o = small(map_kind::hedgehog_two, 64);
  calibration whole = data.make(o), pooled = data.make(o), broken = data.make(o), again = data.make(o);
  whole.run(serial, silent);
  pooled.run(threads(2), silent);
  CHECK(same(whole.weights(), pooled.weights()));
  broken.run(serial, [](const calibration_progress& p) { return p.step < 20; });
  CHECK_FALSE(broken.finished());
  again.resume(broken.checkpoint());
  again.run(serial, silent);
  CHECK(again.finished());
  CHECK(same(whole.weights(), again.weights()));
  CHECK(same(whole.checkpoint(), again.checkpoint()));
}

TEST_CASE(
    "calibration: a head stops when looks are no better, with the weights of the best, and the seed decides the "
    "draws") {
  const captured data;
  calibration_options o = small(map_kind::hedgehog_two, 0);
  calibration one = data.make(o);
  o.seed = 2;
  calibration two = data.make(o);
  one.run(serial, silent), two.run(serial, silent);
  CHECK_FALSE(same(one.weights(), two.weights()));

  o.optimiser.rate = 50, o.look_every = 1, o.patience = 3;  // every step makes it worse
  calibration c = data.make(o);
  isize stopped = 0;
  c.run(serial, [&](const calibration_progress& p) {
    if (!p.stopped) return true;
    ++stopped;
    CHECK(p.step == 3);
    CHECK(p.best == p.first);
    return true;
  });
  CHECK(stopped == 2);
  CHECK(c.finished());
  CHECK(same(c.weights(), data.make(o).weights()));
}

TEST_CASE("calibration: refusals") {
  const captured data;
  const auto refusal = [&](auto&& change) {
    calibration_options o = small(map_kind::hedgehog, 0);
    change(o);
    return test::refusal([&] { (void)data.make(o); });
  };
  CHECK_SAYS(refusal([](auto& o) { o.rows = 4000; }), "too few for batches of 4000");
  CHECK_SAYS(refusal([](auto& o) { o.held_out = 1.5; }), "held_out is 1.5");
  CHECK_SAYS(refusal([](auto& o) { o.features = 7; }), "Hedgehog has pairs");
  CHECK_SAYS(refusal([](auto& o) { o.steps = 0; }), "must be positive");
  CHECK_SAYS(refusal([](auto& o) { o.optimiser.rate = 0; }), "positive rate");
  calibration c = data.make(small(map_kind::hedgehog, 0)), other = data.make(small(map_kind::t2r, 0));
  CHECK_SAYS(test::refusal([&] { c.resume(other.checkpoint()); }), "written with other options");
  CHECK_SAYS(test::refusal([&] { c.resume({}); }), "has no tensor options");
}
