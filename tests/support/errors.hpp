// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a refused call says.

#include <string>

#include <fovea/core/contract.hpp>

namespace test {

/// The sentence of the contract_error that f throws, or "accepted".
template <class F>
std::string refusal(F&& f) {
  try {
    f();
  } catch (const fovea::contract_error& e) {
    return e.what();
  }
  return "accepted";
}
inline bool says(const std::string& sentence, const std::string& part) {
  return sentence.find(part) != std::string::npos;
}

}  // namespace test

#define CHECK_SAYS(sentence, part)        \
  do {                                    \
    const std::string said_ = (sentence); \
    INFO(said_);                          \
    CHECK(::test::says(said_, part));     \
  } while (false)
