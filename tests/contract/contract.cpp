// SPDX-License-Identifier: MIT
/// @file  The violations that every mechanism must refuse.

#include "contract/contract.hpp"

namespace contract {

arguments::arguments(isize n, isize m, isize d, isize e, dtype type) {
  test::random r(1);
  q = test::normal(r, type, 2, 4, n, d), k = test::normal(r, type, 2, 2, m, d), v = test::normal(r, type, 2, 2, m, e);
  out = test::unwritten(type, 2, 4, n, e), lse = test::unwritten(dtype::f32, 2, 4, n, 1);
  const tensor* all[] = {&q, &k, &v, &out, &lse};
  for (std::size_t i = 0; i < 5; ++i) before_[i] = all[i]->bytes();
}

std::string arguments::touched() const {
  const std::pair<const char*, const tensor*> all[] = {{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}, {"lse", &lse}};
  for (std::size_t i = 0; i < 5; ++i)
    if (all[i].second->bytes() != before_[i]) return all[i].first;
  return {};
}

void refuses(const caller& c, const char* what, const std::function<void(problem&, arguments&)>& spoil,
             std::initializer_list<const char*> words) {
  arguments a(c.n, c.m, c.d, c.e);
  problem p = a.good(c.lse);
  c.prepare(p);
  spoil(p, a);
  INFO(c.name << ": " << what);
  std::string said;
  try {
    said = test::refusal([&] { c.call(p); });
  } catch (const std::exception& e) {
    said = std::string("accepted, or worse: ") + e.what();
  }
  INFO("it said: " << said);
  CHECK_FALSE(test::says(said, "accepted"));
  CHECK(said.rfind("fovea: ", 0) == 0);
  for (const char* w : words) CHECK_SAYS(said, w);
  CHECK(a.touched() == std::string());
}

void refuses_what_it_must(const caller& c) {
  {
    arguments a(c.n, c.m, c.d, c.e);
    problem p = a.good(c.lse);
    c.prepare(p);
    INFO(c.name);
    CHECK(test::refusal([&] { c.call(p); }) == "accepted");
  }
  using P = problem;
  using A = arguments;
  // nulls
  refuses(c, "null q", [](P& p, A&) { p.q.data = nullptr; }, {"q is null", "[2, 4, 3, 8] f32"});
  refuses(c, "null k", [](P& p, A&) { p.k.data = nullptr; }, {"k is null"});
  refuses(c, "null v", [](P& p, A&) { p.v.data = nullptr; }, {"v is null"});
  refuses(c, "null out", [](P& p, A&) { p.out.data = nullptr; }, {"out is null"});
  // shapes
  refuses(c, "negative size", [](P& p, A&) { p.q.batch = -1; }, {"q is [-1, 4, 3, 8]", "must not be negative"});
  refuses(c, "batch sizes differ", [](P& p, A&) { p.k.batch = 1; }, {"batch", "2", "1", "must be equal"});
  refuses(c, "k and v heads differ", [](P& p, A&) { p.v.heads = 1; }, {"v", "1", "heads"});
  refuses(c, "H is no multiple of G", [](P& p, A&) { p.q.heads = p.out.heads = 3, p.lse.heads = 3; },
          {"q has 3 heads and k has 2", "multiple"});
  refuses(c, "no KV heads", [](P& p, A&) { p.k.heads = p.v.heads = 0; }, {"heads"});
  refuses(c, "k of another width", [](P& p, A&) { p.k.width = 7; }, {"q is 8 wide and k is 7"});
  refuses(c, "fewer values than keys", [](P& p, A&) { p.v.length -= 1; }, {"k holds", "v holds", "must be equal"});
  refuses(c, "no width", [](P& p, A&) { p.q.width = p.k.width = 0; }, {"wide", "must be positive"});
  refuses(c, "out too short", [](P& p, A&) { p.out.length -= 1; }, {"out is [2, 4, 2, 6] f32", "wanted [2, 4, 3, 6]"});
  refuses(c, "out too narrow", [](P& p, A&) { p.out.width -= 1; }, {"out is [2, 4, 3, 5] f32", "wanted [2, 4, 3, 6]"});
  refuses(c, "out with other heads", [](P& p, A&) { p.out.heads -= 1; },
          {"out is [2, 3, 3, 6] f32", "wanted [2, 4, 3, 6]"});
  // types
  refuses(c, "k of another type", [](P& p, A&) { p.k.type = dtype::bf16; },
          {"q, k, v are stored as f32, bf16, f32", "one type"});
  refuses(c, "f64 out of f32 inputs", [](P& p, A&) { p.out.type = dtype::f64; },
          {"out is f64 and q is f32", "f64 goes with f64 only"});
  // strides
  refuses(c, "rows overlap", [](P& p, A&) { p.k.row_stride = 7; }, {"k has a row stride of 7", "width 8"});
  refuses(c, "out rows overlap", [](P& p, A&) { p.out.row_stride = 5; }, {"out has a row stride of 5"});
  refuses(c, "out heads share memory", [](P& p, A&) { p.out.head_stride = 0; }, {"out", "stride"});
  refuses(c, "out batch items share memory", [](P& p, A&) { p.out.batch_stride = p.out.head_stride; },
          {"out", "stride"});
  refuses(c, "negative stride", [](P& p, A&) { p.v.head_stride = -18; }, {"v", "stride"});
  // aliasing
  refuses(c, "out is q", [](P& p, A&) { p.out.data = const_cast<void*>(p.q.data); }, {"out overlaps q"});
  refuses(c, "out is v", [](P& p, A&) { p.out.data = const_cast<void*>(p.v.data); }, {"out overlaps v"});
  refuses(c, "out ends in k", [](P& p, A&) { p.k.data = static_cast<const float*>(p.out.data) + 2 * 4 * 3 * 6 - 1; },
          {"out overlaps k"});
  // lse
  if (c.lse) {
    refuses(c, "lse of another shape", [](P& p, A&) { p.lse.length -= 1; },
            {"lse is [2, 4, 2, 1] f32", "wanted [2, 4, 3, 1]"});
    refuses(c, "lse of another type", [](P& p, A&) { p.lse.type = dtype::bf16; }, {"lse is bf16"});
    refuses(c, "lse in out", [](P& p, A&) { p.lse.data = p.out.data; }, {"lse overlaps out"});
    refuses(c, "lse in v", [](P& p, A&) { p.lse.data = const_cast<void*>(p.v.data); }, {"lse overlaps v"});
  } else {
    refuses(c, "an lse that it has not", [](P& p, A& a) { p.lse = a.lse; }, {"lse"});
  }
  if (!c.gates) {
    refuses(c, "gates that it has not", [](P& p, A& a) { p.gates.beta = a.lse; }, {"gates", "this mechanism has none"});
    refuses(c, "a decay that it has not", [](P& p, A& a) { p.gates.log_decay = a.lse; }, {"gates"});
  }
}

}  // namespace contract
