// SPDX-License-Identifier: MIT
/// @file  Eigen bridge: maps and views are the same memory, seen both ways. Nothing here where Eigen is not installed.

#if __has_include(<Eigen/Core>)

#include <vector>

#include <fovea/interop/eigen.hpp>

#include "interop/files.hpp"

using test::holds;
using test::message_of;

TEST_CASE("Eigen: one head of a strided view is a matrix map") {
  std::vector<float> memory(2 * 5 * 3 * 4);  // [B, n, H, d]
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i);
  const auto v = fovea::bnhd(memory.data(), 2, 5, 3, 4);
  auto m = fovea::as_eigen(v, 1, 2);
  REQUIRE(m.rows() == 5);
  REQUIRE(m.cols() == 4);
  CHECK(m(3, 1) == v(1, 2, 3, 1));
  m(3, 1) = -1.F;
  CHECK(v(1, 2, 3, 1) == -1.F);
  const fovea::view<const float> constant = v;
  CHECK(fovea::as_eigen(constant, 1, 2).data() == m.data());
  CHECK(holds(message_of([&] { (void)fovea::as_eigen(v, 2, 0); }), "as_eigen: batch item 2"));
  CHECK(holds(message_of([&] { (void)fovea::as_eigen(v, 0, -1); }), "head -1"));
}

TEST_CASE("Eigen: a row-major matrix and a block of its rows are views") {
  fovea::row_major_matrix<double> m(6, 4);
  m.setRandom();
  const auto v = fovea::as_view(m);
  CHECK(v.length == 6);
  CHECK(v.width == 4);
  CHECK(&v(0, 0, 5, 3) == &m(5, 3));
  auto block = m.block(1, 1, 3, 2);
  const auto b = fovea::as_view(block);
  CHECK(b.row_stride == 4);
  CHECK(&b(0, 0, 2, 1) == &m(3, 2));
  CHECK(fovea::as_eigen(v, 0, 0) == m);
}

#endif
