// SPDX-License-Identifier: MIT
#pragma once
/// @file  The version of the library: this file is the one place where it stands; CMake reads it from here.

#define FOVEA_VERSION_MAJOR 0
#define FOVEA_VERSION_MINOR 1
#define FOVEA_VERSION_PATCH 0
#define FOVEA_VERSION_STRING "0.1.0"

/// One number to compare with: 10000 major + 100 minor + patch.
#define FOVEA_VERSION (FOVEA_VERSION_MAJOR * 10000 + FOVEA_VERSION_MINOR * 100 + FOVEA_VERSION_PATCH)
