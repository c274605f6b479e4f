// SPDX-License-Identifier: MIT
#pragma once
/// @file  The tensor `lengths` [B] of a configuration, or another of its kind: how many keys (queries) each item of a padded batch has.

#include <cstdint>
#include <vector>

#include <fovea/core/configuration.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline std::vector<std::int32_t> lengths_of(configuration_reader& r, const char* name = "lengths") {
  std::vector<std::int32_t> out;
  const array* a = r.tensor(name);
  if (a == nullptr) return out;
  require(a->rank() == 1 && !is_float(a->type()), "tensor ", name, " is ", a->describe(), "; wanted [B] whole numbers");
  for (isize i = 0; i < a->size(); ++i) {
    const double x = a->at(i);
    require(x >= 0 && x <= 2147483647.0, name, "[", i, "] is ", x, "; wanted 0 to 2147483647");
    out.push_back(static_cast<std::int32_t>(x));
  }
  return out;
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
