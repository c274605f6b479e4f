// SPDX-License-Identifier: MIT
/// @file  A user's first program.

#include <cstdio>
#include <fovea/version.hpp>

const char* version_of_second_unit();

int main() { std::printf("fovea %s, %s\n", FOVEA_VERSION_STRING, version_of_second_unit()); }
