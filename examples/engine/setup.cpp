// SPDX-License-Identifier: MIT
#include "setup.hpp"

namespace engine {

setup::setup(const model_options& o) : net(o.model), threads(o.threads), plan(exact_plan(net.config())) {}

}  // namespace engine
