// SPDX-License-Identifier: MIT
/// @file  docs/numerics.md names tests: each of them exists.

#include <fstream>
#include <iterator>
#include <regex>
#include <string>

#include "support/catch.hpp"

namespace {

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

TEST_CASE("docs: every test that numerics.md names exists") {
  const std::string tests = FOVEA_TEST_DATA_DIR "/../", page = text_of(tests + "../docs/numerics.md");
  REQUIRE(page.size() > 1000);
  // After "Tests:": `folder/file.cpp` and then one or more quoted names, of which each stands in that file.
  static const std::regex token("Tests:|\n\n|`([a-z0-9]+/[a-z0-9_]+\\.[ch]pp)`|\"([^\"\n]+)\"");
  bool listing = false;
  std::string file, source;
  int named = 0;
  for (std::sregex_iterator it(page.begin(), page.end(), token), end; it != end; ++it) {
    const std::smatch& m = *it;
    if (m.str() == "Tests:") listing = true, file.clear();
    if (m.str() == "\n\n") listing = false;
    if (!listing) continue;
    if (m[1].matched) {
      file = m[1], source = text_of(tests + file);
      CAPTURE(file);
      CHECK_FALSE(source.empty());
    }
    if (m[2].matched) {
      CAPTURE(file, m[2].str());
      CHECK(source.find(m[2].str()) != std::string::npos);
      ++named;
    }
  }
  CHECK(named > 40);
}
