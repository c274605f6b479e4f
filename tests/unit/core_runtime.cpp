// SPDX-License-Identifier: MIT
/// @file  Executors, scratch memory and states: stress, "measuring = using", and every damaged byte noticed.

#include <atomic>
#include <numeric>
#include <thread>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

#include <fovea/core/exec.hpp>
#include <fovea/core/state.hpp>

namespace {

using namespace fovea;

/// Every task once; a slot never used by two threads at a time.
void every_task_once(exec_ref exec, isize tasks) {
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(tasks)), busy(64);
  std::atomic<int> faults{0};
  exec.for_tasks(tasks, [&](isize task, isize slot) {
    if (slot < 0 || slot >= std::min<isize>(exec.concurrency(), tasks) ||
        busy[static_cast<std::size_t>(slot)].fetch_add(1) != 0)
      ++faults;
    ++seen[static_cast<std::size_t>(task)];
    --busy[static_cast<std::size_t>(slot)];
  });
  int wrong = 0;
  for (const auto& s : seen) wrong += s.load() != 1;
  CAPTURE(tasks, exec.concurrency());
  CHECK(wrong == 0);
  CHECK(faults.load() == 0);
}

}  // namespace

TEST_CASE("exec: every policy runs every task once, slots are exclusive") {
  const threads three(3), one(1);
  const executor engine(2, [](isize n, auto&& f) {
    std::thread back([&] {
      for (isize i = n - 1; i >= n / 2; --i) f(i);
    });
    for (isize i = 0; i < n / 2; ++i) f(i);
    back.join();
  });
  for (isize tasks : {0, 1, 2, 3, 7, 100}) {
    every_task_once(serial, tasks);
    every_task_once(one, tasks);
    every_task_once(three, tasks);
    every_task_once(engine, tasks);
#if defined(_OPENMP)
    every_task_once(openmp{2}, tasks);
#endif
  }
}

TEST_CASE("exec: the pool survives thousands of short calls, and its results are visible to the caller") {
  const threads pool(4);
  std::vector<long> out(64);
  for (long round = 0; round < 3000; ++round) {
    pool.parallel_for(round % 5 == 0 ? 64 : 3, [&](isize i) { out[static_cast<std::size_t>(i)] = round + i; });
    for (isize i = 0; i < (round % 5 == 0 ? 64 : 3); ++i) REQUIRE(out[static_cast<std::size_t>(i)] == round + i);
  }
}

TEST_CASE("exec: several callers may share one pool, pools come and go") {
  const threads pool(3);
  std::atomic<long> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) pool.parallel_for(10, [&](isize i) { sum += i; });
    });
  for (auto& t : callers) t.join();
  CHECK(sum.load() == 4 * 200 * 45);
  for (int round = 0; round < 50; ++round) {
    const threads brief(1 + round % 4);
    if (round % 3 != 0) brief.parallel_for(5, [&](isize) { ++sum; });
  }
  CHECK(sum.load() == 4 * 200 * 45 + 33 * 5);
}

TEST_CASE("exec: a count that makes no sense is refused") {
  CHECK_SAYS(test::refusal([] { threads t(0); }), "threads(0): wanted 1 to 4096 threads");
  CHECK_SAYS(test::refusal([] { threads t(-2); }), "threads(-2)");
  CHECK_SAYS(test::refusal([] { threads t(5000); }), "threads(5000)");
  const auto f = [](isize, auto&&) {};
  CHECK_SAYS(test::refusal([&] { executor<decltype(f)> e(0, f); }), "concurrency is 0");
}

TEST_CASE("arena: what was measured suffices at every alignment, pieces are aligned and apart") {
  test::random r(3);
  for (int round = 0; round < 300; ++round) {
    std::vector<isize> counts;
    for (isize k = r.integer(0, 6); k > 0; --k) counts.push_back(r.integer(0, 50));
    const auto layout = [&](arena& a) {
      std::vector<std::pair<std::byte*, std::size_t>> pieces;
      for (std::size_t k = 0; k < counts.size(); ++k)
        if (k % 2 == 0)
          pieces.emplace_back(reinterpret_cast<std::byte*>(a.take<float>(counts[k])),
                              static_cast<std::size_t>(counts[k]) * 4);
        else
          pieces.emplace_back(reinterpret_cast<std::byte*>(a.take<double>(counts[k])),
                              static_cast<std::size_t>(counts[k]) * 8);
      return pieces;
    };
    arena measure;
    for (const auto& [p, bytes] : layout(measure)) CHECK(p == nullptr);
    const std::size_t need = measure.bytes(), shift = static_cast<std::size_t>(r.integer(0, 127));
    std::vector<std::byte> memory(shift + need + 1);
    arena use(std::span(memory.data() + shift, need));
    const std::byte* last = memory.data() + shift;
    for (const auto& [p, bytes] : layout(use)) {
      if (p == nullptr) continue;  // nothing was needed at all
      CHECK(reinterpret_cast<std::uintptr_t>(p) % alignment == 0);
      if (bytes == 0) continue;
      CHECK(p >= last);
      CHECK(p + bytes <= memory.data() + shift + need);
      last = p + bytes;
    }
  }
}

TEST_CASE("buffer: copies are deep, moves leave nothing behind") {
  buffer a(100);
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % alignment == 0);
  for (std::size_t i = 0; i < 100; ++i) a.data()[i] = static_cast<std::byte>(i);
  buffer b = a;
  b.data()[0] = std::byte{77};
  CHECK(a.data()[0] == std::byte{0});
  b = a;
  CHECK(b.data()[0] == std::byte{0});
  CHECK(b.data()[99] == std::byte{99});
  const buffer c = std::move(b);
  CHECK(c.size() == 100);
  CHECK(buffer().data() == nullptr);
  CHECK(buffer(0).size() == 0);
}

namespace {
state example() {
  state s(0x1234567890abcdefULL, {2, 4, 2, 0, 7, 8, 16, dtype::bf16}, 100);
  for (std::size_t i = 0; i < 100; ++i) s.as<std::byte>()[i] = static_cast<std::byte>(3 * i);
  s.set_tokens(5);
  return s;
}
}  // namespace

TEST_CASE("state: new ones are zero, saved and restored ones are equal, copies are snapshots") {
  const state zero(1, {}, 64);
  for (std::size_t i = 0; i < 64; ++i) CHECK(zero.as<unsigned char>()[i] == 0);
  const state s = example();
  const auto saved = s.save();
  const state back = state::restore(saved);
  CHECK(back.save() == saved);
  CHECK(back.tag() == s.tag());
  CHECK(back.tokens() == 5);
  CHECK(back.bytes() == 100);
  CHECK(back.sizes().G == 2);
  CHECK(back.sizes().e == 16);
  CHECK(back.sizes().type == dtype::bf16);
  state snapshot = s;
  snapshot.as<unsigned char>()[0] = 99;
  CHECK(s.save() == saved);
  CHECK(snapshot.save() != saved);
  CHECK(state::restore(state().save()).bytes() == 0);
}

TEST_CASE("state: any truncation, any single damaged byte, and foreign bytes are refused") {
  const auto saved = example().save();
  for (std::size_t length = 0; length < saved.size(); ++length) {
    CAPTURE(length);
    REQUIRE(test::refusal([&] { state::restore(std::span(saved).first(length)); }) != "accepted");
  }
  for (std::size_t at = 0; at < saved.size(); ++at)
    for (int bit : {0, 3, 7}) {
      auto damaged = saved;
      damaged[at] ^= static_cast<std::byte>(1U << bit);
      CAPTURE(at, bit);
      REQUIRE(test::refusal([&] { state::restore(damaged); }) != "accepted");
    }
  auto longer = saved;
  longer.push_back(std::byte{0});
  CHECK_SAYS(test::refusal([&] { state::restore(longer); }), "announces 100 bytes and holds 101");
  CHECK_SAYS(test::refusal([&] { state::restore({}); }), "shorter than its header");
  const std::vector<std::byte> noise(saved.size(), std::byte{0x5a});
  CHECK_SAYS(test::refusal([&] { state::restore(noise); }), "wrong magic");
}

TEST_CASE("state: check refuses another mechanism, shape or storage") {
  const state s = example();
  const shape fits{2, 4, 2, 3, 3, 8, 16, dtype::f32};
  CHECK(test::refusal([&] { s.check(s.tag(), fits, "linear_attention"); }) == "accepted");
  CHECK_SAYS(test::refusal([&] { s.check(s.tag() + 1, fits, "linear_attention"); }),
             "not made by this linear_attention");
  for (isize shape::*member : {&shape::B, &shape::H, &shape::G, &shape::d, &shape::e}) {
    shape other = fits;
    other.*member += 1;
    CHECK_SAYS(test::refusal([&] { s.check(s.tag(), other, "linear_attention"); }),
               "the state was made for B, H, G, d, e = 2, 4, 2, 8, 16");
  }
  shape wide = fits;
  wide.type = dtype::f64;
  CHECK_SAYS(test::refusal([&] { s.check(s.tag(), wide, "linear_attention"); }),
             "the state was made for bf16 and the call is f64");
}
