// SPDX-License-Identifier: MIT
#pragma once
/// @file  How a program ends that cannot do what it was asked: one line on stderr, exit code 2.

#include <cstdio>
#include <string>

/// Prints "program: what" in one line, control characters of `what` as blanks, and returns 2 for main() to return.
inline int complain(const char* program, const std::string& what) {
  std::string line = what;
  for (char& c : line)
    if (static_cast<unsigned char>(c) < 0x20) c = ' ';
  std::fprintf(stderr, "%s: %s\n", program, line.c_str());
  return 2;
}
