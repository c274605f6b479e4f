// SPDX-License-Identifier: MIT
#pragma once
/// @file  Catch2 under one name: 3.x has catch_all.hpp, 2.x (Debian 12) has the single header. `Approx` is at the global scope in both.

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif
