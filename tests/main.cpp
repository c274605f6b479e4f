// SPDX-License-Identifier: MIT
/// @file  The main function of every test program under Catch2 2.x; Catch2 3.x links its own.

#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
