// SPDX-License-Identifier: MIT
// The one object of our own programs that holds every mechanism behind any_attention::make.
#include <fovea/registry.hpp>

FOVEA_COMPILE_REGISTRY
