// SPDX-License-Identifier: MIT
#pragma once
/// @file  What the program says when it cannot go on: one clear line, exit code 2.

#include <sstream>
#include <stdexcept>
#include <string>

namespace engine {

struct error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// refuse("layer ", 31, " does not exist") throws error.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw error(text.str());
}

}  // namespace engine
