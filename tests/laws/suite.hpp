// SPDX-License-Identifier: MIT
/// @file  Included once by each file of this folder, behind `#define FOVEA_LAWS_OF "name"` and `using law_cases = std::tuple<...>`.

#ifndef FOVEA_LAWS_OF
#error "define FOVEA_LAWS_OF and law_cases first"
#endif

#include "support/catch.hpp"

TEMPLATE_LIST_TEST_CASE("laws of " FOVEA_LAWS_OF, "", law_cases) {
  const laws::subject s = laws::subject_of<TestType>();
  for (const laws::named_law& law : laws::all) {
    INFO(s.name << ": " << law.name);
    CHECK(law.check(s) == std::string());
  }
}
