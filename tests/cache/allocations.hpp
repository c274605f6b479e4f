// SPDX-License-Identifier: MIT
#pragma once
/// @file  How often this program has allocated: to see that a call does not.

namespace cache_test {

long allocations();

}  // namespace cache_test
