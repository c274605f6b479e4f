// SPDX-License-Identifier: MIT
/// @file  A second translation unit: including the library twice in one program must link.

#include <fovea/version.hpp>

const char* version_of_second_unit() { return FOVEA_VERSION_STRING; }
